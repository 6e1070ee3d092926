// Contrastive loss of N matched rows, without the matrix of similarities in memory.
//
//   d_ij = <a_i, b_j>   gap_ij = (d_ij - d_i,p(i)) / tau   loss_i = log(1 + sum_negatives exp(gap_ij))
//   p_ij = exp(gap_ij - loss_i)   sum_negatives p_ij = 1 - exp(-loss_i)
//
// `rows` holds left, then right. Forms: cross (rows of left meet right), symmetric (and rows of right meet
// left: the columns of the same matrix), simclr (all 2N rows meet each other). Negatives of row i are the
// candidates with another id, so a row without ids has its own number as id.
#pragma once

#include <cstdint>

namespace ubp {

enum class NTXentForm : int { kCross = 0, kSymmetric = 1, kSimclr = 2 };

struct NTXentProblem {
  const float* rows;   // [2 pairs, stride], columns from `width` on are 0
  const int32_t* ids;  // [pairs], >= 0
  int64_t pairs, width, stride;
  NTXentForm form;
  bool has_ids;  // false: ids are the row numbers, only the diagonals need a look at them
  double temperature;
  int threads;
  double* losses;  // [pairs] for cross, else [2 pairs]; forward writes them, backward reads them
  // backward only
  const float* weight;  // [pairs]
  float* grad_rows;     // [2 pairs, stride]: sum_ij weight dloss / d d_ij, times temperature
  double* moment;       // sum_i weight_i sum_j p_ij gap_ij
};

using NTXentFunction = void (*)(const NTXentProblem&);

}  // namespace ubp
