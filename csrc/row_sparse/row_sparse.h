// RAdamScheduleFree (no weight decay) for the touched rows of an embedding table.
//
// A row that got no gradient in the steps after `last` up to the present has only moved from y towards z, and
// its second moment has only decayed:
//
//   catch up   y <- z + (y - z) retained[now] / retained[last];   v <- v beta2^(now - last)
//   update     v <- beta2 v + (1 - beta2) g^2;   d = g / (sqrt(v / bias_correction) + eps)
//              y <- z + (y - z) (1 - c) + gradient_weight d;      z <- z - learning_rate d
//
// A row never touched has last = -1: y = z, v = 0. z and v of a row get a slot, the next free one, with its
// first gradient, so that memory grows with the touched rows and rows in use lie close together. Every row is
// computed alone and its gradients are added in the order of the batch: the same for any number of threads.
#pragma once

#include <cstdint>

namespace ubp {

struct ScheduleFreeRows {
  float* weight;           // y, [rows, width]
  float* state;            // z and v of each slot, [slots, 2, width]
  int32_t* slot;           // [rows], of touched rows
  int32_t* last_step;      // [rows], -1: never touched
  const double* retained;  // [now + 1]
  int64_t rows, width, now;
};

struct RowSparseGather {
  ScheduleFreeRows table;
  const int64_t* ids;  // [count]
  int64_t count;
  float* output;  // [count, width]
  int threads;
};

// Rows of the gradient with the same id, grouped: group u is order[start[u]] .. order[start[u + 1] - 1].
struct RowSparseReduce {
  const int64_t *start, *order;  // [groups + 1], [count]
  int64_t groups, width, stride;
  const float* gradient;  // [count, width], rows `stride` apart
  float* sums;            // [groups, width]
  int threads;
};

struct RowSparseUpdate {
  ScheduleFreeRows table;
  const int64_t* ids;  // [count], distinct
  int64_t count;
  const float* gradient;  // [count, width]
  double beta2;
  float learning_rate, average_weight, gradient_weight, bias_correction, eps;
  bool is_adaptive;
  int threads;
};

struct RowSparseCatchUp {
  ScheduleFreeRows table;
  double beta2;
  float toward_z;
  int threads;
};

using RowSparseGatherFunction = void (*)(const RowSparseGather&);
using RowSparseReduceFunction = void (*)(const RowSparseReduce&);
using RowSparseUpdateFunction = void (*)(const RowSparseUpdate&);
using RowSparseCatchUpFunction = void (*)(const RowSparseCatchUp&);

}  // namespace ubp
