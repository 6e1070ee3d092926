// Contrastive loss of rows of left among rows of right, without the matrix of similarities in memory.
//
//   s_ij = <a_i, b_j>   gap_ij = (s_ij - s_i,p(i)) / tau + bias_j - bias_p(i)
//   loss_i = log(1 + sum_negatives exp(gap_ij))
//   p_ij = exp(gap_ij - loss_i)
//
// Where right holds some of the candidates only, losses are those of all: backward then adds up over the
// parts, each with the shares of its negatives, which are 1 - exp(-loss_i) together.
//
// Forms: cross (rows of left meet rows of right), symmetric (and rows of right meet left: the columns of the
// same matrix), simclr (all rows of both meet each other). Row i of right is the positive of row i of left,
// or, for cross, row i of `positive`. Negatives of row i are the candidates with another id but the one at
// its place, so matched rows without ids have their own number as id.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ubp {

enum class NTXentForm : int { kCross = 0, kSymmetric = 1, kSimclr = 2 };

struct NTXentProblem {
  const void *left, *right;  // [left_rows, width], [right_rows, width]
  const void* positive;      // [left_rows, width]; null: matched rows, both sides alike in all numbers
  DType dtype;
  const int64_t *left_kept, *right_kept;  // [left_count], [right_count] rows that take part, rising
  const int32_t *left_ids, *right_ids;    // of these rows, >= 0
  int64_t left_rows, right_rows, left_count, right_count, width;
  NTXentForm form;
  bool has_ids;  // false: matched ids are the row numbers, others all differ
  // With `positive` only; counted among the rows that take part.
  const int32_t* places;                     // [left_count] candidate that is no negative, -1: none
  const double *right_bias, *positive_bias;  // [right_count], [left_count]; null: 0
  bool is_normalized;
  double temperature;
  int threads;
  double* losses;  // [left_count] for cross, else [2 left_count]; forward writes them, backward reads them
  // backward only
  const float* weight;                           // as losses
  const double* shares;                          // as losses: sum_negatives p_ij
  double factor;                                 // of all gradients of rows
  void *grad_left, *grad_right, *grad_positive;  // as the rows; only those that take part are written
  double* moment;                                // sum_i weight_i sum_j p_ij (s_ij - s_i,p(i)) / tau
};

using NTXentFunction = void (*)(const NTXentProblem&);

}  // namespace ubp
