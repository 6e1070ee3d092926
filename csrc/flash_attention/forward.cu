// flash_attention forward: a block owns up to 64 queries of one sequence and head. Each warp keeps 16 of them
// with their running maximum, sum and output in registers, while keys and values pass through shared memory.
#include <type_traits>

#include "flash_attention/device.h"

namespace ubp {
namespace {

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxWarps * 32) forward_kernel(const FlashAttentionDeviceProblem problem) {
  constexpr int kTiles = kOtherRows<T, kWidth> / 8, kStride = kTileStride<T, kWidth>;
  Place place;
  if (!find_place<true>(problem, place)) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, own_rows = 16 * problem.warps;
  const int64_t stride = int64_t{problem.heads} * problem.width;

  T* own = reinterpret_cast<T*>(shared_memory());
  const OtherTiles<T, kWidth> tiles{own + own_rows * kStride,
                                    head_rows<T>(problem, problem.key, place.other_start, place.head),
                                    head_rows<T>(problem, problem.value, place.other_start, place.head),
                                    place.other_count,
                                    problem.width,
                                    stride};
  T* staging = tiles.memory + 4 * tiles.kNumbers + warp * kStagingNumbers<T, kOtherRows<T, kWidth>>;
  load_tile<T, kWidth>(own,
                       head_rows<T>(problem, problem.query, place.own_start + place.first_row, place.head),
                       stride, own_rows, place.own_count - place.first_row, problem.width);
  commit_copies();

  const LaneRows rows = lane_rows<true>(problem, place);
  const Range warp_seen = seen_by_rows<true>(problem, place, place.first_row + warp * 16, 16);
  const float* bias = problem.time_bias + place.head * problem.buckets;
  float output[kWidth / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  tiles.walk(seen_by_rows<true>(problem, place, place.first_row, own_rows),
             [&](int first, const T* keys, const T* values) {
               if (first > warp_seen.high || first + kTiles * 8 <= warp_seen.low) return;
               float score[kTiles][4] = {};
               multiply_transposed<T, kWidth>(score, own + warp * 16 * kStride, keys);
               const int column = first + static_cast<int>(threadIdx.x) % 4 * 2;
               float tile_largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
               for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                 for (int at = 0; at < 4; ++at) {
                   const int key = column + tile * 8 + at % 2, half = at / 2;
                   float logit = -INFINITY;
                   if (sees(rows.seen[half], key)) {
                     logit = score[tile][at] * problem.scale;
                     if (problem.time_bias != nullptr)
                       logit += bias[bucket_of<true>(problem, place, rows, half, key)];
                   }
                   score[tile][at] = logit;
                   tile_largest[half] = fmaxf(tile_largest[half], logit);
                 }
               }
               float base[2], correction[2];
#pragma unroll
               for (int half = 0; half < 2; ++half) {
                 const float now = fmaxf(largest[half], row_max(tile_largest[half]));
                 base[half] = now == -INFINITY ? 0.0f : now;
                 correction[half] = exponential<T>(largest[half] - base[half]);
                 largest[half] = now;
                 sum[half] *= correction[half];
               }
#pragma unroll
               for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                 for (int at = 0; at < 4; ++at) {
                   const int key = column + tile * 8 + at % 2, half = at / 2;
                   const float weight = exponential<T>(score[tile][at] - base[half]);
                   sum[half] += weight;
                   score[tile][at] =
                       weight == 0.0f ? 0.0f : weight * dropout_factor<true>(problem, place, rows, half, key);
                 }
               }
#pragma unroll
               for (int tile = 0; tile < kWidth / 8; ++tile) {
#pragma unroll
                 for (int at = 0; at < 4; ++at) output[tile][at] *= correction[at / 2];
               }
               multiply<T, kWidth>(output, score, values, staging);
             });
  wait_copies<0>();  // of the queries, where nothing was seen

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = row_sum(sum[half]);
    factor[half] = total == 0.0f ? 0.0f : 1.0f / total;
    if (threadIdx.x % 4 == 0 && rows.row[half] < place.own_count)
      problem.lse[int64_t{place.own_start + rows.row[half]} * problem.heads + place.head] =
          total == 0.0f ? -INFINITY : largest[half] + logf(total);
  }
  store_rows<T>(problem, place, rows, problem.output, 0, output, factor[0], factor[1]);
}

template <class T, int kWidth>
const char* run_forward(const FlashAttentionDeviceProblem& problem, void* stream) {
  const dim3 grid(static_cast<unsigned>(problem.bound), static_cast<unsigned>(problem.heads));
  return launch(&forward_kernel<T, kWidth>, grid, problem.warps * 32,
                shared_bytes<T, kWidth>(1, problem.warps, 0), stream, problem);
}

}  // namespace

const char* flash_attention_forward(const FlashAttentionDeviceProblem& problem, void* stream) {
  return with_type(problem.dtype, problem.width, [&](auto type, auto width) {
    return run_forward<decltype(type), decltype(width)::value>(problem, stream);
  });
}

int flash_attention_warps(FlashAttentionPass pass, DType dtype, int width, int buckets, int rows) {
  return with_type(dtype, width, [&](auto type, auto padded) {
    const int own_tiles = pass == FlashAttentionPass::kForward ? 1 : 2;
    const int tables = pass == FlashAttentionPass::kBackwardQueries ? buckets : 0;
    int warps = rows >= 64 ? kMaxWarps : (rows + 15) / 16;
    while (warps > 1 &&
           shared_bytes<decltype(type), decltype(padded)::value>(own_tiles, warps, tables) > kMaxSharedBytes)
      --warps;
    return warps < 1 ? 1 : warps;
  });
}

}  // namespace ubp
