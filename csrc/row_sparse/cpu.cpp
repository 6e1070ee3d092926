// CPU kernels of row_sparse. The loops over a row are plain so that the compiler vectorises them for each
// instruction set; what costs is the way to memory, so rows to come are asked for early.
#include <cmath>
#include <cstring>

#include "common/dispatch.h"
#include "common/simd.h"
#include "common/threads.h"

namespace ubp {
namespace {

constexpr int64_t kIdsPerItem = 64;
constexpr int64_t kTableRowsPerItem = 1024;
constexpr int64_t kAhead = 2;     // rows asked for before they are needed
constexpr int64_t kColumns = 64;  // of Adam, decided about together: series or sum

template <bool kWrites>
UBP_INLINE void prefetch_row(const float* row, int64_t width) {
  for (int64_t at = 0; at < width; at += 16) __builtin_prefetch(row + at, kWrites, 2);
}

UBP_INLINE float* state_of(const RowTable& table, int64_t id) {
  return table.state + table.slot[id] * 2 * table.width;
}

UBP_INLINE float power(double base, int64_t exponent) {
  return static_cast<float>(std::pow(base, static_cast<double>(exponent)));
}

// What is left of the weights of rows that were never touched.
UBP_INLINE float untouched_share(const ScheduleFree&) { return 1.f; }
UBP_INLINE float untouched_share(const Adam& rule) { return rule.tails[0].kept; }

UBP_INLINE float kept_share(const RowTable& table, int32_t last) {
  return static_cast<float>(table.history[table.now] / table.history[last]);
}

// The weights of a row at the present that is behind by some steps.
void bring_to_present(const RowTable& table, const ScheduleFree&, int32_t last, const float* __restrict y,
                      const float* __restrict z, float* __restrict output) {
  const float kept = kept_share(table, last);
  for (int64_t d = 0; d < table.width; ++d) output[d] = z[d] + (y[d] - z[d]) * kept;
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
void move_by_steps(const RowTable& table, const Adam& rule, int32_t last, const float* __restrict w,
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

// `output` may be `w`.
void bring_to_present(const RowTable& table, const Adam& rule, int32_t last, const float* w,
                      const float* state, float* output) {
  const AdamTail& tail = rule.tails[last];
  const float eps = static_cast<float>(rule.eps);
  float moved[kColumns];
  for (int64_t begin = 0; begin < table.width; begin += kColumns) {
    const int64_t count = smaller(kColumns, table.width - begin);
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

template <bool kIsAdaptive>
void schedule_free_step(const RowTable& table, const ScheduleFree& rule, const ScheduleFree::Step& step,
                        int32_t last, float* __restrict y, float* __restrict z, float* __restrict v,
                        const float* __restrict gradient) {
  if (last < 0) {
    for (int64_t d = 0; d < table.width; ++d) z[d] = y[d];
    for (int64_t d = 0; d < table.width; ++d) v[d] = 0.f;
  }
  const float kept = last < 0 ? 1.f : kept_share(table, last);
  const float share = kept * (1.f - step.average_weight);
  // A dense optimizer multiplies by beta2 as a float in every step; the power of any other number drifts.
  const float beta2 = static_cast<float>(rule.beta2);
  const float old_moment = last < 0 ? 0.f : power(beta2, table.now + 1 - last);
  const float new_moment = static_cast<float>(1.0 - rule.beta2);
  const float correction = 1.f / step.bias_correction, eps = rule.eps;
  const float z_rate = step.learning_rate, y_rate = step.gradient_weight;
  for (int64_t d = 0; d < table.width; ++d) {
    const float moment = v[d] * old_moment + new_moment * gradient[d] * gradient[d];
    const float direction =
        kIsAdaptive ? gradient[d] / (__builtin_sqrtf(moment * correction) + eps) : gradient[d];
    v[d] = moment;
    y[d] = z[d] + (y[d] - z[d]) * share + direction * y_rate;
    z[d] = z[d] - direction * z_rate;
  }
}

UBP_INLINE void step_row(const RowTable& table, const ScheduleFree& rule, const ScheduleFree::Step& step,
                         int32_t last, float* weight, float* state, const float* gradient) {
  if (step.is_adaptive)
    schedule_free_step<true>(table, rule, step, last, weight, state, state + table.width, gradient);
  else
    schedule_free_step<false>(table, rule, step, last, weight, state, state + table.width, gradient);
}

void step_row(const RowTable& table, const Adam& rule, const Adam::Step& step, int32_t last,
              float* __restrict w, float* __restrict state, const float* __restrict gradient) {
  const int64_t width = table.width;
  float* __restrict m = state;
  float* __restrict v = state + width;
  float first_kept = 1.f, second_kept = static_cast<float>(rule.beta2);
  if (last < 0) {
    for (int64_t d = 0; d < 2 * width; ++d) m[d] = 0.f;
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
    w[d] = w[d] * step.keep - step.rate * first / (__builtin_sqrtf(second) * step.root + eps);
  }
}

void catch_up_row(const RowTable& table, const ScheduleFree& rule, int32_t last, float* __restrict y,
                  float* __restrict state) {
  const float* __restrict z = state;
  float* __restrict v = state + table.width;
  if (last < table.now) {
    const float kept = kept_share(table, last);
    const float fade = power(static_cast<float>(rule.beta2), table.now - last);
    for (int64_t d = 0; d < table.width; ++d) {
      y[d] = z[d] + (y[d] - z[d]) * kept;
      v[d] *= fade;
    }
  }
  const float toward = rule.toward_z;
  if (toward != 0.f)
    for (int64_t d = 0; d < table.width; ++d) y[d] = y[d] + (z[d] - y[d]) * toward;
}

void catch_up_row(const RowTable& table, const Adam& rule, int32_t last, float* __restrict w,
                  float* __restrict m) {
  if (last == table.now) return;
  const int64_t width = table.width;
  bring_to_present(table, rule, last, w, m, w);
  const float first = power(rule.beta1, table.now - last), second = power(rule.beta2, table.now - last);
  for (int64_t d = 0; d < width; ++d) m[d] *= first;
  for (int64_t d = width; d < 2 * width; ++d) m[d] *= second;
}

template <class Rule>
void gather_item(void* context, int64_t item, int) {
  const auto& problem = *static_cast<const RowSparseGather<Rule>*>(context);
  const RowTable& table = problem.table;
  const int64_t begin = item * kIdsPerItem, end = smaller(begin + kIdsPerItem, problem.count);
  for (int64_t t = begin; t < end; ++t) {
    if (t + kAhead < end) {
      const int64_t next = problem.ids[t + kAhead];
      prefetch_row<false>(table.weight + next * table.width, table.width);
      if (table.last_step[next] >= 0) prefetch_row<false>(state_of(table, next), 2 * table.width);
    }
    const int64_t id = problem.ids[t];
    const float* __restrict weight = table.weight + id * table.width;
    float* __restrict output = problem.output + t * table.width;
    const int32_t last = table.last_step[id];
    if (last >= 0 && last < table.now) {
      bring_to_present(table, problem.rule, last, weight, state_of(table, id), output);
    } else {
      const float kept = last < 0 ? untouched_share(problem.rule) : 1.f;
      for (int64_t d = 0; d < table.width; ++d) output[d] = weight[d] * kept;
    }
  }
}

void reduce_item(void* context, int64_t item, int) {
  const RowSparseReduce& problem = *static_cast<const RowSparseReduce*>(context);
  const int64_t begin = item * kIdsPerItem, end = smaller(begin + kIdsPerItem, problem.groups);
  for (int64_t u = begin; u < end; ++u) {
    float* __restrict sums = problem.sums + u * problem.width;
    const int64_t first = problem.start[u];
    const float* __restrict row = problem.gradient + problem.order[first] * problem.stride;
    for (int64_t d = 0; d < problem.width; ++d) sums[d] = row[d];
    for (int64_t t = first + 1; t < problem.start[u + 1]; ++t) {
      const float* __restrict gradient = problem.gradient + problem.order[t] * problem.stride;
      for (int64_t d = 0; d < problem.width; ++d) sums[d] += gradient[d];
    }
  }
}

template <class Rule>
void update_item(void* context, int64_t item, int) {
  const auto& problem = *static_cast<const RowSparseUpdate<Rule>*>(context);
  const RowTable& table = problem.table;
  const int64_t begin = item * kIdsPerItem, end = smaller(begin + kIdsPerItem, problem.count);
  for (int64_t u = begin; u < end; ++u) {
    if (u + kAhead < end) {
      const int64_t next = problem.ids[u + kAhead];
      prefetch_row<true>(table.weight + next * table.width, table.width);
      prefetch_row<true>(state_of(table, next), 2 * table.width);
    }
    const int64_t id = problem.ids[u];
    step_row(table, problem.rule, problem.step, table.last_step[id], table.weight + id * table.width,
             state_of(table, id), problem.gradient + u * table.width);
    table.last_step[id] = static_cast<int32_t>(table.now + 1);
  }
}

template <class Rule>
void catch_up_item(void* context, int64_t item, int) {
  const auto& problem = *static_cast<const RowSparseCatchUp<Rule>*>(context);
  const RowTable& table = problem.table;
  const int64_t begin = item * kTableRowsPerItem, end = smaller(begin + kTableRowsPerItem, table.rows);
  const float kept = untouched_share(problem.rule);
  for (int64_t id = begin; id < end; ++id) {
    float* __restrict weight = table.weight + id * table.width;
    const int32_t last = table.last_step[id];
    if (last >= 0) {
      catch_up_row(table, problem.rule, last, weight, state_of(table, id));
      table.last_step[id] = 0;
    } else if (kept != 1.f) {
      for (int64_t d = 0; d < table.width; ++d) weight[d] *= kept;
    }
  }
}

template <class Problem>
void run(int64_t rows, int64_t rows_per_item, void (*task)(void*, int64_t, int), const Problem& problem) {
  parallel_for(ceil_div(rows, rows_per_item), problem.threads, task, const_cast<Problem*>(&problem));
}

template <class Rule>
RowSparseRuleKernels<Rule> kernels_of() {
  return {[](const RowSparseGather<Rule>& problem) {
            run(problem.count, kIdsPerItem, &gather_item<Rule>, problem);
          },
          [](const RowSparseUpdate<Rule>& problem) {
            run(problem.count, kIdsPerItem, &update_item<Rule>, problem);
          },
          [](const RowSparseCatchUp<Rule>& problem) {
            run(problem.table.rows, kTableRowsPerItem, &catch_up_item<Rule>, problem);
          }};
}

void reduce(const RowSparseReduce& problem) { run(problem.groups, kIdsPerItem, &reduce_item, problem); }

}  // namespace

namespace UBP_ISA_NAMESPACE {

RowSparseKernels row_sparse() { return {&reduce, kernels_of<ScheduleFree>(), kernels_of<Adam>()}; }

}  // namespace UBP_ISA_NAMESPACE
}  // namespace ubp
