// Optimizer steps for the touched rows of an embedding table, equal to those of the dense optimizer to
// rounding.
//
// A row that got no gradient in the steps after `last` up to the present is brought to the present in one go
// when it is next read. Two rules say how. State of a row, two vectors, gets a slot, the next free one, with
// its first gradient, so that memory grows with the touched rows and rows in use lie close together. Every
// row is computed alone and its gradients are added in the order of the batch: the same for any number of
// threads.
//
// ScheduleFree: RAdamScheduleFree without weight decay. A row has only moved from y towards z, and its second
// moment has only decayed; history[k] is the product of (1 - c) over the steps 1 .. k:
//
//   catch up   y <- z + (y - z) history[now] / history[last];   v <- v beta2^(now - last)
//   update     v <- beta2 v + (1 - beta2) g^2;   d = g / (sqrt(v / bias_correction) + eps)
//              y <- z + (y - z) (1 - c) + gradient_weight d;      z <- z - learning_rate d
//
// Adam: Adam and AdamW. Without a gradient step s moves a row by its fading moments only, and shrinks it by
// keep_s = 1 - lr_s decay:
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
// from which on it adds less than 1e-12 of its first terms (horizon).
#pragma once

#include <cstdint>

namespace ubp {

struct RowTable {
  float* weight;          // [rows, width]
  float* state;           // of each slot, [slots, 2, width]: z and v, or m and v
  int32_t* slot;          // [rows], of touched rows
  int32_t* last_step;     // [rows], -1: never touched (weight as at step 0, z = weight, m = v = 0)
  const double* history;  // [now + 1], or for Adam [now + 1, 3]: rate, root, keep; its entry 0 is not read
  int64_t* used;          // [1] slots in use
  int64_t rows, width, now, slots;
};

struct ScheduleFree {
  struct Step {
    float learning_rate, average_weight, gradient_weight, bias_correction;
    bool is_adaptive;
  };
  double beta2;
  float eps;
  float toward_z;  // after a catch-up y moves by this share of z - y
};

constexpr int kAdamTerms = 6;
// The series errs by this to the power of kAdamTerms, 6e-8.
constexpr double kAdamRatio = 1.0 / 16;

// What brings rows to the present that are up to date with one step.
struct AdamTail {
  float terms[kAdamTerms];
  float kept;        // K(last, now)
  float least_root;  // the series holds where r is not below
};

// A dense optimizer in float32 multiplies by beta2 and 1 - beta2 as floats, which do not add up to 1.
struct Adam {
  struct Step {
    float rate, root, keep;
  };
  double beta1, beta2, eps;
  float first_new, second_new;  // 1 - beta1, 1 - beta2
  int64_t horizon;
  const AdamTail* tails;  // [now + 1]
};

template <class Rule>
struct RowSparseGather {
  RowTable table;
  Rule rule;
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

template <class Rule>
struct RowSparseUpdate {
  RowTable table;
  Rule rule;
  typename Rule::Step step;
  const int64_t* ids;  // [count], distinct
  int64_t count;
  const float* gradient;  // [count, width]
  int threads;
};

template <class Rule>
struct RowSparseCatchUp {
  RowTable table;
  Rule rule;
  int threads;
};

template <class Rule>
struct RowSparseRuleKernels {
  void (*gather)(const RowSparseGather<Rule>&);
  void (*update)(const RowSparseUpdate<Rule>&);
  void (*catch_up)(const RowSparseCatchUp<Rule>&);
};

struct RowSparseKernels {
  void (*reduce)(const RowSparseReduce&);
  RowSparseRuleKernels<ScheduleFree> schedule_free;
  RowSparseRuleKernels<Adam> adam;
};

// Sorts positions 0 .. count - 1 by id, stable, into order [count]; writes the ascending distinct ids
// [groups] and where each group starts, [groups + 1]. Returns the number of groups. Ids must not be negative.
int64_t group_ids(const int64_t* ids, int64_t count, int64_t* order, int64_t* distinct, int64_t* start);

// Fills `tails` [now + 1] and returns the horizon.
int64_t adam_tails(const double* history, int64_t now, double beta1, double beta2, double eps,
                   AdamTail* tails);

}  // namespace ubp
