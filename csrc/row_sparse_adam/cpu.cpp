// CPU kernels of row_sparse_adam. Loops over a row are plain so that the compiler vectorises them for each
// instruction set; rows to come are asked for early.
#include <cmath>
#include <cstring>

#include "common/dispatch.h"
#include "common/simd.h"
#include "common/threads.h"

#define UBP_JOIN_(a, b) a##b
#define UBP_JOIN(a, b) UBP_JOIN_(a, b)

namespace ubp {
namespace {

constexpr int64_t kIdsPerItem = 64;
constexpr int64_t kTableRowsPerItem = 1024;
constexpr int64_t kAhead = 2;     // rows asked for before they are needed
constexpr int64_t kColumns = 64;  // decided about together: series or sum

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <bool kWrites>
UBP_INLINE void ask_for(const float* row, int64_t width) {
  for (int64_t at = 0; at < width; at += 16) __builtin_prefetch(row + at, kWrites, 2);
}

UBP_INLINE float* state_of(const AdamRows& table, int64_t id) {
  return table.state + table.slot[id] * 2 * table.width;
}

UBP_INLINE float power(double base, int64_t exponent) {
  return static_cast<float>(std::pow(base, static_cast<double>(exponent)));
}

// The series for `count` columns.
UBP_INLINE void move_by_series(const AdamTail& tail, float eps, const float* __restrict w,
                               const float* __restrict m, const float* __restrict v, float* __restrict output,
                               int64_t count) {
  for (int64_t d = 0; d < count; ++d) {
    const float inverse = m[d] != 0.f ? 1.f / __builtin_sqrtf(v[d]) : 0.f, ratio = eps * inverse;
    float sum = tail.terms[kAdamTerms - 1];
#pragma GCC unroll 8
    for (int term = kAdamTerms - 2; term >= 0; --term) sum = tail.terms[term] - ratio * sum;
    output[d] = tail.kept * (w[d] - m[d] * inverse * sum);
  }
}

// The sum step by step, for at most kColumns columns.
void move_by_steps(const AdamRows& table, const AdamRule& rule, int32_t last, const float* __restrict w,
                   const float* __restrict m, const float* __restrict v, float* __restrict output,
                   int64_t count) {
  float moved[kColumns] = {}, root[kColumns];
  for (int64_t d = 0; d < count; ++d) root[d] = __builtin_sqrtf(v[d]);
  const double root_decay = std::sqrt(rule.beta2);
  const float eps = static_cast<float>(rule.eps);
  const int64_t end = table.now - last < rule.horizon ? table.now : last + rule.horizon;
  double numerator = 1.0, denominator = 1.0;
  for (int64_t step = last + 1; step <= end; ++step) {
    const double* numbers = table.history + 3 * step;
    numerator *= rule.beta1 / numbers[2];
    denominator *= root_decay;
    const float up = static_cast<float>(numerator * numbers[0]);
    const float down = static_cast<float>(denominator * numbers[1]);
    for (int64_t d = 0; d < count; ++d) moved[d] += up * m[d] / (down * root[d] + eps);
  }
  for (int64_t d = 0; d < count; ++d) output[d] = rule.tails[last].kept * (w[d] - moved[d]);
}

// The weights of a touched row at the present; `output` may be `w`.
void bring_to_present(const AdamRows& table, const AdamRule& rule, int32_t last, const float* w,
                      const float* state, float* output) {
  const AdamTail& tail = rule.tails[last];
  const float eps = static_cast<float>(rule.eps);
  float moved[kColumns];
  for (int64_t begin = 0; begin < table.width; begin += kColumns) {
    const int64_t count = begin + kColumns < table.width ? kColumns : table.width - begin;
    const float *m = state + begin, *v = state + table.width + begin;
    int needs_steps = 0;
    for (int64_t d = 0; d < count; ++d)
      needs_steps |= (m[d] != 0.f) & !(__builtin_sqrtf(v[d]) >= tail.least_root);
    if (needs_steps)
      move_by_steps(table, rule, last, w + begin, m, v, moved, count);
    else
      move_by_series(tail, eps, w + begin, m, v, moved, count);
    std::memcpy(output + begin, moved, count * sizeof(float));
  }
}

void gather_item(void* context, int64_t item, int) {
  const RowSparseAdamGather& problem = *static_cast<const RowSparseAdamGather*>(context);
  const AdamRows& table = problem.table;
  const int64_t begin = item * kIdsPerItem, width = table.width;
  const int64_t end = begin + kIdsPerItem < problem.count ? begin + kIdsPerItem : problem.count;
  for (int64_t t = begin; t < end; ++t) {
    if (t + kAhead < end) {
      const int64_t next = problem.ids[t + kAhead];
      ask_for<false>(table.weight + next * width, width);
      if (table.last_step[next] >= 0) ask_for<false>(state_of(table, next), 2 * width);
    }
    const int64_t id = problem.ids[t];
    const float* __restrict weight = table.weight + id * width;
    float* __restrict output = problem.output + t * width;
    const int32_t last = table.last_step[id];
    if (last >= 0 && last < table.now) {
      bring_to_present(table, problem.rule, last, weight, state_of(table, id), output);
    } else {
      const float kept = last < 0 ? problem.rule.tails[0].kept : 1.f;
      for (int64_t d = 0; d < width; ++d) output[d] = weight[d] * kept;
    }
  }
}

void update_row(const RowSparseAdamUpdate& problem, int64_t id, const float* __restrict gradient) {
  const AdamRows& table = problem.table;
  const AdamRule& rule = problem.rule;
  const int64_t width = table.width;
  float* __restrict w = table.weight + id * width;
  float* __restrict m = state_of(table, id);
  float* __restrict v = m + width;
  const int32_t last = table.last_step[id];
  float first_kept = 1.f, second_kept = static_cast<float>(rule.beta2);
  if (last < 0) {
    std::memset(m, 0, 2 * width * sizeof(float));
    const float kept = rule.tails[0].kept;
    for (int64_t d = 0; d < width; ++d) w[d] *= kept;
  } else if (last < table.now) {
    bring_to_present(table, rule, last, w, m, w);
    first_kept = power(rule.beta1, table.now - last);
    second_kept = power(rule.beta2, table.now + 1 - last);
  }
  const float first_new = rule.first_new, second_new = rule.second_new;
  const float eps = static_cast<float>(rule.eps);
  for (int64_t d = 0; d < width; ++d) {
    const float old = m[d] * first_kept;
    const float first = old + first_new * (gradient[d] - old);
    const float second = v[d] * second_kept + second_new * gradient[d] * gradient[d];
    m[d] = first;
    v[d] = second;
    w[d] = w[d] * problem.keep - problem.rate * first / (__builtin_sqrtf(second) * problem.root + eps);
  }
  table.last_step[id] = static_cast<int32_t>(table.now + 1);
}

void update_item(void* context, int64_t item, int) {
  const RowSparseAdamUpdate& problem = *static_cast<const RowSparseAdamUpdate*>(context);
  const AdamRows& table = problem.table;
  const int64_t begin = item * kIdsPerItem;
  const int64_t end = begin + kIdsPerItem < problem.count ? begin + kIdsPerItem : problem.count;
  for (int64_t u = begin; u < end; ++u) {
    if (u + kAhead < end) {
      const int64_t next = problem.ids[u + kAhead];
      ask_for<true>(table.weight + next * table.width, table.width);
      ask_for<true>(state_of(table, next), 2 * table.width);
    }
    update_row(problem, problem.ids[u], problem.gradient + u * table.width);
  }
}

void catch_up_item(void* context, int64_t item, int) {
  const RowSparseAdamCatchUp& problem = *static_cast<const RowSparseAdamCatchUp*>(context);
  const AdamRows& table = problem.table;
  const AdamRule& rule = problem.rule;
  const int64_t begin = item * kTableRowsPerItem, width = table.width;
  const int64_t end = begin + kTableRowsPerItem < table.rows ? begin + kTableRowsPerItem : table.rows;
  for (int64_t id = begin; id < end; ++id) {
    float* __restrict w = table.weight + id * width;
    const int32_t last = table.last_step[id];
    if (last < 0) {
      const float kept = rule.tails[0].kept;
      if (kept != 1.f)
        for (int64_t d = 0; d < width; ++d) w[d] *= kept;
      continue;
    }
    if (last < table.now) {
      float* __restrict m = state_of(table, id);
      bring_to_present(table, rule, last, w, m, w);
      const float first = power(rule.beta1, table.now - last), second = power(rule.beta2, table.now - last);
      for (int64_t d = 0; d < width; ++d) m[d] *= first;
      for (int64_t d = width; d < 2 * width; ++d) m[d] *= second;
    }
    table.last_step[id] = 0;
  }
}

template <class Problem>
void* context_of(const Problem& problem) {
  return const_cast<Problem*>(&problem);
}

}  // namespace

namespace UBP_JOIN(isa_, UBP_ISA) {

void row_sparse_adam_gather(const RowSparseAdamGather& problem) {
  parallel_for(ceil_div(problem.count, kIdsPerItem), problem.threads, &gather_item, context_of(problem));
}

void row_sparse_adam_update(const RowSparseAdamUpdate& problem) {
  parallel_for(ceil_div(problem.count, kIdsPerItem), problem.threads, &update_item, context_of(problem));
}

void row_sparse_adam_catch_up(const RowSparseAdamCatchUp& problem) {
  parallel_for(ceil_div(problem.table.rows, kTableRowsPerItem), problem.threads, &catch_up_item,
               context_of(problem));
}

}  // namespace UBP_JOIN(isa_,UBP_ISA)
}  // namespace ubp
