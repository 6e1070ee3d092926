// Rows of some heads of one sequence: in and out of the packed tensors, side by side, as float32 or as pairs
// of bfloat16.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "common/convert.h"
#include "common/tiles.h"
#include "flash_attention/flash_attention.h"

namespace ubp {
namespace {

// Sums of one block go on from those of the block before.
template <class A>
struct Continued : A {
  static constexpr bool kAddsLast = false;
};
using Floats = Continued<FloatArithmetic>;
#if defined(UBP_HAS_PAIRS)
using Pairs = Continued<BFloat16Arithmetic>;
#endif

template <class A>
constexpr bool kIsPaired = A::kPair == 2;

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

  // Numbers of the size of a float.
  template <class Number>
  Number* take_as(int64_t count) {
    static_assert(sizeof(Number) == sizeof(float), "the block counts in floats");
    return reinterpret_cast<Number*>(take(count));
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

// Steps of a product over the width, and the same in whole vectors.
template <class A>
int64_t steps_of(const Task& task) {
  return ceil_div(task.width, A::kPair);
}
template <class A>
int64_t padded_steps(const Task& task) {
  return round_up(steps_of<A>(task), kWidth);
}

// A row of one head, and zeros behind it.
template <class T>
UBP_INLINE void load_row(const T* source, int64_t width, int64_t stride, float* target) {
  const int64_t whole = width / kWidth * kWidth;
  for (int64_t at = 0; at < whole; at += kWidth) store(target + at, load_floats(source + at));
  if (whole == stride) return;
  store(target + whole, Vec{});
  for (int64_t at = whole; at < width; ++at) target[at] = to_float(source[at]);
}

UBP_INLINE void load_row(const BFloat16* source, int64_t width, int64_t stride, uint32_t* target) {
  const int64_t whole = width / (2 * kWidth) * kWidth;
  for (int64_t at = 0; at < whole; at += kWidth) store_as(target + at, load_as<IntVec>(source + 2 * at));
  if (whole == stride) return;
  store_as(target + whole, IntVec{});
  std::memcpy(target + whole, source + 2 * whole, static_cast<size_t>(width - 2 * whole) * sizeof(BFloat16));
}

// The first row of the task's head in a packed tensor [tokens, heads, width].
template <class T>
UBP_INLINE T* head_of(void* tensor, int64_t first, const FlashAttentionProblem& problem, const Task& task) {
  return static_cast<T*>(tensor) + (first * problem.heads + task.head) * task.width;
}
template <class T>
UBP_INLINE const T* head_of(const void* tensor, int64_t first, const FlashAttentionProblem& problem,
                            const Task& task) {
  return static_cast<const T*>(tensor) + (first * problem.heads + task.head) * task.width;
}

// Rows of one head lie a whole row of all heads apart and share few sets of the first-level cache. Where many
// are read again and again, side by side is faster by more than the copy costs.
constexpr int64_t kFewRows = 64, kAnyRows = INT64_MAX;

// Numbers that lie in the tensors as the products take them: whole vectors of floats.
template <class T>
bool is_direct(const Task& task) {
  return std::is_same_v<T, float> && task.width == task.padded;
}

// [rows rounded up to the vector width, padded steps], zeros behind the rows.
template <class A>
int64_t copy_size(int64_t rows, const Task& task) {
  return round_up(rows, kWidth) * padded_steps<A>(task);
}

template <class A, class T>
Operand<A> copy_rows(const T* source, int64_t rows, const FlashAttentionProblem& problem, const Task& task,
                     typename A::Element* buffer) {
  const int64_t stride = padded_steps<A>(task);
  for (int64_t row = 0; row < rows; ++row)
    load_row(source + row * problem.heads * task.width, task.width, stride, buffer + row * stride);
  std::memset(buffer + rows * stride, 0,
              static_cast<size_t>((round_up(rows, kWidth) - rows) * stride) * sizeof(typename A::Element));
  return {buffer, stride};
}

// As they lie, where the products can take them so and they are no more than `most`; else copies.
template <class A, class T>
Operand<A> read_rows(const T* source, int64_t rows, int64_t most, const FlashAttentionProblem& problem,
                     const Task& task, typename A::Element* buffer) {
  if constexpr (std::is_same_v<typename A::Element, T>)
    if (is_direct<T>(task) && rows <= most) return {source, problem.heads * task.width};
  return copy_rows<A, T>(source, rows, problem, task, buffer);
}

// Where results of one head are summed: in the tensor, or in a buffer that is written to it in the end.
struct Target {
  float* data;
  int64_t stride;
};

template <class T>
Target make_target(T* rows, const FlashAttentionProblem& problem, const Task& task, float* buffer) {
  if constexpr (std::is_same_v<T, float>)
    if (is_direct<T>(task)) return {rows, problem.heads * task.width};
  return {buffer, task.padded};
}

inline void fill_zeros(const Target& target, int64_t rows, const Task& task) {
  for (int64_t row = 0; row < rows; ++row)
    std::memset(target.data + row * target.stride, 0, static_cast<size_t>(task.padded) * sizeof(float));
}

template <class T>
void write_rows(T* rows, const Target& result, int64_t count, const FlashAttentionProblem& problem,
                const Task& task) {
  if (is_direct<T>(task)) return;
  const int64_t width = task.width, whole = width / kWidth * kWidth;
  for (int64_t row = 0; row < count; ++row, rows += problem.heads * width) {
    const float* source = result.data + row * result.stride;
    for (int64_t at = 0; at < whole; at += kWidth) store_floats(rows + at, load(source + at));
    for (int64_t at = whole; at < width; ++at) from_float(source[at], rows[at]);
  }
}

// kWidth columns of 32 bits of the first `count` rows from `source` on, and zeros: columns become rows.
template <class Element>
UBP_INLINE void load_transposed(const Element* source, int64_t stride, int64_t count, Vec (&tile)[kWidth]) {
  if (count >= kWidth) {
#pragma GCC unroll 16
    for (int at = 0; at < kWidth; ++at) tile[at] = load_as<Vec>(source + at * stride);
  } else {
#pragma GCC unroll 16
    for (int at = 0; at < kWidth; ++at) tile[at] = at < count ? load_as<Vec>(source + at * stride) : Vec{};
  }
  transpose_halves<kWidth / 2>(tile);
}

// [rows, padded steps] -> [padded steps, padded_keys], zeros behind the rows.
template <class A>
void transpose(Operand<A> rows, int64_t count, const Task& task, typename A::Element* result) {
  for (int64_t row = 0; row < count; row += kWidth)
    for (int64_t column = 0; column < padded_steps<A>(task); column += kWidth) {
      Vec tile[kWidth];
      load_transposed(rows.data + row * rows.stride + column, rows.stride, count - row, tile);
#pragma GCC unroll 16
      for (int at = 0; at < kWidth; ++at) store_as(result + (column + at) * task.padded_keys + row, tile[at]);
    }
}

// Rows as right side of a product over them. Pairs, of copies: two rows side by side, in `buffer`.
template <class A>
Operand<A> over_rows(Operand<A> rows, int64_t count, const Task& task, typename A::Element* buffer) {
  if constexpr (kIsPaired<A>) {
    for (int64_t row = 0; row < round_up(count, kWidth); row += 2)
      A::join_rows(rows.data + row * rows.stride, rows.data + (row + 1) * rows.stride, task.padded / 2,
                   buffer + row / 2 * task.padded);
    return {buffer, task.padded};
  } else {
    return rows;
  }
}

template <class A>
Operand<A> from_row(Operand<A> all, int64_t row) {
  return {all.data + row / A::kPair * all.stride, all.stride};
}

// Some rows of weights as left side of products over their columns, and over the rows themselves. Pairs:
// rounded to bfloat16 in the buffers.
template <class A>
Operand<A> over_columns(const float* weights, int64_t stride, int64_t rows, int64_t columns,
                        uint32_t* buffer) {
  if constexpr (kIsPaired<A>) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t at = 0; at < columns; at += kWidth)
        store_floats(reinterpret_cast<BFloat16*>(buffer + row * (stride / 2)) + at,
                     load(weights + row * stride + at));
    return {buffer, stride / 2};
  } else {
    return {weights, stride};
  }
}

template <class A>
struct BothWays {
  Operand<A> over_columns, over_rows;
};

// The row behind the last one is overwritten where their number is odd.
template <class A>
BothWays<A> both_ways(float* weights, int64_t stride, int64_t rows, int64_t columns, uint32_t* across,
                      uint32_t* down) {
  if constexpr (kIsPaired<A>) {
    if (rows % 2 == 1) std::memset(weights + rows * stride, 0, static_cast<size_t>(columns) * sizeof(float));
    for (int64_t row = 0; row < rows; row += 2)
      for (int64_t at = 0; at < columns; at += kWidth) {
        const float* even = weights + row * stride + at;
        uint32_t* pairs = across + (row * stride + at) / 2;
        A::round_pairs(load(even), load(even + stride), pairs, pairs + stride / 2,
                       down + row / 2 * stride + at);
      }
    return {{across, stride / 2}, {down, stride}};
  } else {
    return {{weights, stride}, {weights, stride}};
  }
}

}  // namespace
}  // namespace ubp
