// Everything the CUDA kernels take from the device beyond C++: PTX instructions and launches, nothing else.
// The tests replace this file by an emulation for the host (tests/kernels/cuda_emulation), so that the
// kernels themselves run where there is no GPU.
//
// A warp's tile of sums is 16 x 8 numbers, spread as the tensor cores want it: the lane with group = lane / 4
// and member = lane % 4 holds columns 2 member and 2 member + 1 of row group (numbers 0, 1) and of row
// group + 8 (numbers 2, 3).
//
// Source: PTX ISA, matrix fragments for mma.m16n8k16 and ldmatrix.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ubp {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, zeros where they do not exist. Both ends are aligned to 16 bytes.
// They are there after a wait, and for other threads after a barrier.
__device__ __forceinline__ void copy_async(void* target, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(exists ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's last groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers: lanes 8 i .. 8 i + 7 point at the rows of matrix i. Register i of a
// lane then holds the numbers 2 member and 2 member + 1 of row `group`; transposed: rows 2 member and 2
// member + 1 of column `group`.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum += A B for A 16 x 16 and B 16 x 8.
template <class T>
__device__ void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high);

template <>
__device__ __forceinline__ void multiply_fragments<BFloat16>(float (&sum)[4], const uint32_t (&a)[4],
                                                             uint32_t b_low, uint32_t b_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

template <>
__device__ __forceinline__ void multiply_fragments<Float16>(float (&sum)[4], const uint32_t (&a)[4],
                                                            uint32_t b_low, uint32_t b_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Two numbers in one register, rounded to nearest even.
template <class T>
__device__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) {
  return __uint_as_float(uint32_t{value.bits} << 16);
}
__device__ __forceinline__ float to_float(Float16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// Relative error 2^-22 and that of rounding value * log2(e): enough beside 16-bit numbers.
__device__ __forceinline__ float fast_exponential(float value) { return __expf(value); }

// Runs kernel(problem). Null, or what went wrong.
template <class Problem>
const char* launch(void (*kernel)(Problem), dim3 grid, int threads, int shared_bytes, void* stream,
                   const Problem& problem) {
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(problem);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace ubp
