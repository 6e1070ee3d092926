// flash_attention on the CPU, compiled once per instruction set.
//
// One item is one sequence and as many of its heads as fit into the second-level cache. Per head, keys are
// transposed once; each query block then walks over the key blocks.
//
//              keys 0 .. 255   256 .. 511
//   queries    [ S block  ]  -> online softmax -> O += P V          forward, S stays in the first-level cache
//   queries    [ P, dS    ]  -> dQ += dS K, dK += dS^T Q, dV += P^T dO   backward
//
// Each item writes only its own rows of the outputs, in a fixed order: results do not depend on the thread
// count.
#include "common/threads.h"
#include "flash_attention/weights.h"

namespace ubp {
namespace {

constexpr int kForwardFloats = 24 * kKeyBlock;   // S of a block: 24 KiB
constexpr int kBackwardFloats = 48 * kKeyBlock;  // P and dS of a block: 48 KiB each
constexpr int kMaxRows = 192;                    // queries of a block
constexpr int kMaxThreads = 256;

// Queries of a block: the fewer keys, the more.
int64_t block_rows(int64_t floats, int64_t stride, int64_t queries) {
  const int64_t most = smaller(floats / stride, kMaxRows);
  return smaller(most, round_up(ceil_div(queries, ceil_div(queries, most)), kRegisterRows));
}

int64_t score_stride(const Task& task) {
  return larger(kWidth, smaller(kKeyBlock, round_up(task.keys, kWidth)));
}

template <bool kIsPlain>
void forward_block(const FlashAttentionProblem& problem, const Task& task, Matrix query, const float* keys,
                   Matrix value, float* output, int64_t first_row, int64_t rows, Prefetch& prefetch) {
  alignas(64) float scores[kForwardFloats];
  float maxima[kMaxRows], sums[kMaxRows], factors[kMaxRows];
  const int64_t stride = task.padded, score_step = score_stride(task);
  for (int64_t row = 0; row < rows; ++row) maxima[row] = -INFINITY, sums[row] = 0.f;
  const Range limits = visible_keys(problem, task, first_row, rows);
  for (int64_t key = limits.begin; key < limits.end; key += kKeyBlock) {
    const int64_t block = smaller(kKeyBlock, limits.end - key), padded = round_up(block, kWidth);
    multiply<Arithmetic, false>(scores, score_step, query, {keys + key, task.padded_keys}, rows, padded,
                                task.width, false);
    for (int64_t row = 0; row < rows; ++row) {
      prefetch.step();
      factors[row] =
          softmax_row<kIsPlain>(problem, task, make_row(problem, task, first_row + row, key, block),
                                scores + row * score_step, maxima[row], sums[row]);
    }
    const bool adds = key > limits.begin;
    if (adds)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t at = 0; at < task.padded; at += kWidth)
          store(output + row * stride + at, load(output + row * stride + at) * factors[row]);
    const Matrix block_values{value.data + key * value.stride, value.stride};
    multiply<Arithmetic, false>(output, stride, {scores, score_step}, block_values, rows, task.padded, block,
                                adds);
  }
  float* lse = problem.lse + (task.first_query + first_row) * problem.heads + task.head;
  for (int64_t row = 0; row < rows; ++row) {
    const bool is_blind = sums[row] == 0.f;
    const float inverse = is_blind ? 0.f : 1.f / sums[row];
    for (int64_t at = 0; at < task.padded; at += kWidth) {
      float* target = output + row * stride + at;
      store(target, limits.begin < limits.end ? load(target) * inverse : Vec{});
    }
    lse[row * problem.heads] = is_blind ? -INFINITY : maxima[row] + std::log(sums[row]);
  }
}

template <class T, bool kIsPlain>
bool forward_item(const FlashAttentionProblem& problem, Task task, Workspace& workspace, Prefetch& prefetch) {
  if (task.queries == 0) return true;
  if (!workspace.reserve(2 * head_floats(task.queries, task) + 2 * head_floats(task.keys, task) +
                         task.padded * task.padded_keys + 16))
    return false;
  const auto rows_of = [&](const void* tensor, int64_t first, int64_t rows) {
    return load_rows<T>(tensor, first, rows, problem, task, workspace);
  };
  const HeadRows query = rows_of(problem.query, task.first_query, task.queries);
  const HeadRows key = rows_of(problem.key, task.first_key, task.keys);
  const HeadRows value = rows_of(problem.value, task.first_key, task.keys);
  const HeadRows output = take_rows(task.queries, task, workspace);
  float* keys = workspace.take(task.padded * task.padded_keys);
  const int64_t block = block_rows(kForwardFloats, score_stride(task), task.queries);
  for (; task.head < task.first_head + task.heads; ++task.head) {
    transpose(key, task, keys);
    for (int64_t row = 0; row < task.queries; row += block)
      forward_block<kIsPlain>(problem, task, {query.of(task) + row * task.padded, task.padded}, keys,
                              value.matrix(task), output.of(task) + row * task.padded, row,
                              smaller(block, task.queries - row), prefetch);
  }
  write_rows<T>(problem.output, task.first_query, output, task.queries, problem, task);
  return true;
}

// <a_i, b_i> of each row, summed in the order of `multiply`: where a query sees one key, <dO, V> and <dO, O>
// are then the same number and their difference is 0, not a rounding error.
void row_products(float* result, const float* a, const float* b, int64_t stride, int64_t rows,
                  int64_t width) {
  constexpr int kChains = 8;  // rows side by side, to hide the latency of the additions
  for (int64_t first = 0; first < rows; first += kChains) {
    float sums[kChains] = {};
    int64_t starts[kChains];
    for (int chain = 0; chain < kChains; ++chain) starts[chain] = smaller(first + chain, rows - 1) * stride;
    for (int64_t column = 0; column < width; ++column)
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; ++chain)
        sums[chain] += a[starts[chain] + column] * b[starts[chain] + column];
    for (int64_t row = first; row < smaller(first + kChains, rows); ++row) result[row] = sums[row - first];
  }
}

// What backward needs of one head.
struct BackwardHead {
  const float *query, *key, *grad_output;  // rows
  const float *keys, *values;              // transposed
  const float* deltas;
  float *grad_query, *grad_key, *grad_value;
  float *scores, *products;
  double* bucket_sums;
};

template <bool kIsPlain>
void backward_block(const FlashAttentionProblem& problem, const Task& task, const BackwardHead& head,
                    int64_t first_row, int64_t rows, Prefetch& prefetch) {
  const int64_t stride = task.padded, step = score_stride(task);
  const Matrix query{head.query + first_row * stride, stride};
  const Matrix grad_output{head.grad_output + first_row * stride, stride};
  const float* lse = problem.lse + (task.first_query + first_row) * problem.heads + task.head;
  const Range limits = visible_keys(problem, task, first_row, rows);
  for (int64_t at = limits.begin; at < limits.end; at += kKeyBlock) {
    const int64_t block = smaller(kKeyBlock, limits.end - at), padded = round_up(block, kWidth);
    multiply<Arithmetic, false>(head.scores, step, query, {head.keys + at, task.padded_keys}, rows, padded,
                                task.width, false);
    multiply<Arithmetic, false>(head.products, step, grad_output, {head.values + at, task.padded_keys}, rows,
                                padded, task.width, false);
    for (int64_t row = 0; row < rows; ++row) {
      prefetch.step();
      Row here = make_row(problem, task, first_row + row, at, block);
      const float row_lse = lse[row * problem.heads];
      if (row_lse == -INFINITY) here.visible = {0, 0};
      gradient_row<kIsPlain>(problem, task, here, head.scores + row * step, head.products + row * step,
                             row_lse, head.deltas[first_row + row], head.bucket_sums);
    }
    multiply<Arithmetic, false>(head.grad_query + first_row * stride, stride, {head.products, step},
                                {head.key + at * stride, stride}, rows, task.padded, block, true);
    multiply<Arithmetic, true>(head.grad_key + at * stride, stride, {head.products, step}, query, block,
                               task.padded, rows, true);
    multiply<Arithmetic, true>(head.grad_value + at * stride, stride, {head.scores, step}, grad_output, block,
                               task.padded, rows, true);
  }
}

template <class T, bool kIsPlain>
bool backward_item(const FlashAttentionProblem& problem, Task task, Workspace& workspace, Prefetch& prefetch,
                   float* bias_part) {
  if (!workspace.reserve(4 * head_floats(task.queries, task) + 4 * head_floats(task.keys, task) +
                         2 * task.padded * task.padded_keys + 2 * kBackwardFloats + task.queries + 80))
    return false;
  const auto rows_of = [&](const void* tensor, int64_t first, int64_t rows) {
    return load_rows<T>(tensor, first, rows, problem, task, workspace);
  };
  const HeadRows query = rows_of(problem.query, task.first_query, task.queries);
  const HeadRows output = rows_of(problem.output, task.first_query, task.queries);
  const HeadRows grad_output = rows_of(problem.grad_output, task.first_query, task.queries);
  const HeadRows key = rows_of(problem.key, task.first_key, task.keys);
  const HeadRows value = rows_of(problem.value, task.first_key, task.keys);
  const HeadRows grad_query = take_zeros(task.queries, task, workspace);
  const HeadRows grad_key = take_zeros(task.keys, task, workspace);
  const HeadRows grad_value = take_zeros(task.keys, task, workspace);
  float* keys = workspace.take(task.padded * task.padded_keys);
  float* values = workspace.take(task.padded * task.padded_keys);
  float* scores = workspace.take(kBackwardFloats);
  float* products = workspace.take(kBackwardFloats);
  float* deltas = workspace.take(task.queries);
  const int64_t block = task.queries == 0 ? 1 : block_rows(kBackwardFloats, score_stride(task), task.queries);
  for (; task.head < task.first_head + task.heads; ++task.head) {
    double bucket_sums[kIsPlain ? 1 : kSumChains * kMaxBuckets] = {};
    transpose(key, task, keys);
    transpose(value, task, values);
    row_products(deltas, output.of(task), grad_output.of(task), task.padded, task.queries, task.width);
    const BackwardHead head{
        query.of(task),      key.of(task),      grad_output.of(task), keys,   values,   deltas,
        grad_query.of(task), grad_key.of(task), grad_value.of(task),  scores, products, bucket_sums};
    for (int64_t row = 0; row < task.queries; row += block)
      backward_block<kIsPlain>(problem, task, head, row, smaller(block, task.queries - row), prefetch);
    if (!kIsPlain && bias_part != nullptr)
      for (int64_t bucket = 0; bucket < problem.buckets; ++bucket) {
        double sum = 0.0;
        for (int chain = 0; chain < kSumChains; ++chain) sum += bucket_sums[chain * kMaxBuckets + bucket];
        bias_part[task.head * problem.buckets + bucket] = static_cast<float>(sum);
      }
  }
  write_rows<T>(problem.grad_query, task.first_query, grad_query, task.queries, problem, task);
  write_rows<T>(problem.grad_key, task.first_key, grad_key, task.keys, problem, task);
  write_rows<T>(problem.grad_value, task.first_key, grad_value, task.keys, problem, task);
  return true;
}

// What this item writes and what the next one reads.
template <class T, bool kIsForward>
Prefetch make_prefetch(const FlashAttentionProblem& problem, const Task& task, int64_t next) {
  Prefetch prefetch;
  const int64_t row_bytes = problem.heads * problem.width * static_cast<int64_t>(sizeof(T));
  if (task.heads < problem.heads) return prefetch;  // a long sequence: arithmetic takes most of its time
  const auto add = [&](const void* tensor, int64_t first, int64_t rows) {
    if (rows > 0) prefetch.add(tensor, first, rows, row_bytes);
  };
  if (kIsForward) {
    add(problem.output, task.first_query, task.queries);
  } else {
    add(problem.grad_query, task.first_query, task.queries);
    add(problem.grad_key, task.first_key, task.keys);
    add(problem.grad_value, task.first_key, task.keys);
  }
  if (next < problem.item_count) {
    const Task coming = make_task(problem, problem.items[next]);
    add(problem.query, coming.first_query, coming.queries);
    add(problem.key, coming.first_key, coming.keys);
    add(problem.value, coming.first_key, coming.keys);
    if (!kIsForward) add(problem.output, coming.first_query, coming.queries);
    if (!kIsForward) add(problem.grad_output, coming.first_query, coming.queries);
  }
  prefetch.spread(task.queries * task.heads);
  return prefetch;
}

struct Run {
  const FlashAttentionProblem* problem;
  float* bias_parts;  // [sequences, heads, buckets]: gradients of the time_bias, or null
  Workspace workspaces[kMaxThreads];
  bool is_out_of_memory;  // set by any worker, read when all are done
};

template <class T, bool kIsForward, bool kIsPlain>
void run_item(void* context, int64_t index, int worker) {
  Run& run = *static_cast<Run*>(context);
  if (__atomic_load_n(&run.is_out_of_memory, __ATOMIC_RELAXED)) return;
  const FlashAttentionProblem& problem = *run.problem;
  const FlashAttentionItem& item = problem.items[index];
  const Task task = make_task(problem, item);
  Workspace& workspace = run.workspaces[worker];
  Prefetch prefetch = make_prefetch<T, kIsForward>(problem, task, index + problem.threads);
  float* bias_part = nullptr;
  if (run.bias_parts != nullptr) bias_part = run.bias_parts + item.sequence * problem.heads * problem.buckets;
  const bool is_done = kIsForward ? forward_item<T, kIsPlain>(problem, task, workspace, prefetch)
                                  : backward_item<T, kIsPlain>(problem, task, workspace, prefetch, bias_part);
  if (!is_done) __atomic_store_n(&run.is_out_of_memory, true, __ATOMIC_RELAXED);
}

template <bool kIsForward, bool kIsPlain>
auto item_function(DType dtype) {
  if (dtype == DType::kBFloat16) return &run_item<BFloat16, kIsForward, kIsPlain>;
  if (dtype == DType::kFloat16) return &run_item<Float16, kIsForward, kIsPlain>;
  return &run_item<float, kIsForward, kIsPlain>;
}

// In the order of the sequences, whoever computed them.
void sum_bias_parts(const FlashAttentionProblem& problem, const float* parts) {
  const int64_t entries = problem.heads * problem.buckets;
  for (int64_t entry = 0; entry < entries; ++entry) {
    double sum = 0.0;
    for (int64_t b = 0; b < problem.sequences; ++b) sum += static_cast<double>(parts[b * entries + entry]);
    problem.grad_time_bias[entry] = static_cast<float>(sum);
  }
}

template <bool kIsForward>
void run(const FlashAttentionProblem& problem) {
  Run run{&problem, nullptr, {}, false};
  if (!kIsForward && problem.time_bias != nullptr) {
    const size_t floats = static_cast<size_t>(problem.sequences * problem.heads * problem.buckets);
    // Zeros, because an empty sequence is no item.
    run.bias_parts = static_cast<float*>(std::calloc(floats + 1, sizeof(float)));
    if (run.bias_parts == nullptr) throw_out_of_memory();
  }
  const bool is_plain = problem.time_bias == nullptr && problem.threshold == 0;
  const int threads = problem.threads < kMaxThreads ? problem.threads : kMaxThreads;
  parallel_for(problem.item_count, threads,
               is_plain ? item_function<kIsForward, true>(problem.dtype)
                        : item_function<kIsForward, false>(problem.dtype),
               &run);
  for (Workspace& workspace : run.workspaces) std::free(workspace.block);
  if (run.bias_parts != nullptr && !run.is_out_of_memory) sum_bias_parts(problem, run.bias_parts);
  std::free(run.bias_parts);
  if (run.is_out_of_memory) throw_out_of_memory();
}

}  // namespace

namespace UBP_ISA_NAMESPACE {

void flash_attention_forward(const FlashAttentionProblem& problem) { run<true>(problem); }
void flash_attention_backward(const FlashAttentionProblem& problem) { run<false>(problem); }

}  // namespace UBP_ISA_NAMESPACE
}  // namespace ubp
