// Small kernels that show what the emulation computes and what it refuses. Called through ctypes.
#include "common/device.h"

namespace {

struct Fragments {
  const uint32_t *a, *b;  // registers [32, 4], [32, 2]
  float* sum;             // [32, 4]
};

void multiply_kernel(const Fragments problem) {
  const unsigned lane = threadIdx.x;
  const uint32_t a[4] = {problem.a[lane * 4], problem.a[lane * 4 + 1], problem.a[lane * 4 + 2],
                         problem.a[lane * 4 + 3]};
  float sum[4] = {};
  ubp::multiply_fragments<ubp::BFloat16>(sum, a, problem.b[lane * 2], problem.b[lane * 2 + 1]);
  for (int at = 0; at < 4; ++at) problem.sum[lane * 4 + at] = sum[at];
}

struct Matrices {
  const uint16_t* numbers;  // [4, 8, 8]
  uint32_t* registers;      // [32, 4]
  bool is_transposed;
};

void load_kernel(const Matrices problem) {
  auto* shared = reinterpret_cast<uint16_t*>(ubp::shared_memory());
  const unsigned lane = threadIdx.x;
  ubp::copy_async(shared + lane * 8, problem.numbers + lane * 8, true);
  ubp::commit_copies();
  ubp::wait_copies<0>();
  __syncwarp();
  uint32_t found[4];
  if (problem.is_transposed)
    ubp::load_matrices_transposed(found, shared + lane * 8);
  else
    ubp::load_matrices(found, shared + lane * 8);
  for (int at = 0; at < 4; ++at) problem.registers[lane * 4 + at] = found[at];
}

struct Mistake {
  int which;
  const float* source;  // aligned to 16 bytes
  float* found;         // [64]
};

void mistaken_kernel(const Mistake problem) {
  auto* shared = reinterpret_cast<float*>(ubp::shared_memory());
  const unsigned thread = threadIdx.x;
  if (problem.which == 0) {  // reads what another thread writes, without a barrier
    shared[thread] = 1.0f;
    problem.found[thread] = shared[thread ^ 32];
  } else if (problem.which == 1) {  // reads before the copy is waited for
    ubp::copy_async(shared + thread * 4, problem.source, true);
    problem.found[thread] = shared[thread * 4];
  } else if (problem.which == 2) {  // one half of a warp shuffles, the other meets elsewhere
    if (thread % 32 < 16)
      problem.found[thread] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    else
      __syncwarp();
  } else if (problem.which == 3) {  // a barrier that half of the block never reaches
    if (thread < 32) __syncthreads();
  } else {
    ubp::copy_async(shared + thread * 4 + 1, problem.source, true);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* check_multiply(const uint32_t* a,
                                                                             const uint32_t* b, float* sum) {
  return ubp::launch(&multiply_kernel, dim3(), 32, 0, nullptr, Fragments{a, b, sum});
}

extern "C" __attribute__((visibility("default"))) const char* check_load(const uint16_t* numbers,
                                                                         uint32_t* registers,
                                                                         bool is_transposed) {
  return ubp::launch(&load_kernel, dim3(), 32, 512, nullptr, Matrices{numbers, registers, is_transposed});
}

extern "C" __attribute__((visibility("default"))) const char* check_mistake(int which, const float* source,
                                                                            float* found) {
  return ubp::launch(&mistaken_kernel, dim3(), 64, 1024, nullptr, Mistake{which, source, found});
}
