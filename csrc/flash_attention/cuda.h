// flash_attention on CUDA devices, as the host sees it; equations in flash_attention.h. All pointers are of
// the device. Rows of query, key, value, grad_output and of the results start at multiples of 16 bytes, so
// `width` is a multiple of 8 (4 for float).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ubp {

struct FlashAttentionDeviceProblem {
  const void *query, *key, *value;
  const int32_t *cu_query, *cu_key;  // [sequences + 1]
  // The tiles (of queries; of keys for flash_attention_backward_keys) of the sequences follow each other, the
  // longest sequence first: sequence order[s] has the tiles first_tile[s] .. first_tile[s + 1] - 1. `bound`
  // is at least first_tile[sequences], which only the device knows.
  const int32_t *order, *first_tile;
  int64_t bound;
  int warps;  // a tile has 16 rows for each
  int sequences, heads, width;
  DType dtype;
  int64_t left, right;  // negative: all keys
  float scale;
  const float* time_bias;                    // [heads, buckets], null: none
  const int64_t *query_time_s, *key_time_s;  // [tokens]
  int buckets;
  uint32_t threshold;  // of dropout, 0: none
  float keep_factor;
  const uint64_t* seed;  // of dropout, then numbers of the first query and the first key row; null: none
  void* output;
  float* lse;               // [tokens, heads]
  const void* grad_output;  // backward only, as all below
  float* delta;             // [tokens, heads], written by the queries' kernel, read by the keys'
  void *grad_query, *grad_key, *grad_value;
  float* bias_parts;  // [bound, heads, buckets], zeros; the gradient of time_bias is their sum
};

enum class FlashAttentionPass : int { kForward = 0, kBackwardQueries = 1, kBackwardKeys = 2 };

// Warps of a block for tiles of `rows` rows, fewer where shared memory wants it; and the launch of a pass on
// `stream`, which returns null or what went wrong.
int flash_attention_warps(FlashAttentionPass pass, DType dtype, int width, int buckets, int rows);
const char* flash_attention_forward(const FlashAttentionDeviceProblem& problem, void* stream);
const char* flash_attention_backward_queries(const FlashAttentionDeviceProblem& problem, void* stream);
const char* flash_attention_backward_keys(const FlashAttentionDeviceProblem& problem, void* stream);

}  // namespace ubp
