// Attention inside packed sequences, without the matrix of scores in memory.
//
//   forward    S = scale Q K^T + bias;  lse_i = log sum_j exp(S_ij);  P_ij = exp(S_ij - lse_i);  O = (P * M)
//   V backward   delta_i = <dO_i, O_i>;  dS_ij = P_ij (M_ij <dO_i, V_j> - delta_i)
//              delta_i is also sum_j P_ij M_ij <dO_i, V_j>, where all of a row are at hand
//              dQ = scale dS K;  dK = scale dS^T Q;  dV = (P * M)^T dO;  dbias = sums of dS by bucket
//
// Query i of a sequence with q queries and k keys has the place i + k - q (aligned at the end) and sees the
// keys from place - left to place + right. A row that sees no key has output 0, lse -infinity and gives no
// gradient. M is the mask of dropout: Philox of (key row, query row, head, 0). Layout: [tokens, heads,
// width], contiguous; sequence b owns rows cu[b] .. cu[b + 1] - 1.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ubp {

// Some heads of one sequence: what one thread takes at a time.
struct FlashAttentionItem {
  int32_t sequence, first_head, heads;
};

struct FlashAttentionProblem {
  const void *query, *key, *value;
  const int32_t *cu_query, *cu_key;  // [sequences + 1]
  int64_t query_tokens, key_tokens;
  const FlashAttentionItem* items;
  int64_t item_count, sequences, heads, width;
  DType dtype;
  int64_t left, right;  // negative: all keys
  float scale;
  // time between query and key; null when there is none
  const float* time_bias;                    // [heads, buckets]
  const int64_t *query_time_s, *key_time_s;  // [tokens]
  int64_t buckets;
  // dropout: a weight stays where its random word is at least `threshold`; 0 drops nothing
  uint32_t threshold;
  float keep_factor;
  uint64_t seed;
  int64_t first_query_row, first_key_row;  // added to the numbers of rows that the words depend on
  int threads;
  // forward writes these, backward reads them
  void* output;
  float* lse;  // [tokens, heads]
  // backward only
  const void* grad_output;
  void *grad_query, *grad_key, *grad_value;
  float* grad_time_bias;  // [heads, buckets]
};

using FlashAttentionFunction = void (*)(const FlashAttentionProblem&);

}  // namespace ubp
