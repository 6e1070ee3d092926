// nt_xent on CUDA devices. A block owns 64 rows, 16 for each of four warps, and walks over tiles of 64 other
// rows; columns pass through shared memory in chunks of 64, one chunk ahead of its use.
//
//   forward    chunks -> similarities -> running largest gap and sum of exponentials of the block's rows
//   backward   chunks -> similarities -> G = weight p (own as queries) + weight p (other as queries) in
//   registers
//              -> grad += G other, for up to 256 columns; blocks for further columns compute G again
//
//   shared memory   2 stages x (own chunk, other chunk) | weights between lanes (float)
//
// No two blocks write to the same place: results are the same every time.
#include <type_traits>

#include "common/tile.h"
#include "nt_xent/cuda.h"

namespace ubp {
namespace {

constexpr int kRows = 64, kChunk = 64, kTiles = kRows / 8, kThreads = 128;

template <class T>
constexpr int kChunkNumbers = kRows * kTileStride<T, kChunk>;

template <class T>
constexpr int shared_bytes() {
  return (4 * kChunkNumbers<T> + 4 * kStagingNumbers<T, kRows>)*static_cast<int>(sizeof(T));
}

// The steps of a block: for each of its tiles of other rows the chunks of similarities, then those of
// gradients.
template <class T>
struct Steps {
  const NTXentDeviceProblem& problem;
  int first_row, first_tile, tiles, chunks, first_grad_chunk, grad_chunks;

  __device__ __forceinline__ int per_tile() const { return chunks + grad_chunks; }
  __device__ __forceinline__ T* own(int step) const {
    return reinterpret_cast<T*>(shared_memory()) + step % 2 * 2 * kChunkNumbers<T>;
  }
  __device__ __forceinline__ T* other(int step) const { return own(step) + kChunkNumbers<T>; }

  __device__ __forceinline__ void start(int step) const {
    const int part = step % per_tile(), row = (first_tile + step / per_tile()) * kRows;
    const int chunk = part < chunks ? part : first_grad_chunk + part - chunks;
    const int64_t width = problem.width;
    load_tile<T, kChunk>(other(step), static_cast<const T*>(problem.other) + row * width + chunk * kChunk,
                         width, kRows, problem.other_rows - row, kChunk);
    if (part < chunks)
      load_tile<T, kChunk>(own(step), static_cast<const T*>(problem.own) + first_row * width + chunk * kChunk,
                           width, kRows, problem.own_rows - first_row, kChunk);
    commit_copies();
  }
  // After it the chunks of `step` are there, until the next call.
  __device__ __forceinline__ void arrive(int step) const {
    __syncthreads();  // all warps are done with the chunks that the next step overwrites
    if (step + 1 < tiles * per_tile()) {
      start(step + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
  }
  __device__ __forceinline__ void similarities(int tile, float (&sum)[kTiles][4]) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int step = tile * per_tile() + chunk;
      arrive(step);
      multiply_transposed<T, kChunk>(sum, own(step) + warp * 16 * kTileStride<T, kChunk>, other(step));
    }
  }
};

// The tiles of other rows that belong to this block, and its columns of gradients.
template <class T>
__device__ __forceinline__ Steps<T> steps_of_block(const NTXentDeviceProblem& problem,
                                                   int grad_chunks_per_block) {
  const int tiles = (problem.other_rows + kRows - 1) / kRows, split = static_cast<int>(blockIdx.y);
  const int first = static_cast<int>(int64_t{tiles} * split / problem.splits),
            end = static_cast<int>(int64_t{tiles} * (split + 1) / problem.splits);
  const int chunks = problem.width / kChunk,
            first_grad = static_cast<int>(blockIdx.z) * grad_chunks_per_block;
  const int left = chunks - first_grad,
            grad_chunks = left < grad_chunks_per_block ? left : grad_chunks_per_block;
  return {problem, static_cast<int>(blockIdx.x) * kRows, first, end - first, chunks, first_grad, grad_chunks};
}

// A row as query or candidate.
struct Row {
  bool exists;  // and is valid
  int index;    // among all
  int group, id;
  float scale, bias;
};

__device__ __forceinline__ Row make_row(const NTXentDeviceProblem& problem, int row, int rows, int first) {
  Row made{row < rows, 0, 0, -1, 0.0f, 0.0f};
  if (!made.exists) return made;
  made.index = first + row;
  made.exists = problem.valid == nullptr || problem.valid[made.index];
  made.group = problem.group[made.index];
  made.id = problem.ids == nullptr ? made.index : problem.ids[made.index];
  made.scale = problem.scales[made.index];
  made.bias = problem.bias == nullptr ? 0.0f : problem.bias[made.index];
  return made;
}

__device__ __forceinline__ Row own_row(const NTXentDeviceProblem& problem, int half) {
  const int row = static_cast<int>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / 32 * 16 +
                  static_cast<int>(threadIdx.x) % 32 / 4 + half * 8;
  return make_row(problem, row, problem.own_rows, problem.own_first);
}

__device__ __forceinline__ Row other_row(const NTXentDeviceProblem& problem, int first, int tile,
                                         int column) {
  const int row = first + tile * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + column;
  return make_row(problem, row, problem.other_rows, problem.other_first);
}

__device__ __forceinline__ bool are_negatives(const Row& one, const Row& other) {
  return one.exists && other.exists && one.group != other.group && one.id != other.id;
}

// The product of the scales comes first, so that s_ij and s_ji, and the positive, are the same number.
__device__ __forceinline__ float similarity(float product, const Row& one, const Row& other) {
  return product * (one.scale * other.scale);
}

template <class T>
__global__ void __launch_bounds__(kThreads) positives_kernel(const NTXentDeviceProblem problem) {
  Steps<T> steps = steps_of_block<T>(problem, 0);
  steps.first_tile = static_cast<int>(blockIdx.x);
  steps.tiles = 1;
  float sum[kTiles][4] = {};
  steps.start(0);
  steps.similarities(0, sum);
  const Row rows[2] = {own_row(problem, 0), own_row(problem, 1)};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      const Row other = other_row(problem, steps.first_tile * kRows, tile, at % 2);
      const Row& own = rows[at / 2];
      if (own.exists && other.exists && own.index - problem.own_first == other.index - problem.other_first)
        problem.positives[own.index] = similarity(sum[tile][at], own, other);
    }
  }
}

// Four blocks on a multiprocessor: left alone, ptxas aims at seven on sm_80 and spills.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(const NTXentDeviceProblem problem) {
  const Steps<T> steps = steps_of_block<T>(problem, 0);
  const Row rows[2] = {own_row(problem, 0), own_row(problem, 1)};
  const float inverse_temperature = *problem.inverse_temperature;
  float positive[2], largest[2] = {}, total[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half)
    positive[half] = rows[half].exists ? problem.positives[rows[half].index] : 0.0f;
  if (steps.tiles > 0) steps.start(0);
  for (int number = 0; number < steps.tiles; ++number) {
    float sum[kTiles][4] = {}, tile_largest[2] = {};
    steps.similarities(number, sum);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const Row other = other_row(problem, (steps.first_tile + number) * kRows, tile, column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& value = sum[tile][half * 2 + column];
          const float gap = (similarity(value, rows[half], other) - positive[half]) * inverse_temperature +
                            (other.bias - rows[half].bias);
          value = are_negatives(rows[half], other) ? gap : -INFINITY;
          tile_largest[half] = fmaxf(tile_largest[half], value);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float now = fmaxf(largest[half], row_max(tile_largest[half]));
      total[half] *= expf(largest[half] - now);
      largest[half] = now;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int at = 0; at < 4; ++at) total[at / 2] += exponential<T>(sum[tile][at] - largest[at / 2]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float all = row_sum(total[half]);
    if (!rows[half].exists || threadIdx.x % 4 != 0) continue;
    const int64_t at = int64_t{blockIdx.y} * problem.own_rows + rows[half].index - problem.own_first;
    problem.largest[at] = largest[half];
    problem.sums[at] = all;
  }
}

// What a row brings as a query.
struct Query {
  float positive, loss, weight;
};

__device__ __forceinline__ Query query_of(const NTXentDeviceProblem& problem, const Row& row) {
  if (!row.exists) return {};
  return {problem.positives[row.index], problem.losses[row.index], problem.weights[row.index]};
}

// Factor of the slopes, which are at most 4: small probabilities stay normal numbers in float16.
template <class T>
constexpr float kLift = std::is_same_v<T, Float16> ? 8192.0f : 1.0f;

// Turns products into the slopes of the other rows' numbers as they are stored, times kLift, and adds to the
// moments.
template <class T>
__device__ __forceinline__ void compute_slopes(const NTXentDeviceProblem& problem, const Row (&rows)[2],
                                               const Query (&queries)[2], int first,
                                               float inverse_temperature, float (&sum)[kTiles][4],
                                               float (&moment)[2]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const Row other = other_row(problem, first, tile, column);
      const Query there = query_of(problem, other);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float slope = 0;
        if (are_negatives(rows[half], other)) {
          const float value = similarity(sum[tile][half * 2 + column], rows[half], other);
          const Query& here = queries[half];
          const float bias = other.bias - rows[half].bias;
          if (here.weight != 0.0f) {
            const float gap = (value - here.positive) * inverse_temperature;
            slope = here.weight * exponential<T>(gap + bias - here.loss);
            moment[half] = fmaf(slope, gap, moment[half]);
          }
          if (there.weight != 0.0f)
            slope += there.weight *
                     exponential<T>((value - there.positive) * inverse_temperature - bias - there.loss);
        }
        sum[tile][half * 2 + column] = slope * (other.scale * kLift<T>);
      }
    }
  }
}

template <class T, int kGradChunks>
__global__ void __launch_bounds__(kThreads) backward_kernel(const NTXentDeviceProblem problem) {
  const Steps<T> steps = steps_of_block<T>(problem, kGradChunks);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  T* staging =
      reinterpret_cast<T*>(shared_memory()) + 4 * kChunkNumbers<T> + warp * kStagingNumbers<T, kRows>;
  const Row rows[2] = {own_row(problem, 0), own_row(problem, 1)};
  const Query queries[2] = {query_of(problem, rows[0]), query_of(problem, rows[1])};
  const float inverse_temperature = *problem.inverse_temperature;
  float grad[kGradChunks][kTiles][4] = {}, moment[2] = {};
  if (steps.tiles > 0) steps.start(0);
  for (int number = 0; number < steps.tiles; ++number) {
    float sum[kTiles][4] = {};
    steps.similarities(number, sum);
    compute_slopes<T>(problem, rows, queries, (steps.first_tile + number) * kRows, inverse_temperature, sum,
                      moment);
#pragma unroll
    for (int chunk = 0; chunk < kGradChunks; ++chunk) {
      if (chunk >= steps.grad_chunks) continue;
      const int step = number * steps.per_tile() + steps.chunks + chunk;
      steps.arrive(step);
      multiply<T, kChunk>(grad[chunk], sum, steps.other(step), staging);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float all = row_sum(moment[half]);
    if (!rows[half].exists) continue;
    const int64_t at = int64_t{blockIdx.y} * problem.own_rows + rows[half].index - problem.own_first;
    if (threadIdx.x % 4 == 0 && blockIdx.z == 0) problem.moments[at] = all;
    float* target = problem.grad + at * problem.width + steps.first_grad_chunk * kChunk + threadIdx.x % 4 * 2;
#pragma unroll
    for (int chunk = 0; chunk < kGradChunks; ++chunk) {
      if (chunk >= steps.grad_chunks) continue;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        store_pair(target + chunk * kChunk + tile * 8, grad[chunk][tile][half * 2] / kLift<T>,
                   grad[chunk][tile][half * 2 + 1] / kLift<T>);
    }
  }
}

template <class T>
const char* run(NTXentPass pass, const NTXentDeviceProblem& problem, void* stream) {
  const unsigned tiles = static_cast<unsigned>((problem.own_rows + kRows - 1) / kRows),
                 splits = static_cast<unsigned>(problem.splits);
  const int chunks = problem.width / kChunk, bytes = shared_bytes<T>();
  if (pass == NTXentPass::kPositives)
    return launch(&positives_kernel<T>, dim3(tiles), kThreads, bytes, stream, problem);
  if (pass == NTXentPass::kForward)
    return launch(&forward_kernel<T>, dim3(tiles, splits), kThreads, bytes, stream, problem);
  const auto blocks = [&](int per_block) {
    return static_cast<unsigned>((chunks + per_block - 1) / per_block);
  };
  if (chunks <= 2)
    return launch(&backward_kernel<T, 2>, dim3(tiles, splits, blocks(2)), kThreads, bytes, stream, problem);
  return launch(&backward_kernel<T, 4>, dim3(tiles, splits, blocks(4)), kThreads, bytes, stream, problem);
}

}  // namespace

const char* nt_xent(NTXentPass pass, const NTXentDeviceProblem& problem, void* stream) {
  if (problem.dtype == DType::kBFloat16) return run<BFloat16>(pass, problem, stream);
  if (problem.dtype == DType::kFloat16) return run<Float16>(pass, problem, stream);
  return run<float>(pass, problem, stream);
}

}  // namespace ubp
