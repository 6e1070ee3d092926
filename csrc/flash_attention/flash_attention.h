// Attention inside packed sequences, without the matrix of scores in memory.
//
//   forward    S = scale Q K^T;  lse_i = log sum_j exp(S_ij);  P_ij = exp(S_ij - lse_i);  O = P V
//   backward   delta_i = <dO_i, O_i>;  dS_ij = P_ij (<dO_i, V_j> - delta_i) scale
//              dQ = dS K;  dK = dS^T Q;  dV = P^T dO
//
// Query i of a sequence with q queries and k keys sees, when causal, keys j <= i + k - q (aligned at the
// end). A row that sees no key has output 0, lse -infinity and gives no gradient. Layout: [tokens, heads,
// width], contiguous; sequence b owns rows cu[b] .. cu[b + 1] - 1.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ubp {

struct FlashAttentionProblem {
  const void *query, *key, *value;
  const int32_t *cu_query, *cu_key;  // [sequences + 1]
  const int32_t* order;  // [sequences], the costly sequences first, so that the threads end together
  int64_t sequences, heads, width;
  DType dtype;
  bool is_causal;
  float scale;
  int threads;
  // forward writes these, backward reads them
  void* output;
  float* lse;  // [tokens, heads]
  // backward only
  const void* grad_output;
  void *grad_query, *grad_key, *grad_value;
};

using FlashAttentionFunction = void (*)(const FlashAttentionProblem&);

}  // namespace ubp
