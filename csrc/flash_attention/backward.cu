// flash_attention backward in two kernels that compute the scores again, so that no two blocks write to the
// same place and results are the same every time: the first owns queries (delta, gradient of the queries, and
// parts of the gradient of time_bias), the second owns keys (gradients of keys and values).
#include <type_traits>

#include "flash_attention/device.h"

namespace ubp {
namespace {

// A weight exp(logit - lse). A row that saw nothing has lse -infinity, and logits to match.
template <class T>
__device__ __forceinline__ float weight_of(float logit, float lse) {
  return exponential<T>(logit - (lse == -INFINITY ? 0.0f : lse));
}

// delta = <dO, O> of the warp's rows. Returned for this lane's rows, stored for the keys' kernel.
template <class T, int kWidth>
__device__ __forceinline__ void compute_delta(const FlashAttentionDeviceProblem& problem, const Place& place,
                                              const T* grad, float (&delta)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, first = static_cast<int>(threadIdx.x) / 32 * 16;
  for (int row = 0; row < 16; ++row) {
    const int own = place.first_row + first + row;
    if (own >= place.own_count) break;
    const T* output = head_rows<T>(problem, problem.output, place.own_start + own, place.head);
    float sum = 0;
    for (int column = lane; column < problem.width; column += 32)
      sum = fmaf(to_float(grad[(first + row) * kTileStride<T, kWidth> + column]), to_float(output[column]),
                 sum);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (row == lane / 4) delta[0] = sum;
    if (row == lane / 4 + 8) delta[1] = sum;
    if (lane == 0) problem.delta[int64_t{place.own_start + own} * problem.heads + place.head] = sum;
  }
}

// Sums of the lanes' tables [warps, buckets, 32], always in the same order.
__device__ __forceinline__ void store_bias_part(const FlashAttentionDeviceProblem& problem,
                                                const Place& place, const float* tables) {
  float* target = problem.bias_parts + (int64_t{blockIdx.x} * problem.heads + place.head) * problem.buckets;
  __syncthreads();
  for (int bucket = static_cast<int>(threadIdx.x); bucket < problem.buckets;
       bucket += static_cast<int>(blockDim.x)) {
    float sum = 0;
    for (int warp = 0; warp < problem.warps; ++warp) {
      const float* table = tables + (warp * problem.buckets + bucket) * 32;
      for (int lane = 0; lane < 32; ++lane)
        sum += table[(lane + bucket) % 32];  // another bank for each thread
    }
    target[bucket] = sum;
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxWarps * 32) queries_kernel(const FlashAttentionDeviceProblem problem) {
  constexpr int kTiles = kOtherRows<T, kWidth> / 8, kStride = kTileStride<T, kWidth>;
  Place place;
  if (!find_place<true>(problem, place)) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32,
            own_rows = 16 * problem.warps;
  const int64_t stride = int64_t{problem.heads} * problem.width,
                first_row = place.own_start + place.first_row;

  T *own_query = reinterpret_cast<T*>(shared_memory()), *own_grad = own_query + own_rows * kStride;
  const OtherTiles<T, kWidth> tiles{own_grad + own_rows * kStride,
                                    head_rows<T>(problem, problem.key, place.other_start, place.head),
                                    head_rows<T>(problem, problem.value, place.other_start, place.head),
                                    place.other_count,
                                    problem.width,
                                    stride};
  constexpr int kStaging = kStagingNumbers<T, kOtherRows<T, kWidth>>;
  T* staging = tiles.memory + 4 * tiles.kNumbers + warp * kStaging;
  float* tables = reinterpret_cast<float*>(tiles.memory + 4 * tiles.kNumbers + problem.warps * kStaging);
  const int existing = place.own_count - place.first_row;
  load_tile<T, kWidth>(own_query, head_rows<T>(problem, problem.query, first_row, place.head), stride,
                       own_rows, existing, problem.width);
  load_tile<T, kWidth>(own_grad, head_rows<T>(problem, problem.grad_output, first_row, place.head), stride,
                       own_rows, existing, problem.width);
  commit_copies();
  float* table = tables + warp * problem.buckets * 32 + lane;
  if (problem.time_bias != nullptr)
    for (int bucket = 0; bucket < problem.buckets; ++bucket) table[bucket * 32] = 0;
  wait_copies<0>();
  __syncthreads();

  const LaneRows rows = lane_rows<true>(problem, place);
  const Range warp_seen = seen_by_rows<true>(problem, place, place.first_row + warp * 16, 16);
  const float* bias = problem.time_bias + place.head * problem.buckets;
  float grad_query[kWidth / 8][4] = {}, delta[2] = {}, lse[2] = {};
  compute_delta<T, kWidth>(problem, place, own_grad, delta);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (rows.row[half] < place.own_count)
      lse[half] = problem.lse[int64_t{place.own_start + rows.row[half]} * problem.heads + place.head];

  tiles.walk(seen_by_rows<true>(problem, place, place.first_row, own_rows), [&](int first, const T* keys,
                                                                                const T* values) {
    if (first > warp_seen.high || first + kTiles * 8 <= warp_seen.low) return;
    float score[kTiles][4] = {}, grad_weight[kTiles][4] = {};
    multiply_transposed<T, kWidth>(score, own_query + warp * 16 * kStride, keys);
    multiply_transposed<T, kWidth>(grad_weight, own_grad + warp * 16 * kStride, values);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        const int key = first + tile * 8 + lane % 4 * 2 + at % 2, half = at / 2;
        float grad_logit = 0;
        if (sees(rows.seen[half], key)) {
          float logit = score[tile][at] * problem.scale;
          int bucket = 0;
          if (problem.time_bias != nullptr) {
            bucket = bucket_of<true>(problem, place, rows, half, key);
            logit += bias[bucket];
          }
          const float factor = dropout_factor<true>(problem, place, rows, half, key);
          grad_logit = weight_of<T>(logit, lse[half]) * (factor * grad_weight[tile][at] - delta[half]);
          if (problem.time_bias != nullptr) table[bucket * 32] += grad_logit;
        }
        score[tile][at] = grad_logit;
      }
    }
    multiply<T, kWidth>(grad_query, score, keys, staging);
  });
  store_rows<T>(problem, place, rows, problem.grad_query, 0, grad_query, problem.scale, problem.scale);
  if (problem.time_bias != nullptr) store_bias_part(problem, place, tables);
}

// Columns of the gradients that one block of the keys' kernel sums up: more do not fit into its registers.
template <int kWidth>
constexpr int kGradColumns = kWidth < 128 ? kWidth : 128;

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxWarps * 32) keys_kernel(const FlashAttentionDeviceProblem problem) {
  constexpr int kTiles = kOtherRows<T, kWidth> / 8, kStride = kTileStride<T, kWidth>;
  Place place;
  if (!find_place<false>(problem, place)) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32,
            own_rows = 16 * problem.warps, first_column = static_cast<int>(blockIdx.z) * kGradColumns<kWidth>;
  const int64_t stride = int64_t{problem.heads} * problem.width,
                first_row = place.own_start + place.first_row;

  T *own_key = reinterpret_cast<T*>(shared_memory()), *own_value = own_key + own_rows * kStride;
  const OtherTiles<T, kWidth> tiles{own_value + own_rows * kStride,
                                    head_rows<T>(problem, problem.query, place.other_start, place.head),
                                    head_rows<T>(problem, problem.grad_output, place.other_start, place.head),
                                    place.other_count,
                                    problem.width,
                                    stride};
  T* staging = tiles.memory + 4 * tiles.kNumbers + warp * kStagingNumbers<T, kOtherRows<T, kWidth>>;
  const int existing = place.own_count - place.first_row;
  load_tile<T, kWidth>(own_key, head_rows<T>(problem, problem.key, first_row, place.head), stride, own_rows,
                       existing, problem.width);
  load_tile<T, kWidth>(own_value, head_rows<T>(problem, problem.value, first_row, place.head), stride,
                       own_rows, existing, problem.width);
  commit_copies();

  const LaneRows rows = lane_rows<false>(problem, place);
  const Range warp_seen = seen_by_rows<false>(problem, place, place.first_row + warp * 16, 16);
  const float* bias = problem.time_bias + place.head * problem.buckets;
  float grad_key[kGradColumns<kWidth> / 8][4] = {}, grad_value[kGradColumns<kWidth> / 8][4] = {};

  tiles.walk(seen_by_rows<false>(problem, place, place.first_row, own_rows), [&](int first, const T* queries,
                                                                                 const T* grads) {
    if (first > warp_seen.high || first + kTiles * 8 <= warp_seen.low) return;
    float score[kTiles][4] = {}, grad_weight[kTiles][4] = {};
    multiply_transposed<T, kWidth>(score, own_key + warp * 16 * kStride, queries);
    multiply_transposed<T, kWidth>(grad_weight, own_value + warp * 16 * kStride, grads);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        const int query = first + tile * 8 + lane % 4 * 2 + at % 2, half = at / 2;
        float dropped = 0, grad_logit = 0;
        if (sees(rows.seen[half], query)) {
          const int64_t statistic = int64_t{place.other_start + query} * problem.heads + place.head;
          float logit = score[tile][at] * problem.scale;
          if (problem.time_bias != nullptr)
            logit += bias[bucket_of<false>(problem, place, rows, half, query)];
          const float weight = weight_of<T>(logit, problem.lse[statistic]),
                      factor = dropout_factor<false>(problem, place, rows, half, query);
          dropped = weight * factor;
          grad_logit = weight * (factor * grad_weight[tile][at] - problem.delta[statistic]);
        }
        score[tile][at] = dropped;
        grad_weight[tile][at] = grad_logit;
      }
    }
    multiply<T, kWidth>(grad_value, score, grads + first_column, staging);
    multiply<T, kWidth>(grad_key, grad_weight, queries + first_column, staging);
  });
  wait_copies<0>();  // of the own tiles, where nothing was seen
  store_rows<T>(problem, place, rows, problem.grad_value, first_column, grad_value, 1.0f, 1.0f);
  store_rows<T>(problem, place, rows, problem.grad_key, first_column, grad_key, problem.scale, problem.scale);
}

template <class T, int kWidth, bool kOwnIsQuery>
const char* run_backward(const FlashAttentionDeviceProblem& problem, void* stream) {
  constexpr int kParts = kOwnIsQuery ? 1 : kWidth / kGradColumns<kWidth>;
  const int buckets = kOwnIsQuery && problem.time_bias != nullptr ? problem.buckets : 0;
  const dim3 grid(static_cast<unsigned>(problem.bound), static_cast<unsigned>(problem.heads), kParts);
  const int threads = problem.warps * 32, bytes = shared_bytes<T, kWidth>(2, problem.warps, buckets);
  if constexpr (kOwnIsQuery)
    return launch(&queries_kernel<T, kWidth>, grid, threads, bytes, stream, problem);
  else
    return launch(&keys_kernel<T, kWidth>, grid, threads, bytes, stream, problem);
}

}  // namespace

const char* flash_attention_backward_queries(const FlashAttentionDeviceProblem& problem, void* stream) {
  return with_type(problem.dtype, problem.width, [&](auto type, auto width) {
    return run_backward<decltype(type), decltype(width)::value, true>(problem, stream);
  });
}

const char* flash_attention_backward_keys(const FlashAttentionDeviceProblem& problem, void* stream) {
  return with_type(problem.dtype, problem.width, [&](auto type, auto width) {
    return run_backward<decltype(type), decltype(width)::value, false>(problem, stream);
  });
}

}  // namespace ubp
