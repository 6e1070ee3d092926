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
constexpr int64_t kMostSteps = 128;  // pairs of a row

// Queries of a block: the fewer keys, the more.
int64_t block_rows(int64_t floats, int64_t stride, int64_t queries) {
  const int64_t most = smaller(floats / stride, kMaxRows) / 2 * 2;
  return smaller(most, round_up(ceil_div(queries, ceil_div(queries, most)), kRegisterRows));
}

int64_t score_stride(const Task& task) {
  return larger(kWidth, smaller(kKeyBlock, round_up(task.keys, kWidth)));
}

// Calls `function` for groups of rows and then for single ones.
template <class Function>
void side_by_side(int64_t rows, const Function& function) {
  int64_t row = 0;
  for (; row + kSideBySide <= rows; row += kSideBySide)
    function(std::integral_constant<int, kSideBySide>{}, row);
  for (; row < rows; ++row) function(std::integral_constant<int, 1>{}, row);
}

template <class A, bool kIsPlain>
void forward_block(const FlashAttentionProblem& problem, const Task& task, Operand<A> query,
                   const typename A::Element* keys, Operand<A> value, Target output, int64_t first_row,
                   int64_t rows, Prefetch& prefetch) {
  alignas(64) float scores[kForwardFloats];
  alignas(64) uint32_t rounded[kIsPaired<A> ? kForwardFloats / 2 : 1];
  float maxima[kMaxRows], sums[kMaxRows], factors[kMaxRows];
  const int64_t score_step = score_stride(task);
  for (int64_t row = 0; row < rows; ++row) maxima[row] = -INFINITY, sums[row] = 0.f;
  const Range limits = visible_keys(problem, task, first_row, rows);
  for (int64_t key = limits.begin; key < limits.end; key += kKeyBlock) {
    const int64_t block = smaller(kKeyBlock, limits.end - key), padded = round_up(block, kWidth);
    multiply<A, false>(scores, score_step, query, {keys + key, task.padded_keys}, rows, padded,
                       steps_of<A>(task), false);
    const auto weigh = [&](auto count, int64_t row) {
      constexpr int kRows = decltype(count)::value;
      prefetch.step(kRows);
      softmax_rows<kIsPlain>(problem, task, make_rows<kRows>(problem, task, first_row + row, key, block),
                             scores + row * score_step, score_step, maxima + row, sums + row, factors + row);
    };
    side_by_side(rows, weigh);
    const bool adds = key > limits.begin;
    if (adds)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t at = 0; at < task.padded; at += kWidth) {
          float* target = output.data + row * output.stride + at;
          store(target, load(target) * factors[row]);
        }
    multiply<A, false>(output.data, output.stride, over_columns<A>(scores, score_step, rows, padded, rounded),
                       from_row(value, key), rows, task.padded, ceil_div(block, A::kPair), adds);
  }
  float* lse = problem.lse + (task.first_query + first_row) * problem.heads + task.head;
  for (int64_t row = 0; row < rows; ++row) {
    const bool is_blind = sums[row] == 0.f;
    const float inverse = is_blind ? 0.f : 1.f / sums[row];
    for (int64_t at = 0; at < task.padded; at += kWidth) {
      float* target = output.data + row * output.stride + at;
      store(target, limits.begin < limits.end ? load(target) * inverse : Vec{});
    }
    lse[row * problem.heads] = is_blind ? -INFINITY : maxima[row] + std::log(sums[row]);
  }
}

template <class A, class T, bool kIsPlain>
bool forward_item(const FlashAttentionProblem& problem, Task task, Workspace& workspace, Prefetch& prefetch) {
  using Element = typename A::Element;
  if (task.queries == 0) return true;
  const int64_t query_size = copy_size<A>(task.queries, task), key_size = copy_size<A>(task.keys, task),
                output_size = task.queries * task.padded,
                transposed = padded_steps<A>(task) * task.padded_keys,
                joined = kIsPaired<A> ? round_up(task.keys, kWidth) * task.padded / 2 : 0;
  if (!workspace.reserve(query_size + 2 * key_size + output_size + transposed + joined + 96)) return false;
  Element* query_copy = workspace.take_as<Element>(query_size);
  Element* key_copy = workspace.take_as<Element>(key_size);
  Element* value_copy = workspace.take_as<Element>(key_size);
  float* output_copy = workspace.take(output_size);
  Element* keys = workspace.take_as<Element>(transposed);
  Element* joined_values = workspace.take_as<Element>(joined);
  const int64_t block = block_rows(kForwardFloats, score_stride(task), task.queries);
  for (; task.head < task.first_head + task.heads; ++task.head) {
    const auto rows_of = [&](const void* tensor, int64_t first, int64_t rows, int64_t most, Element* copy) {
      return read_rows<A>(head_of<T>(tensor, first, problem, task), rows, most, problem, task, copy);
    };
    const Operand<A> query = rows_of(problem.query, task.first_query, task.queries, kAnyRows, query_copy),
                     key = rows_of(problem.key, task.first_key, task.keys, kAnyRows, key_copy),
                     value = rows_of(problem.value, task.first_key, task.keys, kFewRows, value_copy),
                     values = over_rows<A>(value, task.keys, task, joined_values);
    transpose<A>(key, task.keys, task, keys);
    T* output_rows = head_of<T>(problem.output, task.first_query, problem, task);
    const Target output = make_target(output_rows, problem, task, output_copy);
    for (int64_t row = 0; row < task.queries; row += block)
      forward_block<A, kIsPlain>(problem, task, {query.data + row * query.stride, query.stride}, keys, values,
                                 {output.data + row * output.stride, output.stride}, row,
                                 smaller(block, task.queries - row), prefetch);
    write_rows(output_rows, output, task.queries, problem, task);
  }
  return true;
}

// Whether rows see keys of several blocks, or drop some: else <dO, O> is the sum of P <dO, V>, of weights
// that are all at hand.
inline bool are_partial(const FlashAttentionProblem& problem, const Task& task) {
  return task.keys > kKeyBlock || problem.threshold > 0;
}

// Values that are all 0 say nothing of the output. The gradient of the log-sum-exp comes with such, and with
// an output that is not theirs.
template <class A>
bool are_zeros(Operand<A> rows, int64_t count, const Task& task) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t step = 0; step < steps_of<A>(task); ++step)
      if (rows.data[row * rows.stride + step] != 0) return false;
  return true;
}

// <a_i, b_i> of each row, summed in the order of `multiply`: where a query sees one key, <dO, V> and <dO, O>
// are then the same number and their difference is 0, not a rounding error.
template <class A>
void row_products(float* result, Operand<A> a, Operand<A> b, int64_t rows, int64_t steps) {
  for (int64_t first = 0; first < rows; first += kWidth) {
    Vec sums = {};
    [[maybe_unused]] alignas(64) typename A::Element columns[A::kHasTiles ? kMostSteps * kWidth : 1];
    for (int64_t column = 0; column < steps; column += kWidth) {
      Vec left[kWidth], right[kWidth];
      load_transposed(b.data + first * b.stride + column, b.stride, rows - first, right);
      if constexpr (A::kHasTiles) {
        for (int at = 0; at < kWidth; ++at) store_as(columns + (column + at) * kWidth, right[at]);
        continue;
      }
      load_transposed(a.data + first * a.stride + column, a.stride, rows - first, left);
      for (int64_t step = 0; step < smaller(kWidth, steps - column); ++step)
        sums = A::multiply_add((typename A::Elements)left[step], (typename A::Elements)right[step], sums);
    }
    if constexpr (A::kHasTiles) {  // all products of some rows, of which the diagonal is wanted
      alignas(64) float products[kWidth * kWidth];
      const int64_t count = smaller(kWidth, rows - first);
      multiply<A, false>(products, kWidth, {a.data + first * a.stride, a.stride}, {columns, kWidth}, count,
                         kWidth, steps, false);
      for (int at = 0; at < count; ++at) sums[at] = products[at * kWidth + at];
    }
    store(result + first, sums);
  }
}

// What backward needs of one head.
template <class A>
struct BackwardHead {
  Operand<A> query, grad_output;               // rows
  const typename A::Element *keys, *values;    // transposed
  Operand<A> queries, all_keys, grad_outputs;  // as right sides of products over rows
  const float* deltas;                         // <dO, O> of each row, or null: see gradient_rows
  Target grad_query, grad_key, grad_value;
  bool is_filled;  // the targets hold sums, be they 0
  float *scores, *products;
  uint32_t *across, *down;  // pairs: products, then scores, rounded
  double* bucket_sums;
};

template <class A, bool kIsPlain>
void backward_block(const FlashAttentionProblem& problem, const Task& task, const BackwardHead<A>& head,
                    int64_t first_row, int64_t rows, Prefetch& prefetch) {
  const int64_t step = score_stride(task), steps = steps_of<A>(task);
  const auto rows_from = [&](Operand<A> all) -> Operand<A> {
    return {all.data + first_row * all.stride, all.stride};
  };
  const float* lse = problem.lse + (task.first_query + first_row) * problem.heads + task.head;
  const Range limits = visible_keys(problem, task, first_row, rows);
  for (int64_t at = limits.begin; at < limits.end; at += kKeyBlock) {
    const int64_t block = smaller(kKeyBlock, limits.end - at), padded = round_up(block, kWidth);
    multiply<A, false>(head.scores, step, rows_from(head.query), {head.keys + at, task.padded_keys}, rows,
                       padded, steps, false, &prefetch);
    multiply<A, false>(head.products, step, rows_from(head.grad_output), {head.values + at, task.padded_keys},
                       rows, padded, steps, false, &prefetch);
    const auto weigh = [&](auto count, int64_t row) {
      constexpr int kRows = decltype(count)::value;
      Rows<kRows> here = make_rows<kRows>(problem, task, first_row + row, at, block);
      float row_lse[kRows], *scores = head.scores + row * step, *products = head.products + row * step;
      for (int each = 0; each < kRows; ++each) {
        row_lse[each] = lse[(row + each) * problem.heads];
        if (row_lse[each] == -INFINITY) here.each[each].visible = {0, 0};
      }
      gradient_rows<kIsPlain>(problem, task, here, scores, products, step, row_lse,
                              head.deltas == nullptr ? nullptr : head.deltas + first_row + row,
                              head.bucket_sums);
    };
    side_by_side(rows, weigh);
    const int64_t row_steps = ceil_div(rows, A::kPair);
    const auto target_row = [](Target all, int64_t row) { return all.data + row * all.stride; };
    const BothWays<A> products = both_ways<A>(head.products, step, rows, padded, head.across, head.down);
    multiply<A, false>(target_row(head.grad_query, first_row), head.grad_query.stride, products.over_columns,
                       from_row(head.all_keys, at), rows, task.padded, ceil_div(block, A::kPair),
                       head.is_filled || at > 0, &prefetch);
    multiply<A, true>(target_row(head.grad_key, at), head.grad_key.stride, products.over_rows,
                      from_row(head.queries, first_row), block, task.padded, row_steps,
                      head.is_filled || first_row > 0, &prefetch);
    const BothWays<A> weights = both_ways<A>(head.scores, step, rows, padded, head.across, head.down);
    multiply<A, true>(target_row(head.grad_value, at), head.grad_value.stride, weights.over_rows,
                      from_row(head.grad_outputs, first_row), block, task.padded, row_steps,
                      head.is_filled || first_row > 0, &prefetch);
  }
}

template <class A, class T, bool kIsPlain>
bool backward_item(const FlashAttentionProblem& problem, Task task, Workspace& workspace, Prefetch& prefetch,
                   float* bias_part) {
  using Element = typename A::Element;
  const int64_t query_size = copy_size<A>(task.queries, task), key_size = copy_size<A>(task.keys, task),
                queries_size = task.queries * task.padded, keys_size = task.keys * task.padded,
                transposed = padded_steps<A>(task) * task.padded_keys,
                joined_queries = kIsPaired<A> ? round_up(task.queries, kWidth) * task.padded / 2 : 0,
                joined_keys = kIsPaired<A> ? round_up(task.keys, kWidth) * task.padded / 2 : 0,
                rounded = kIsPaired<A> ? kBackwardFloats / 2 : 0;
  if (!workspace.reserve(3 * query_size + 2 * key_size + queries_size + 2 * keys_size + 2 * transposed +
                         2 * kBackwardFloats + 2 * joined_queries + joined_keys + 2 * rounded +
                         round_up(task.queries, kWidth) + 256))
    return false;
  Element* query_copy = workspace.take_as<Element>(query_size);
  Element* output_copy = workspace.take_as<Element>(query_size);
  Element* grad_output_copy = workspace.take_as<Element>(query_size);
  Element* key_copy = workspace.take_as<Element>(key_size);
  Element* value_copy = workspace.take_as<Element>(key_size);
  float* grad_query_copy = workspace.take(queries_size);
  float* grad_key_copy = workspace.take(keys_size);
  float* grad_value_copy = workspace.take(keys_size);
  Element* keys = workspace.take_as<Element>(transposed);
  Element* values = workspace.take_as<Element>(transposed);
  Element* query_pairs = workspace.take_as<Element>(joined_queries);
  Element* grad_output_pairs = workspace.take_as<Element>(joined_queries);
  Element* key_pairs = workspace.take_as<Element>(joined_keys);
  float* scores = workspace.take(kBackwardFloats);
  float* products = workspace.take(kBackwardFloats);
  uint32_t* across = workspace.take_as<uint32_t>(rounded);
  uint32_t* down = workspace.take_as<uint32_t>(rounded);
  float* deltas = workspace.take(round_up(task.queries, kWidth));
  const int64_t block = task.queries == 0 ? 1 : block_rows(kBackwardFloats, score_stride(task), task.queries);
  // All pairs count: the first ones need no zeros to be added to.
  const bool is_full = problem.left < 0 && problem.right < 0 && task.queries > 0 && task.keys > 0;
  for (; task.head < task.first_head + task.heads; ++task.head) {
    double bucket_sums[kIsPlain ? 1 : kSumChains * kMaxBuckets] = {};
    const auto rows_of = [&](const void* tensor, int64_t first, int64_t rows, int64_t most, Element* copy) {
      return read_rows<A>(head_of<T>(tensor, first, problem, task), rows, most, problem, task, copy);
    };
    const Operand<A> query = rows_of(problem.query, task.first_query, task.queries, kFewRows, query_copy),
                     grad_output = rows_of(problem.grad_output, task.first_query, task.queries, kFewRows,
                                           grad_output_copy),
                     key = rows_of(problem.key, task.first_key, task.keys, kFewRows, key_copy),
                     value = rows_of(problem.value, task.first_key, task.keys, kAnyRows, value_copy);
    transpose<A>(key, task.keys, task, keys);
    transpose<A>(value, task.keys, task, values);
    const bool reads_output = are_partial(problem, task) || are_zeros<A>(value, task.keys, task);
    if (reads_output)
      row_products(deltas, grad_output,
                   rows_of(problem.output, task.first_query, task.queries, kAnyRows, output_copy),
                   task.queries, steps_of<A>(task));
    T *grad_query_rows = head_of<T>(problem.grad_query, task.first_query, problem, task),
      *grad_key_rows = head_of<T>(problem.grad_key, task.first_key, problem, task),
      *grad_value_rows = head_of<T>(problem.grad_value, task.first_key, problem, task);
    const BackwardHead<A> head{query,
                               grad_output,
                               keys,
                               values,
                               over_rows<A>(query, task.queries, task, query_pairs),
                               over_rows<A>(key, task.keys, task, key_pairs),
                               over_rows<A>(grad_output, task.queries, task, grad_output_pairs),
                               reads_output ? deltas : nullptr,
                               make_target(grad_query_rows, problem, task, grad_query_copy),
                               make_target(grad_key_rows, problem, task, grad_key_copy),
                               make_target(grad_value_rows, problem, task, grad_value_copy),
                               !is_full,
                               scores,
                               products,
                               across,
                               down,
                               bucket_sums};
    if (!is_full) {
      fill_zeros(head.grad_query, task.queries, task);
      fill_zeros(head.grad_key, task.keys, task);
      fill_zeros(head.grad_value, task.keys, task);
    }
    for (int64_t row = 0; row < task.queries; row += block)
      backward_block<A, kIsPlain>(problem, task, head, row, smaller(block, task.queries - row), prefetch);
    write_rows(grad_query_rows, head.grad_query, task.queries, problem, task);
    write_rows(grad_key_rows, head.grad_key, task.keys, problem, task);
    write_rows(grad_value_rows, head.grad_value, task.keys, problem, task);
    if (!kIsPlain && bias_part != nullptr)
      for (int64_t bucket = 0; bucket < problem.buckets; ++bucket) {
        double sum = 0.0;
        for (int chain = 0; chain < kSumChains; ++chain) sum += bucket_sums[chain * kMaxBuckets + bucket];
        bias_part[task.head * problem.buckets + bucket] = static_cast<float>(sum);
      }
  }
  return true;
}

// What this item writes and what the next one reads.
template <class A, class T, bool kIsForward>
Prefetch make_prefetch(const FlashAttentionProblem& problem, const Task& task, int64_t next) {
  Prefetch prefetch;
  const int64_t row_bytes = problem.heads * problem.width * static_cast<int64_t>(sizeof(T));
  if (task.heads < problem.heads) return prefetch;  // a long sequence: arithmetic takes most of its time
  const auto add = [&](const void* tensor, int64_t first, int64_t rows) {
    if (rows > 0) prefetch.add(static_cast<const char*>(tensor) + first * row_bytes, rows * row_bytes);
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
    if (!kIsForward && are_partial(problem, coming)) add(problem.output, coming.first_query, coming.queries);
    if (!kIsForward) add(problem.grad_output, coming.first_query, coming.queries);
  }
  // With every row of softmax forward, with every register tile backward.
  const int64_t steps = kIsForward ? task.queries
                                   : 2 * count_tiles<A>(task.queries, task.keys) +
                                         count_tiles<A>(task.queries, task.width) +
                                         2 * count_tiles<A>(task.keys, task.width);
  prefetch.spread(steps * task.heads, INT64_MAX);
  return prefetch;
}

struct Run {
  const FlashAttentionProblem* problem;
  float* bias_parts;  // [sequences, heads, buckets]: gradients of the time_bias, or null
  Workspace workspaces[kMaxThreads];
  bool is_out_of_memory;  // set by any worker, read when all are done
};

template <class A, class T, bool kIsForward, bool kIsPlain>
void run_item(void* context, int64_t index, int worker) {
  Run& run = *static_cast<Run*>(context);
  if (__atomic_load_n(&run.is_out_of_memory, __ATOMIC_RELAXED)) return;
  const FlashAttentionProblem& problem = *run.problem;
  const FlashAttentionItem& item = problem.items[index];
  const Task task = make_task(problem, item);
  Workspace& workspace = run.workspaces[worker];
  Prefetch prefetch = make_prefetch<A, T, kIsForward>(problem, task, index + problem.threads);
  float* bias_part = nullptr;
  if (run.bias_parts != nullptr) bias_part = run.bias_parts + item.sequence * problem.heads * problem.buckets;
  A::begin_products();
  const bool is_done = kIsForward
                           ? forward_item<A, T, kIsPlain>(problem, task, workspace, prefetch)
                           : backward_item<A, T, kIsPlain>(problem, task, workspace, prefetch, bias_part);
  A::end_products();
  if (!is_done) __atomic_store_n(&run.is_out_of_memory, true, __ATOMIC_RELAXED);
}

template <bool kIsForward, bool kIsPlain>
auto item_function(DType dtype) {
#if defined(UBP_HAS_PAIRS)
  if (dtype == DType::kBFloat16) return &run_item<Pairs, BFloat16, kIsForward, kIsPlain>;
#else
  if (dtype == DType::kBFloat16) return &run_item<Floats, BFloat16, kIsForward, kIsPlain>;
#endif
  if (dtype == DType::kFloat16) return &run_item<Floats, Float16, kIsForward, kIsPlain>;
  return &run_item<Floats, float, kIsForward, kIsPlain>;
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
