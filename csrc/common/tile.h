// Products of tiles in shared memory, for one warp: 16 rows of its own against 8 kTiles rows or columns.
// Numbers of 16 bits go through the tensor cores with sums in float; float goes through fused multiply-adds,
// each lane computing its own numbers of the tensor cores' layout (device.h), so that the kernels need not
// know.
#pragma once

#include "common/device.h"

namespace ubp {

// Rows end with 16 bytes more than they hold: eight rows then start in different banks.
template <class T, int kWidth>
constexpr int kTileStride = kWidth + 16 / static_cast<int>(sizeof(T));

template <class T, int kWidth>
constexpr int tile_bytes(int rows) {
  return rows * kTileStride<T, kWidth> * static_cast<int>(sizeof(T));
}

// Numbers per warp that `multiply` wants to pass its weights between lanes.
template <class T, int kColumns>
constexpr int kStagingNumbers = sizeof(T) == 4 ? 16 * (kColumns + 4) : 0;

// Starts the copy of `rows` rows of a matrix; rows from `existing` on, and columns from `columns` on, are
// zeros. All threads of the block take part. The source's rows are aligned to 16 bytes.
template <class T, int kWidth>
__device__ __forceinline__ void load_tile(T* tile, const T* source, int64_t stride, int rows, int existing,
                                          int columns) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kVectors = kWidth / kVector;
  for (int at = static_cast<int>(threadIdx.x); at < rows * kVectors; at += static_cast<int>(blockDim.x)) {
    const int row = at / kVectors, column = at % kVectors * kVector;
    const bool exists = row < existing && column < columns;
    copy_async(tile + row * kTileStride<T, kWidth> + column, source + (exists ? row * stride + column : 0),
               exists);
  }
}

// sum += A B^T over kWidth columns; `a` points at the warp's rows.
template <class T, int kWidth, int kTiles>
__device__ __forceinline__ void multiply_transposed(float (&sum)[kTiles][4], const T* a, const T* b) {
  constexpr int kStride = kTileStride<T, kWidth>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(kTiles % 2 == 0, "tiles are loaded in pairs");
    a += (lane & 15) * kStride + (lane >> 4) * 8;
    b += ((lane & 7) + (lane >> 4) * 8) * kStride + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int step = 0; step < kWidth; step += 16) {
      uint32_t left[4];
      load_matrices(left, a + step);
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t right[4];
        load_matrices(right, b + tile * 8 * kStride + step);
        multiply_fragments<T>(sum[tile], left, right[0], right[1]);
        multiply_fragments<T>(sum[tile + 1], left, right[2], right[3]);
      }
    }
  } else {
    a += lane / 4 * kStride;
    b += lane % 4 * 2 * kStride;
#pragma unroll 1
    for (int step = 0; step < kWidth; step += 4) {
      const float4 upper = *reinterpret_cast<const float4*>(a + step),
                   lower = *reinterpret_cast<const float4*>(a + 8 * kStride + step);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float4 right = *reinterpret_cast<const float4*>(b + (tile * 8 + column) * kStride + step);
          // Four products are added up before they meet the sum: a quarter of the roundings at its size.
          sum[tile][column] +=
              fmaf(upper.w, right.w, fmaf(upper.z, right.z, fmaf(upper.y, right.y, upper.x * right.x)));
          sum[tile][column + 2] +=
              fmaf(lower.w, right.w, fmaf(lower.z, right.z, fmaf(lower.y, right.y, lower.x * right.x)));
        }
      }
    }
  }
}

// sum += W B for weights W in registers, 16 x 8 kSteps, and the first 8 kTiles columns of `b`, whose rows are
// kWidth wide. `staging`: kStagingNumbers of this warp.
template <class T, int kWidth, int kTiles, int kSteps>
__device__ __forceinline__ void multiply(float (&sum)[kTiles][4], const float (&weights)[kSteps][4],
                                         const T* b, T* staging) {
  constexpr int kStride = kTileStride<T, kWidth>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(kTiles % 2 == 0 && kSteps % 2 == 0, "tiles are loaded in pairs");
    b += (lane & 15) * kStride + (lane >> 4) * 8;
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      const uint32_t left[4] = {pack<T>(weights[step][0], weights[step][1]),
                                pack<T>(weights[step][2], weights[step][3]),
                                pack<T>(weights[step + 1][0], weights[step + 1][1]),
                                pack<T>(weights[step + 1][2], weights[step + 1][3])};
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t right[4];
        load_matrices_transposed(right, b + step * 8 * kStride + tile * 8);
        multiply_fragments<T>(sum[tile], left, right[0], right[1]);
        multiply_fragments<T>(sum[tile + 1], left, right[2], right[3]);
      }
    }
  } else {
    constexpr int kStagingStride = kSteps * 8 + 4;
    const int group = lane / 4, member = lane % 4;
    __syncwarp();  // the lanes are done with the last weights
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int at = 0; at < 4; ++at)
        staging[(group + at / 2 * 8) * kStagingStride + step * 8 + member * 2 + at % 2] = weights[step][at];
    }
    __syncwarp();
    b += member * 2;
#pragma unroll 1
    for (int row = 0; row < kSteps * 8; ++row) {
      const float upper = staging[group * kStagingStride + row],
                  lower = staging[(group + 8) * kStagingStride + row];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float2 right = *reinterpret_cast<const float2*>(b + row * kStride + tile * 8);
        sum[tile][0] = fmaf(upper, right.x, sum[tile][0]);
        sum[tile][1] = fmaf(upper, right.y, sum[tile][1]);
        sum[tile][2] = fmaf(lower, right.x, sum[tile][2]);
        sum[tile][3] = fmaf(lower, right.y, sum[tile][3]);
      }
    }
  }
}

// Sum, or largest, over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

__device__ __forceinline__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

template <class T>
__device__ __forceinline__ float exponential(float value) {
  if constexpr (sizeof(T) == 2)
    return fast_exponential(value);
  else
    return expf(value);
}

// Two neighbours in a row; `target` is aligned to both.
template <class T>
__device__ __forceinline__ void store_pair(T* target, float low, float high) {
  if constexpr (sizeof(T) == 2)
    *reinterpret_cast<uint32_t*>(target) = pack<T>(low, high);
  else
    *reinterpret_cast<float2*>(target) = make_float2(low, high);
}

}  // namespace ubp
