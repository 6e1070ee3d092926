// What the three passes of flash_attention share. Each block owns a tile of rows of one sequence and head
// (queries, or keys), 16 rows for each of its warps, and walks over the tiles of the other side that its rows
// can see.
//
//   shared memory   own tiles (1 or 2) | 2 stages x 2 tiles of the other side | weights between lanes (float)
//                   | private tables of the lanes (gradient of time_bias)
#pragma once

#include "common/tile.h"
#include "flash_attention/cuda.h"

namespace ubp {
namespace {

constexpr int kMaxWarps = 4;
constexpr int kMaxSharedBytes = 99 * 1024;  // what every device since sm_80 gives a block

// Rows of the other side in a tile, so that the tiles fit into shared memory and the sums into registers.
template <class T, int kWidth>
constexpr int kOtherRows = sizeof(T) == 2 ? (kWidth <= 128 ? 32 : 16)
                                          : (kWidth <= 64    ? 32
                                             : kWidth <= 128 ? 16
                                                             : 8);

template <class T, int kWidth>
constexpr int shared_bytes(int own_tiles, int warps, int buckets) {
  constexpr int kRows = kOtherRows<T, kWidth>;
  return own_tiles * tile_bytes<T, kWidth>(16 * warps) + 4 * tile_bytes<T, kWidth>(kRows) +
         warps * (kStagingNumbers<T, kRows> + buckets * 32) * 4;
}

// Word 0 of Philox4x32-10 for the counter (first, second, third, 0).
// Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
__device__ __forceinline__ uint32_t philox_word(uint32_t first, uint32_t second, uint32_t third,
                                                uint64_t seed) {
  uint32_t a = first, b = second, c = third, d = 0;
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{a} * 0xD2511F53u, right = uint64_t{c} * 0xCD9E8D57u;
    a = static_cast<uint32_t>(right >> 32) ^ b ^ low;
    b = static_cast<uint32_t>(right);
    c = static_cast<uint32_t>(left >> 32) ^ d ^ high;
    d = static_cast<uint32_t>(left);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return a;
}

// Two buckets per octave of x = |seconds| + 1.
__device__ __forceinline__ int time_bucket(int64_t between_s, int buckets) {
  const uint64_t x = static_cast<uint64_t>(between_s < 0 ? -between_s : between_s) + 1;
  const int octave = 63 - __clzll(static_cast<long long>(x));
  const int bucket = octave == 0 ? 0 : 2 * octave + static_cast<int>(x >> (octave - 1) & 1);
  return bucket < buckets ? bucket : buckets - 1;
}

// Where a block works.
struct Place {
  int sequence, head, own_start, own_count, other_start, other_count, first_row;  // rows of the own sequence
  int64_t shift;                                                                  // keys - queries
};

// False for blocks beyond the last tile.
template <bool kOwnIsQuery>
__device__ __forceinline__ bool find_place(const FlashAttentionDeviceProblem& problem, Place& place) {
  const int block = static_cast<int>(blockIdx.x);
  if (block >= problem.first_tile[problem.sequences]) return false;
  int low = 0, high = problem.sequences - 1;  // the last slot that starts at or before the block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (problem.first_tile[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const int sequence = problem.order[low];
  const int32_t *own = kOwnIsQuery ? problem.cu_query : problem.cu_key,
                *other = kOwnIsQuery ? problem.cu_key : problem.cu_query;
  place.sequence = sequence;
  place.head = static_cast<int>(blockIdx.y);
  place.own_start = own[sequence];
  place.own_count = own[sequence + 1] - own[sequence];
  place.other_start = other[sequence];
  place.other_count = other[sequence + 1] - other[sequence];
  place.first_row = (block - problem.first_tile[low]) * 16 * problem.warps;
  const int64_t difference = int64_t{place.other_count} - place.own_count;
  place.shift = kOwnIsQuery ? difference : -difference;
  return true;
}

struct Range {
  int low, high;  // both included
};

// Rows of the other side that an own row sees, and by symmetry is seen by.
template <bool kOwnIsQuery>
__device__ __forceinline__ Range seen_by(const FlashAttentionDeviceProblem& problem, const Place& place,
                                         int64_t row) {
  if (row >= place.own_count) return {0, -1};
  const int64_t before = kOwnIsQuery ? problem.left : problem.right,
                after = kOwnIsQuery ? problem.right : problem.left,
                middle = kOwnIsQuery ? row + place.shift : row - place.shift, last = place.other_count - 1;
  int64_t low = before < 0 ? 0 : middle - before, high = after < 0 ? last : middle + after;
  low = low < 0 ? 0 : low;
  high = high > last ? last : high;
  return low <= high ? Range{static_cast<int>(low), static_cast<int>(high)} : Range{0, -1};
}

// What rows [first, first + count) see together; their own ranges rise with the row, empty ones aside.
template <bool kOwnIsQuery>
__device__ __forceinline__ Range seen_by_rows(const FlashAttentionDeviceProblem& problem, const Place& place,
                                              int first, int count) {
  const int64_t before = kOwnIsQuery ? problem.left : problem.right,
                after = kOwnIsQuery ? problem.right : problem.left,
                shift = kOwnIsQuery ? place.shift : -place.shift, end = place.other_count - 1;
  const int64_t last = first + count < place.own_count ? first + count - 1 : place.own_count - 1;
  int64_t low = before < 0 ? 0 : first + shift - before, high = after < 0 ? end : last + shift + after;
  low = low < 0 ? 0 : low;
  high = high > end ? end : high;
  return last >= first && low <= high ? Range{static_cast<int>(low), static_cast<int>(high)} : Range{0, -1};
}

// What a lane knows of its two rows, group and group + 8 of the warp's 16.
struct LaneRows {
  int row[2];  // in the sequence
  Range seen[2];
  int64_t time_s[2];
};

template <bool kOwnIsQuery>
__device__ __forceinline__ LaneRows lane_rows(const FlashAttentionDeviceProblem& problem,
                                              const Place& place) {
  LaneRows rows;
  const int64_t* times = kOwnIsQuery ? problem.query_time_s : problem.key_time_s;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.row[half] = place.first_row + static_cast<int>(threadIdx.x) / 32 * 16 +
                     static_cast<int>(threadIdx.x) % 32 / 4 + half * 8;
    rows.seen[half] = seen_by<kOwnIsQuery>(problem, place, rows.row[half]);
    const bool has_time = problem.time_bias != nullptr && rows.row[half] < place.own_count;
    rows.time_s[half] = has_time ? times[place.own_start + rows.row[half]] : 0;
  }
  return rows;
}

__device__ __forceinline__ bool sees(const Range& range, int row) {
  return range.low <= row && row <= range.high;
}

// One pair of an own row (`half`) and a row of the other side that see each other.
template <bool kOwnIsQuery>
__device__ __forceinline__ int bucket_of(const FlashAttentionDeviceProblem& problem, const Place& place,
                                         const LaneRows& rows, int half, int other) {
  const int64_t* times = kOwnIsQuery ? problem.key_time_s : problem.query_time_s;
  return time_bucket(rows.time_s[half] - times[place.other_start + other], problem.buckets);
}

template <bool kOwnIsQuery>
__device__ __forceinline__ float dropout_factor(const FlashAttentionDeviceProblem& problem,
                                                const Place& place, const LaneRows& rows, int half,
                                                int other) {
  if (problem.threshold == 0) return 1.0f;
  const uint32_t own = static_cast<uint32_t>(place.own_start + rows.row[half]),
                 there = static_cast<uint32_t>(place.other_start + other),
                 query = (kOwnIsQuery ? own : there) + static_cast<uint32_t>(problem.seed[1]),
                 key = (kOwnIsQuery ? there : own) + static_cast<uint32_t>(problem.seed[2]);
  const uint32_t word = philox_word(key, query, static_cast<uint32_t>(place.head), problem.seed[0]);
  return word >= problem.threshold ? problem.keep_factor : 0.0f;
}

// A matrix [tokens, heads, width] from a row of a head on.
template <class T>
__device__ __forceinline__ T* head_rows(const FlashAttentionDeviceProblem& problem, const void* matrix,
                                        int64_t row, int head) {
  return static_cast<T*>(const_cast<void*>(matrix)) + (row * problem.heads + head) * problem.width;
}

// Copies tile after tile of two matrices of the other side into two stages, one ahead of the use.
template <class T, int kWidth>
struct OtherTiles {
  static constexpr int kRows = kOtherRows<T, kWidth>, kNumbers = kRows * kTileStride<T, kWidth>;
  T* memory;
  const T *first, *second;  // rows of the sequence
  int count, width;
  int64_t stride;

  __device__ __forceinline__ T* stage(int row, int which) const {
    return memory + (row / kRows % 2 * 2 + which) * kNumbers;
  }
  __device__ __forceinline__ void start(int row) const {
    load_tile<T, kWidth>(stage(row, 0), first + row * stride, stride, kRows, count - row, width);
    load_tile<T, kWidth>(stage(row, 1), second + row * stride, stride, kRows, count - row, width);
    commit_copies();
  }
  // Calls use(first row of the tile, tile of `first`, tile of `second`) for the tiles that meet the range.
  template <class Use>
  __device__ __forceinline__ void walk(Range range, const Use& use) const {
    const int begin = range.low / kRows * kRows;
    if (begin <= range.high) start(begin);
    for (int row = begin; row <= range.high; row += kRows) {
      const bool has_next = row + kRows <= range.high;
      if (has_next) start(row + kRows);
      if (has_next)
        wait_copies<1>();
      else
        wait_copies<0>();
      __syncthreads();
      use(row, stage(row, 0), stage(row, 1));
      __syncthreads();  // before the stage is filled again
    }
  }
};

// The warp's 16 rows of sums to global memory, each row times its factor.
template <class T, int kTiles>
__device__ __forceinline__ void store_rows(const FlashAttentionDeviceProblem& problem, const Place& place,
                                           const LaneRows& rows, void* matrix, int first_column,
                                           const float (&sums)[kTiles][4], float upper, float lower) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (rows.row[half] >= place.own_count) continue;
    T* target = head_rows<T>(problem, matrix, place.own_start + rows.row[half], place.head);
    const float factor = half == 0 ? upper : lower;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int column = first_column + tile * 8 + static_cast<int>(threadIdx.x) % 4 * 2;
      if (column < problem.width)
        store_pair(target + column, sums[tile][half * 2] * factor, sums[tile][half * 2 + 1] * factor);
    }
  }
}

// Calls `call` with a value of the element type and a width that holds the problem's.
template <class T, class Call>
auto with_width(int width, const Call& call) {
  if (width <= 32) return call(T{}, std::integral_constant<int, 32>{});
  if (width <= 64) return call(T{}, std::integral_constant<int, 64>{});
  if (width <= 128) return call(T{}, std::integral_constant<int, 128>{});
  return call(T{}, std::integral_constant<int, 256>{});
}

template <class Call>
auto with_type(DType dtype, int width, const Call& call) {
  if (dtype == DType::kBFloat16) return with_width<BFloat16>(width, call);
  if (dtype == DType::kFloat16) return with_width<Float16>(width, call);
  return with_width<float>(width, call);
}

}  // namespace
}  // namespace ubp
