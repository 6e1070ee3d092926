// Products of matrices in which no row knows the others: out = rows weight + bias, and a small network of
// pairs made of two such products. Every sum runs in the order of the inputs, whatever the number of rows.
#pragma once

#include <cstdint>

namespace ubp {

// All row-major; `Real` is float or double.
template <class Real>
struct RowProduct {
  const Real* rows;    // [count, inputs]
  const Real* weight;  // [inputs, outputs]
  const Real* bias;    // [outputs], null for none
  Real* out;           // [count, outputs]
  int64_t count, inputs, outputs;
};

// out[c, l] = last_bias + sum_v last_weight[v] max(0, bias[v] + sum_u weight[v, u] first[u])
// first[u]  = max(0, of_client[c, u] + of_label[u, l] + sum_j of_both[c, j, l] both_weight[j, u]
//                    + sum_i inputs[p, i] input_weight[i, u]), the last where a pair p is c's and l's.
struct PairNetwork {
  const float* of_client;     // [clients, first]
  const float* of_label;      // [first, labels]
  const float* of_both;       // [clients, both, labels]
  const float* both_weight;   // [both, first]
  const int64_t* offsets;     // [clients + 1] of the pairs
  const int32_t* label;       // [pairs], ascending for each client
  const float* inputs;        // [pairs, width]
  const float* input_weight;  // [width, first]
  const float* weight;        // [second, first]
  const float* bias;          // [second]
  const float* last_weight;   // [second]
  const float* last_bias;     // [1]
  float* out;                 // [clients, labels]
  int64_t clients, labels, both, width, first, second;
};

// Labels of a client that are computed at once: their units stay in a cache near the core.
constexpr int64_t kLabelsAtOnce = 128;

struct RowProductKernels {
  void (*of_floats)(const RowProduct<float>&);
  void (*of_doubles)(const RowProduct<double>&);
  void (*of_pairs)(const PairNetwork&, float* units);  // units: [2 first + second, kLabelsAtOnce]
};

}  // namespace ubp
