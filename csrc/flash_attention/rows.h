// Rows of some heads of one sequence: in and out of the packed tensors, as float32 and side by side.
#pragma once

#include <cstdlib>

#include "common/convert.h"
#include "common/gemm.h"
#include "flash_attention/flash_attention.h"

namespace ubp {
namespace {

// Sums of one block go on from those of the block before.
struct Arithmetic : FloatArithmetic {
  static constexpr bool kAddsLast = false;
};
using Matrix = Operand<Arithmetic>;

// Bump allocator over one growing block per worker, so that a task never asks the system for memory it had
// before.
struct Workspace {
  float* block = nullptr;
  int64_t capacity = 0, used = 0;

  // False when the system has no memory left.
  bool reserve(int64_t floats) {
    used = 0;
    if (floats <= capacity) return true;
    std::free(block);
    block = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round_up(floats * 4, 64))));
    capacity = block == nullptr ? 0 : floats;
    return block != nullptr;
  }

  float* take(int64_t floats) {
    float* taken = block + used;
    used += round_up(floats, 16);
    return taken;
  }
};

// One head of one sequence; the heads of an item take turns.
struct Task {
  int64_t queries, keys, width, padded, padded_keys;
  int64_t first_query, first_key;  // rows of the packed tensors
  int64_t first_head, heads;       // of the item
  int64_t head;
};

inline Task make_task(const FlashAttentionProblem& problem, const FlashAttentionItem& item) {
  Task task;
  task.first_head = task.head = item.first_head;
  task.heads = item.heads;
  task.width = problem.width;
  task.padded = round_up(problem.width, kWidth);
  task.first_query = problem.cu_query[item.sequence];
  task.first_key = problem.cu_key[item.sequence];
  task.queries = problem.cu_query[item.sequence + 1] - task.first_query;
  task.keys = problem.cu_key[item.sequence + 1] - task.first_key;
  // A stride that is no multiple of 4 KiB: columns of the transposed keys must not share one cache set.
  task.padded_keys = round_up(task.keys, kWidth) + kWidth;
  return task;
}

// Asks for memory that is needed soon, a little with every row of scores: sequences are short and their order
// is by cost, so that the processor cannot guess what comes next.
class Prefetch {
 public:
  // All heads of some rows of a packed tensor.
  void add(const void* tensor, int64_t first, int64_t rows, int64_t row_bytes) {
    const char* begin = static_cast<const char*>(tensor) + first * row_bytes;
    parts_[count_++] = {begin, begin + rows * row_bytes};
    lines_ += rows * row_bytes / kLine + 1;
  }

  void spread(int64_t steps) { lines_per_step_ = steps == 0 ? 0 : lines_ / steps + 1; }

  void step() {
    for (int64_t line = 0; line < lines_per_step_ && current_ < count_; ++line) {
      Part& part = parts_[current_];
      __builtin_prefetch(part.at, 0, 2);
      part.at += kLine;
      if (part.at >= part.end) ++current_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Part {
    const char *at, *end;
  };
  Part parts_[8];
  int count_ = 0, current_ = 0;
  int64_t lines_ = 0, lines_per_step_ = 0;
};

// Rows of all heads of an item, [heads, rows, padded]; their number is a multiple of the vector width.
struct HeadRows {
  float* data;
  int64_t rows, padded;

  float* of(const Task& task) const { return data + (task.head - task.first_head) * rows * padded; }
  Matrix matrix(const Task& task) const { return {of(task), padded}; }
};

inline int64_t head_floats(int64_t rows, const Task& task) {
  return task.heads * round_up(rows, kWidth) * task.padded + 16;
}

inline HeadRows take_rows(int64_t rows, const Task& task, Workspace& workspace) {
  return {workspace.take(task.heads * round_up(rows, kWidth) * task.padded), round_up(rows, kWidth),
          task.padded};
}

inline HeadRows take_zeros(int64_t rows, const Task& task, Workspace& workspace) {
  const HeadRows zeros = take_rows(rows, task, workspace);
  std::memset(zeros.data, 0, static_cast<size_t>(task.heads * zeros.rows * zeros.padded) * sizeof(float));
  return zeros;
}

// Row after row with all heads of the item: memory is read in its order. Side by side, and padded to whole
// vectors, the rows of a head are faster to compute on by more than the copy costs, also for float32.
template <class T>
HeadRows load_rows(const void* tensor, int64_t first, int64_t rows, const FlashAttentionProblem& problem,
                   const Task& task, Workspace& workspace) {
  const HeadRows copy = take_rows(rows, task, workspace);
  const int64_t width = task.width, whole = width / kWidth * kWidth, step = copy.rows * copy.padded;
  const T* source = static_cast<const T*>(tensor) + (first * problem.heads + task.first_head) * width;
  for (int64_t row = 0; row < rows; ++row, source += (problem.heads - task.heads) * width) {
    float* target = copy.data + row * copy.padded;
    for (int64_t head = 0; head < task.heads; ++head, source += width, target += step) {
      for (int64_t at = 0; at < whole; at += kWidth) store(target + at, load_floats(source + at));
      if (whole == width) continue;
      store(target + whole, Vec{});
      for (int64_t at = whole; at < width; ++at) target[at] = to_float(source[at]);
    }
  }
  for (int64_t head = 0; head < task.heads; ++head)
    for (int64_t at = rows * copy.padded; at < step; at += kWidth) store(copy.data + head * step + at, Vec{});
  return copy;
}

template <class T>
void write_rows(void* tensor, int64_t first, const HeadRows& result, int64_t rows,
                const FlashAttentionProblem& problem, const Task& task) {
  const int64_t width = task.width, whole = width / kWidth * kWidth, step = result.rows * result.padded;
  T* target = static_cast<T*>(tensor) + (first * problem.heads + task.first_head) * width;
  for (int64_t row = 0; row < rows; ++row, target += (problem.heads - task.heads) * width) {
    const float* source = result.data + row * result.padded;
    for (int64_t head = 0; head < task.heads; ++head, target += width, source += step) {
      for (int64_t at = 0; at < whole; at += kWidth) store_floats(target + at, load(source + at));
      for (int64_t at = whole; at < width; ++at) from_float(source[at], target[at]);
    }
  }
}

// [rows, padded] of the task's head -> [padded, padded_keys].
inline void transpose(const HeadRows& rows, const Task& task, float* result) {
  const float* source = rows.of(task);
  for (int64_t row = 0; row < rows.rows; row += kWidth)
    for (int64_t column = 0; column < rows.padded; column += kWidth) {
      Vec tile[kWidth];
#pragma GCC unroll 16
      for (int at = 0; at < kWidth; ++at) tile[at] = load(source + (row + at) * rows.padded + column);
      transpose_halves<kWidth / 2>(tile);
#pragma GCC unroll 16
      for (int at = 0; at < kWidth; ++at) store(result + (column + at) * task.padded_keys + row, tile[at]);
    }
}

}  // namespace
}  // namespace ubp
