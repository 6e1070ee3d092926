// nt_xent on CUDA devices, as the host sees it; equations in nt_xent.h. All pointers are of the device.
//
// One launch works on a matrix of similarities of own rows with other rows: left with right, right with left,
// or all with all (simclr). Rows are numbered through [left; right], or [left; positive; right]: R of them.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ubp {

struct NTXentDeviceProblem {
  const void *own, *other;  // [own_rows, width], [other_rows, width], aligned to 16 bytes
  DType dtype;
  int own_rows, other_rows, own_first, other_first;
  int width;             // a multiple of 64
  const float* scales;   // [R] similarity of rows r and c = scales[r] scales[c] <row r, row c>
  const bool* valid;     // [R]; null: all
  const int32_t* group;  // [R]; rows of one group are no negatives of each other
  const int32_t* ids;    // [R]; nor are those with the same id; null: all differ
  const float* bias;     // [R] added to similarity / temperature, of queries that of their positives; null: 0
  const float* inverse_temperature;  // [1]
  int splits;                        // parts of the other rows, each with results of its own
  float* positives;  // [R]; the first launch writes those of own rows, each with the same other row
  // forward: largest gap to the positive, at least 0, and the sum of exp(gap - largest)
  float *largest, *sums;  // [splits, own_rows]
  // backward: gradients of the own rows by the negatives, and sum_c weight_r p_rc gap_rc
  const float *losses, *weights;  // [R], of the rows as queries; weight 0 where a row asks nothing
  float *grad, *moments;          // [splits, own_rows, width], [splits, own_rows]
};

enum class NTXentPass : int { kPositives = 0, kForward = 1, kBackward = 2 };

// Null, or what went wrong.
const char* nt_xent(NTXentPass pass, const NTXentDeviceProblem& problem, void* stream);

}  // namespace ubp
