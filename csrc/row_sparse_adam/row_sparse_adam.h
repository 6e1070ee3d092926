// Adam and AdamW for the touched rows of an embedding table.
//
// Without a gradient step s moves a row by its fading moments only, and shrinks it by keep_s = 1 - lr_s
// decay:
//
//   m <- beta1 m;   v <- beta2 v;   w <- keep_s w - rate_s m / (sqrt(v) root_s + eps)
//
// with rate_s = lr_s / (1 - beta1^s) and root_s = 1 / sqrt(1 - beta2^s). With K(a, b) the product of keep
// over the steps a + 1 .. b, q_s = beta2^((s - last) / 2) root_s and r = sqrt(v), all from the step the row
// is up to date with,
//
//   w_now = K(last, now) (w - m sum_s e_s / (r q_s + eps)),   e_s = rate_s beta1^(s - last) / K(last, s)
//
// and where eps is small beside r q_s, 1 / (r q_s + eps) is the series sum_p (-eps)^p / (r q_s)^(p + 1): the
// sums
//
//   tail_p(last) = sum_s e_s / q_s^(p + 1),
//   tail_p(last - 1) = beta1 beta2^(-(p + 1) / 2) / keep_last (rate_last / root_last^(p + 1) + tail_p(last))
//
// are numbers of the step, the same for every row. Elsewhere the sum is computed as it stands, up to the step
// from which on it adds less than 1e-12 of its first terms (horizon). Every row is computed alone: the same
// for any number of threads.
#pragma once

#include <cstdint>

namespace ubp {

constexpr int kAdamTerms = 6;
// The series errs by this to the power of kAdamTerms, 6e-8.
constexpr double kAdamRatio = 1.0 / 16;

// What brings rows to the present that are up to date with one step.
struct AdamTail {
  float terms[kAdamTerms];
  float kept;        // K(last, now)
  float least_root;  // the series holds where r is not below
};

struct AdamRows {
  float* weight;          // [rows, width]
  float* state;           // m and v of each slot, [slots, 2, width]
  int32_t* slot;          // [rows], of touched rows
  int32_t* last_step;     // [rows], -1: never touched (m = v = 0, weight as at step 0)
  const double* history;  // [now + 1, 3]: rate, root and keep of each step; entry 0 is not read
  int64_t rows, width, now;
};

// A dense optimizer in float32 multiplies by beta2 and 1 - beta2 as floats, which do not add up to 1.
struct AdamRule {
  double beta1, beta2, eps;
  float first_new, second_new;  // 1 - beta1, 1 - beta2
  int64_t horizon;
  const AdamTail* tails;  // [now + 1]
};

struct RowSparseAdamGather {
  AdamRows table;
  AdamRule rule;
  const int64_t* ids;  // [count]
  int64_t count;
  float* output;  // [count, width]
  int threads;
};

struct RowSparseAdamUpdate {
  AdamRows table;
  AdamRule rule;
  const int64_t* ids;  // [count], distinct
  int64_t count;
  const float* gradient;  // [count, width]
  float rate, root, keep;
  int threads;
};

struct RowSparseAdamCatchUp {
  AdamRows table;
  AdamRule rule;
  int threads;
};

using RowSparseAdamGatherFunction = void (*)(const RowSparseAdamGather&);
using RowSparseAdamUpdateFunction = void (*)(const RowSparseAdamUpdate&);
using RowSparseAdamCatchUpFunction = void (*)(const RowSparseAdamCatchUp&);

// Fills `tails` [now + 1] and returns the horizon. Not a kernel: compiled once.
int64_t adam_tails(const double* history, int64_t now, double beta1, double beta2, double eps,
                   AdamTail* tails);

}  // namespace ubp
