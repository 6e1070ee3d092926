// Contrastive loss of N matched rows, without the matrix of similarities in memory.
//
//   s_ij = <a_i, b_j>   gap_ij = (s_ij - s_i,p(i)) / tau   loss_i = log(1 + sum_negatives exp(gap_ij))
//   p_ij = exp(gap_ij - loss_i)   sum_negatives p_ij = 1 - exp(-loss_i)
//
// Forms: cross (rows of left meet rows of right), symmetric (and rows of right meet left: the columns of the
// same matrix), simclr (all rows of both meet each other). Negatives of row i are the candidates with another
// id, so a row without ids has its own number as id.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ubp {

enum class NTXentForm : int { kCross = 0, kSymmetric = 1, kSimclr = 2 };

struct NTXentProblem {
  const void *left, *right;  // [rows, width]
  DType dtype;
  const int64_t* kept;  // [pairs] rows that take part, rising
  const int32_t* ids;   // [pairs], >= 0
  int64_t rows, pairs, width;
  NTXentForm form;
  bool has_ids;  // false: ids are the row numbers, only the diagonals need a look at them
  bool is_normalized;
  double temperature;
  int threads;
  double* losses;  // [pairs] for cross, else [2 pairs]; forward writes them, backward reads them
  // backward only
  const float* weight;           // [pairs]
  double factor;                 // of all gradients of rows
  void *grad_left, *grad_right;  // [rows, width]; only rows that take part are written
  double* moment;                // sum_i weight_i sum_j p_ij gap_ij
};

using NTXentFunction = void (*)(const NTXentProblem&);

}  // namespace ubp
