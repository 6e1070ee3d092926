// CPU kernels of row_sparse. The loops over a row are plain so that the compiler vectorises them for each
// instruction set; what costs is the way to memory, so rows to come are asked for early.
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
constexpr int64_t kAhead = 2;  // rows asked for before they are needed

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <bool kWrites>
UBP_INLINE void ask_for(const float* row, int64_t width) {
  for (int64_t at = 0; at < width; at += 16) __builtin_prefetch(row + at, kWrites, 2);
}

UBP_INLINE float kept_share(const ScheduleFreeRows& table, int32_t last) {
  return static_cast<float>(table.retained[table.now] / table.retained[last]);
}

// A dense optimizer multiplies by beta2 as a float in every step; the power of any other number drifts away.
UBP_INLINE float decay(float beta2, int64_t steps) {
  return static_cast<float>(std::pow(static_cast<double>(beta2), static_cast<double>(steps)));
}

UBP_INLINE float* state_of(const ScheduleFreeRows& table, int64_t id) {
  return table.state + table.slot[id] * 2 * table.width;
}

void gather_row(const ScheduleFreeRows& table, int64_t id, float* __restrict output) {
  const float* __restrict weight = table.weight + id * table.width;
  const int32_t last = table.last_step[id];
  if (last < 0 || last == table.now) {
    std::memcpy(output, weight, table.width * sizeof(float));
    return;
  }
  const float* __restrict z = state_of(table, id);
  const float kept = kept_share(table, last);
  for (int64_t d = 0; d < table.width; ++d) output[d] = z[d] + (weight[d] - z[d]) * kept;
}

void gather_item(void* context, int64_t item, int) {
  const RowSparseGather& problem = *static_cast<const RowSparseGather*>(context);
  const ScheduleFreeRows& table = problem.table;
  const int64_t begin = item * kIdsPerItem;
  const int64_t end = begin + kIdsPerItem < problem.count ? begin + kIdsPerItem : problem.count;
  for (int64_t t = begin; t < end; ++t) {
    if (t + kAhead < end) {
      const int64_t next = problem.ids[t + kAhead];
      ask_for<false>(table.weight + next * table.width, table.width);
      if (table.last_step[next] >= 0) ask_for<false>(state_of(table, next), table.width);
    }
    gather_row(table, problem.ids[t], problem.output + t * table.width);
  }
}

void reduce_item(void* context, int64_t item, int) {
  const RowSparseReduce& problem = *static_cast<const RowSparseReduce*>(context);
  const int64_t begin = item * kIdsPerItem;
  const int64_t end = begin + kIdsPerItem < problem.groups ? begin + kIdsPerItem : problem.groups;
  for (int64_t u = begin; u < end; ++u) {
    float* __restrict sums = problem.sums + u * problem.width;
    const int64_t first = problem.start[u];
    std::memcpy(sums, problem.gradient + problem.order[first] * problem.stride,
                problem.width * sizeof(float));
    for (int64_t t = first + 1; t < problem.start[u + 1]; ++t) {
      const float* __restrict gradient = problem.gradient + problem.order[t] * problem.stride;
      for (int64_t d = 0; d < problem.width; ++d) sums[d] += gradient[d];
    }
  }
}

template <bool kIsAdaptive>
void update_row(const RowSparseUpdate& problem, int64_t id, const float* __restrict gradient) {
  const ScheduleFreeRows& table = problem.table;
  float* __restrict y = table.weight + id * table.width;
  float* __restrict z = state_of(table, id);
  float* __restrict v = z + table.width;
  const int32_t last = table.last_step[id];
  if (last < 0) {
    std::memcpy(z, y, table.width * sizeof(float));
    std::memset(v, 0, table.width * sizeof(float));
  }
  const float kept = last < 0 ? 1.f : kept_share(table, last);
  const float share = kept * (1.f - problem.average_weight);
  const float beta2 = static_cast<float>(problem.beta2);
  const float old_moment = last < 0 ? 0.f : decay(beta2, table.now + 1 - last);
  const float new_moment = static_cast<float>(1.0 - problem.beta2);
  const float correction = 1.f / problem.bias_correction, eps = problem.eps;
  const float z_rate = problem.learning_rate, y_rate = problem.gradient_weight;
  for (int64_t d = 0; d < table.width; ++d) {
    const float moment = v[d] * old_moment + new_moment * gradient[d] * gradient[d];
    const float direction =
        kIsAdaptive ? gradient[d] / (__builtin_sqrtf(moment * correction) + eps) : gradient[d];
    v[d] = moment;
    y[d] = z[d] + (y[d] - z[d]) * share + direction * y_rate;
    z[d] = z[d] - direction * z_rate;
  }
  table.last_step[id] = static_cast<int32_t>(table.now + 1);
}

void update_item(void* context, int64_t item, int) {
  const RowSparseUpdate& problem = *static_cast<const RowSparseUpdate*>(context);
  const ScheduleFreeRows& table = problem.table;
  const int64_t begin = item * kIdsPerItem;
  const int64_t end = begin + kIdsPerItem < problem.count ? begin + kIdsPerItem : problem.count;
  for (int64_t u = begin; u < end; ++u) {
    if (u + kAhead < end) {
      const int64_t next = problem.ids[u + kAhead];
      ask_for<true>(table.weight + next * table.width, table.width);
      ask_for<true>(state_of(table, next), 2 * table.width);
    }
    const float* gradient = problem.gradient + u * table.width;
    if (problem.is_adaptive)
      update_row<true>(problem, problem.ids[u], gradient);
    else
      update_row<false>(problem, problem.ids[u], gradient);
  }
}

void catch_up_item(void* context, int64_t item, int) {
  const RowSparseCatchUp& problem = *static_cast<const RowSparseCatchUp*>(context);
  const ScheduleFreeRows& table = problem.table;
  const int64_t begin = item * kTableRowsPerItem;
  const int64_t end = begin + kTableRowsPerItem < table.rows ? begin + kTableRowsPerItem : table.rows;
  const float toward = problem.toward_z;
  for (int64_t id = begin; id < end; ++id) {
    const int32_t last = table.last_step[id];
    if (last < 0) continue;
    float* __restrict y = table.weight + id * table.width;
    const float* __restrict z = state_of(table, id);
    float* __restrict v = state_of(table, id) + table.width;
    if (last < table.now) {
      const float kept = kept_share(table, last);
      const float fade = decay(static_cast<float>(problem.beta2), table.now - last);
      for (int64_t d = 0; d < table.width; ++d) {
        y[d] = z[d] + (y[d] - z[d]) * kept;
        v[d] *= fade;
      }
    }
    if (toward != 0.f)
      for (int64_t d = 0; d < table.width; ++d) y[d] = y[d] + (z[d] - y[d]) * toward;
    table.last_step[id] = 0;
  }
}

template <class Problem>
void* context_of(const Problem& problem) {
  return const_cast<Problem*>(&problem);
}

}  // namespace

namespace UBP_JOIN(isa_, UBP_ISA) {

void row_sparse_gather(const RowSparseGather& problem) {
  parallel_for(ceil_div(problem.count, kIdsPerItem), problem.threads, &gather_item, context_of(problem));
}

void row_sparse_reduce(const RowSparseReduce& problem) {
  parallel_for(ceil_div(problem.groups, kIdsPerItem), problem.threads, &reduce_item, context_of(problem));
}

void row_sparse_update(const RowSparseUpdate& problem) {
  parallel_for(ceil_div(problem.count, kIdsPerItem), problem.threads, &update_item, context_of(problem));
}

void row_sparse_catch_up(const RowSparseCatchUp& problem) {
  parallel_for(ceil_div(problem.table.rows, kTableRowsPerItem), problem.threads, &catch_up_item,
               context_of(problem));
}

}  // namespace UBP_JOIN(isa_,UBP_ISA)
}  // namespace ubp
