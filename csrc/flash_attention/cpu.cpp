// flash_attention on the CPU, compiled once per instruction set.
//
// One task is one (sequence, head): its keys are transposed once, then blocks of queries meet blocks of keys.
//
//              keys 0 .. 255   256 .. 511
//   queries    [ S block  ]  -> online softmax -> O += P V          forward, S stays in the first-level cache
//   queries    [ P, dS    ]  -> dQ += dS K, dK += dS^T Q, dV += P^T dO   backward
//
// Each task writes only its own rows of the outputs, in a fixed order: results do not depend on the thread
// count.
#include <cstdlib>

#include "common/convert.h"
#include "common/gemm.h"
#include "common/threads.h"
#include "flash_attention/flash_attention.h"

#define UBP_JOIN_(a, b) a##b
#define UBP_JOIN(a, b) UBP_JOIN_(a, b)

namespace ubp {
namespace {

constexpr int kForwardRows = 24;   // queries of a block; S takes 24 KiB
constexpr int kBackwardRows = 48;  // P and dS take 48 KiB each
constexpr int kKeyBlock = 256;
constexpr int kMaxThreads = 256;

int64_t round_up(int64_t value) { return (value + kWidth - 1) / kWidth * kWidth; }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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
    block = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((floats * 4 + 63) / 64 * 64)));
    capacity = block == nullptr ? 0 : floats;
    return block != nullptr;
  }

  float* take(int64_t floats) {
    float* taken = block + used;
    used += (floats + 15) / 16 * 16;
    return taken;
  }
};

// What one task works on: float rows of one head of one sequence, padded to a multiple of the vector width.
struct Task {
  int64_t queries, keys, width, padded, padded_keys;
  int64_t query_offset, key_offset, row_stride;  // in elements of the packed tensors
  int64_t head;
};

Task make_task(const FlashAttentionProblem& problem, int64_t item) {
  const int64_t sequence = problem.order[item / problem.heads];
  Task task;
  task.head = item % problem.heads;
  task.width = problem.width;
  task.padded = round_up(problem.width);
  task.queries = problem.cu_query[sequence + 1] - problem.cu_query[sequence];
  task.keys = problem.cu_key[sequence + 1] - problem.cu_key[sequence];
  // A stride that is no multiple of 4 KiB: columns of the transposed keys must not share one cache set.
  task.padded_keys = round_up(task.keys) + kWidth;
  task.row_stride = problem.heads * problem.width;
  task.query_offset = problem.cu_query[sequence] * task.row_stride + task.head * task.width;
  task.key_offset = problem.cu_key[sequence] * task.row_stride + task.head * task.width;
  return task;
}

// The rows of one head lie apart in the packed tensors; side by side, and padded to whole vectors, they are
// faster to compute on by more than the copy costs, also for float32.
template <class T>
Operand float_rows(const void* tensor, int64_t offset, int64_t rows, const Task& task, Workspace& workspace) {
  const T* source = static_cast<const T*>(tensor) + offset;
  float* copy = workspace.take(rows * task.padded);
  for (int64_t row = 0; row < rows; ++row) {
    float* target = copy + row * task.padded;
    for (int64_t column = 0; column < task.width; ++column)
      target[column] = to_float(source[row * task.row_stride + column]);
    for (int64_t column = task.width; column < task.padded; ++column) target[column] = 0.f;
  }
  return {copy, task.padded};
}

template <class T>
void write_rows(void* tensor, int64_t offset, const float* rows, int64_t count, const Task& task) {
  T* target = static_cast<T*>(tensor) + offset;
  for (int64_t row = 0; row < count; ++row)
    for (int64_t column = 0; column < task.width; ++column)
      from_float(rows[row * task.padded + column], target[row * task.row_stride + column]);
}

void zero_rows(float* rows, int64_t stride, int64_t count, int64_t padded) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t column = 0; column < padded; ++column) rows[row * stride + column] = 0.f;
}

// [keys, width] -> [width, padded_keys]; columns beyond the keys are 0.
float* transpose(Operand rows, int64_t keys, const Task& task, Workspace& workspace) {
  constexpr int kTile = 16;
  float* result = workspace.take(task.padded * task.padded_keys);
  for (int64_t key = 0; key < task.padded_keys; key += kTile) {
    const int64_t key_end = smaller(key + kTile, task.padded_keys);
    for (int64_t column = 0; column < task.width; ++column) {
      float* target = result + column * task.padded_keys;
      for (int64_t at = key; at < smaller(key_end, keys); ++at)
        target[at] = rows.data[at * rows.stride + column];
      for (int64_t at = key > keys ? key : keys; at < key_end; ++at) target[at] = 0.f;
    }
  }
  return result;
}

// Keys that query `row` sees, counted from `first_key`, within a block of `block` keys.
int64_t visible_keys(const FlashAttentionProblem& problem, const Task& task, int64_t row, int64_t first_key,
                     int64_t block) {
  if (!problem.is_causal) return block;
  const int64_t seen = row + task.keys - task.queries + 1 - first_key;
  return seen < 0 ? 0 : smaller(seen, block);
}

// Keys that any of the queries up to `last_row` sees.
int64_t key_limit(const FlashAttentionProblem& problem, const Task& task, int64_t last_row) {
  return visible_keys(problem, task, last_row, 0, task.keys);
}

// Turns one row of scores into exp(score - running maximum); returns the factor for what was summed before.
float softmax_row(float* scores, int64_t visible, int64_t padded, float scale, float& maximum_so_far,
                  float& sum) {
  for (int64_t at = 0; at < padded; at += kWidth) store(scores + at, load(scores + at) * scale);
  for (int64_t at = visible; at < padded; ++at) scores[at] = -INFINITY;
  Vec largest = broadcast(-INFINITY);
  for (int64_t at = 0; at < padded; at += kWidth) largest = maximum(largest, load(scores + at));
  const float block_maximum = max_lanes(largest);
  const float new_maximum = block_maximum > maximum_so_far ? block_maximum : maximum_so_far;
  const float reference = new_maximum == -INFINITY ? 0.f : new_maximum;
  Vec sums = {};
  for (int64_t at = 0; at < padded; at += kWidth) {
    const Vec weight = exponential(load(scores + at) - reference);
    sums += weight;
    store(scores + at, weight);
  }
  const float factor = maximum_so_far == -INFINITY ? 0.f : std::exp(maximum_so_far - reference);
  sum = sum * factor + sum_lanes(sums);
  maximum_so_far = new_maximum;
  return factor;
}

template <class T>
void forward_block(const FlashAttentionProblem& problem, const Task& task, Operand query, const float* keys,
                   Operand value, float* output, int64_t first_row, int64_t rows) {
  alignas(64) float scores[kForwardRows * kKeyBlock];
  float maxima[kForwardRows], sums[kForwardRows], factors[kForwardRows];
  const int64_t stride = task.padded;
  for (int64_t row = 0; row < rows; ++row) maxima[row] = -INFINITY, sums[row] = 0.f;
  zero_rows(output, stride, rows, task.padded);
  const int64_t limit = key_limit(problem, task, first_row + rows - 1);
  for (int64_t key = 0; key < limit; key += kKeyBlock) {
    const int64_t block = smaller(kKeyBlock, limit - key), padded = round_up(block);
    multiply<false>(scores, kKeyBlock, query, {keys + key, task.padded_keys}, rows, padded, task.width,
                    false);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t visible = visible_keys(problem, task, first_row + row, key, block);
      factors[row] =
          softmax_row(scores + row * kKeyBlock, visible, padded, problem.scale, maxima[row], sums[row]);
    }
    if (key > 0)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t at = 0; at < task.padded; at += kWidth)
          store(output + row * stride + at, load(output + row * stride + at) * factors[row]);
    const Operand block_values{value.data + key * value.stride, value.stride};
    multiply<false>(output, stride, {scores, kKeyBlock}, block_values, rows, task.padded, block, true);
  }
  const int64_t first = task.query_offset / task.row_stride + first_row;
  for (int64_t row = 0; row < rows; ++row) {
    const float inverse = sums[row] == 0.f ? 0.f : 1.f / sums[row];
    for (int64_t at = 0; at < task.padded; at += kWidth)
      store(output + row * stride + at, load(output + row * stride + at) * inverse);
    problem.lse[(first + row) * problem.heads + task.head] =
        sums[row] == 0.f ? -INFINITY : maxima[row] + std::log(sums[row]);
  }
}

template <class T>
bool forward_task(const FlashAttentionProblem& problem, const Task& task, Workspace& workspace) {
  if (task.queries == 0) return true;
  if (!workspace.reserve((2 * task.queries + 2 * task.keys) * task.padded + task.padded * task.padded_keys +
                         256))
    return false;
  const Operand query = float_rows<T>(problem.query, task.query_offset, task.queries, task, workspace);
  const Operand key = float_rows<T>(problem.key, task.key_offset, task.keys, task, workspace);
  const Operand value = float_rows<T>(problem.value, task.key_offset, task.keys, task, workspace);
  const float* keys = transpose(key, task.keys, task, workspace);
  float* output = workspace.take(task.queries * task.padded);
  for (int64_t row = 0; row < task.queries; row += kForwardRows) {
    const int64_t rows = smaller(kForwardRows, task.queries - row);
    forward_block<T>(problem, task, {query.data + row * query.stride, query.stride}, keys, value,
                     output + row * task.padded, row, rows);
  }
  write_rows<T>(problem.output, task.query_offset, output, task.queries, task);
  return true;
}

// P and dS of one block, from scores and <dO, V>; both in place.
void gradient_row(float* scores, float* products, int64_t visible, int64_t padded, float scale, float lse,
                  float delta) {
  for (int64_t at = 0; at < padded; at += kWidth) store(scores + at, load(scores + at) * scale - lse);
  for (int64_t at = lse == -INFINITY ? 0 : visible; at < padded; ++at) scores[at] = -INFINITY;
  for (int64_t at = 0; at < padded; at += kWidth) {
    const Vec weight = exponential(load(scores + at));
    store(scores + at, weight);
    store(products + at, weight * (load(products + at) - delta) * scale);
  }
}

// <a_i, b_i> of each row, summed in the order of `multiply`: where a query sees one key, <dO, V> and <dO, O>
// are then the same number and their difference is 0, not a rounding error.
void row_products(float* result, Operand a, Operand b, int64_t rows, int64_t width) {
  constexpr int kChains = 8;  // rows side by side, to hide the latency of the additions
  for (int64_t first = 0; first < rows; first += kChains) {
    float sums[kChains] = {};
    const float *left[kChains], *right[kChains];
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t row = smaller(first + chain, rows - 1);
      left[chain] = a.data + row * a.stride;
      right[chain] = b.data + row * b.stride;
    }
    for (int64_t column = 0; column < width; ++column)
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; ++chain) sums[chain] += left[chain][column] * right[chain][column];
    for (int64_t row = first; row < smaller(first + kChains, rows); ++row) result[row] = sums[row - first];
  }
}

struct Gradients {
  float *query, *key, *value;
};

template <class T>
void backward_block(const FlashAttentionProblem& problem, const Task& task, Operand query, Operand key,
                    Operand grad_output, const float* keys, const float* values, const float* deltas,
                    Gradients gradients, int64_t first_row, int64_t rows, float* scores, float* products) {
  const int64_t stride = task.padded;
  const int64_t first = task.query_offset / task.row_stride + first_row;
  const int64_t limit = key_limit(problem, task, first_row + rows - 1);
  for (int64_t at = 0; at < limit; at += kKeyBlock) {
    const int64_t block = smaller(kKeyBlock, limit - at), padded = round_up(block);
    multiply<false>(scores, kKeyBlock, query, {keys + at, task.padded_keys}, rows, padded, task.width, false);
    multiply<false>(products, kKeyBlock, grad_output, {values + at, task.padded_keys}, rows, padded,
                    task.width, false);
    for (int64_t row = 0; row < rows; ++row) {
      const float lse = problem.lse[(first + row) * problem.heads + task.head];
      gradient_row(scores + row * kKeyBlock, products + row * kKeyBlock,
                   visible_keys(problem, task, first_row + row, at, block), padded, problem.scale, lse,
                   deltas[row]);
    }
    const Operand block_keys{key.data + at * key.stride, key.stride};
    multiply<false>(gradients.query, stride, {products, kKeyBlock}, block_keys, rows, task.padded, block,
                    true);
    multiply<true>(gradients.key + at * stride, stride, {products, kKeyBlock}, query, block, task.padded,
                   rows, true);
    multiply<true>(gradients.value + at * stride, stride, {scores, kKeyBlock}, grad_output, block,
                   task.padded, rows, true);
  }
}

template <class T>
bool backward_task(const FlashAttentionProblem& problem, const Task& task, Workspace& workspace) {
  const int64_t stride = task.padded;
  if (!workspace.reserve((4 * task.queries + 5 * task.keys) * task.padded +
                         2 * task.padded * task.padded_keys + 2 * kBackwardRows * kKeyBlock + 512))
    return false;
  const Operand query = float_rows<T>(problem.query, task.query_offset, task.queries, task, workspace);
  const Operand output = float_rows<T>(problem.output, task.query_offset, task.queries, task, workspace);
  const Operand grad_output =
      float_rows<T>(problem.grad_output, task.query_offset, task.queries, task, workspace);
  const Operand key = float_rows<T>(problem.key, task.key_offset, task.keys, task, workspace);
  const Operand value = float_rows<T>(problem.value, task.key_offset, task.keys, task, workspace);
  const float* keys = transpose(key, task.keys, task, workspace);
  const float* values = transpose(value, task.keys, task, workspace);
  Gradients gradients;
  gradients.query = workspace.take(task.queries * task.padded);
  gradients.key = workspace.take(task.keys * task.padded);
  gradients.value = workspace.take(task.keys * task.padded);
  zero_rows(gradients.query, stride, task.queries, task.padded);
  zero_rows(gradients.key, stride, task.keys, task.padded);
  zero_rows(gradients.value, stride, task.keys, task.padded);
  float* scores = workspace.take(kBackwardRows * kKeyBlock);
  float* products = workspace.take(kBackwardRows * kKeyBlock);
  float deltas[kBackwardRows];
  for (int64_t row = 0; row < task.queries; row += kBackwardRows) {
    const int64_t rows = smaller(kBackwardRows, task.queries - row);
    row_products(deltas, {output.data + row * output.stride, output.stride},
                 {grad_output.data + row * grad_output.stride, grad_output.stride}, rows, task.width);
    const Gradients block{gradients.query + row * stride, gradients.key, gradients.value};
    backward_block<T>(problem, task, {query.data + row * query.stride, query.stride}, key,
                      {grad_output.data + row * grad_output.stride, grad_output.stride}, keys, values, deltas,
                      block, row, rows, scores, products);
  }
  write_rows<T>(problem.grad_query, task.query_offset, gradients.query, task.queries, task);
  write_rows<T>(problem.grad_key, task.key_offset, gradients.key, task.keys, task);
  write_rows<T>(problem.grad_value, task.key_offset, gradients.value, task.keys, task);
  return true;
}

struct Run {
  const FlashAttentionProblem* problem;
  Workspace workspaces[kMaxThreads];
  bool is_out_of_memory;  // set by any worker, read when all are done
};

template <class T, bool kIsForward>
void run_item(void* context, int64_t item, int worker) {
  Run& run = *static_cast<Run*>(context);
  if (__atomic_load_n(&run.is_out_of_memory, __ATOMIC_RELAXED)) return;
  const Task task = make_task(*run.problem, item);
  Workspace& workspace = run.workspaces[worker];
  const bool is_done = kIsForward ? forward_task<T>(*run.problem, task, workspace)
                                  : backward_task<T>(*run.problem, task, workspace);
  if (!is_done) __atomic_store_n(&run.is_out_of_memory, true, __ATOMIC_RELAXED);
}

template <bool kIsForward>
void run(const FlashAttentionProblem& problem) {
  Run run{&problem, {}, false};
  auto task = &run_item<float, kIsForward>;
  if (problem.dtype == DType::kBFloat16) task = &run_item<BFloat16, kIsForward>;
  if (problem.dtype == DType::kFloat16) task = &run_item<Float16, kIsForward>;
  const int threads = problem.threads < kMaxThreads ? problem.threads : kMaxThreads;
  parallel_for(problem.sequences * problem.heads, threads, task, &run);
  for (Workspace& workspace : run.workspaces) std::free(workspace.block);
  if (run.is_out_of_memory) throw_out_of_memory();
}

}  // namespace

namespace UBP_JOIN(isa_, UBP_ISA) {

void flash_attention_forward(const FlashAttentionProblem& problem) { run<true>(problem); }
void flash_attention_backward(const FlashAttentionProblem& problem) { run<false>(problem); }

}  // namespace UBP_JOIN(isa_,UBP_ISA)
}  // namespace ubp
