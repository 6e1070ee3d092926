// The host's stand-in for csrc/common/device.h: runs CUDA kernels, block after block, on the CPU.
//
// Every thread of a block is a fiber that runs until it has to wait: at a barrier of the block, or where the
// warp does something together. Fragments are laid out from the text of the PTX ISA (sections on
// mma.m16n8k16, ldmatrix and cp.async), not from the kernels. It is stricter than a device in these ways:
//
//   - shared memory starts as NaN, and is a separate piece of the heap for each block: sanitizers see its
//   ends
//   - an asynchronous copy puts NaN into its target until it is waited for
//   - the order in which fibers run can be reversed (UBP_EMULATION_REVERSED=1): a missing barrier shows in
//   one of both
//   - lanes that meet in different operations, misaligned addresses, and threads that wait for ever are
//   errors
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace ubp {
namespace emulation {

struct Copy {
  void* target;
  const void* source;
  bool exists;
};

// What 32 lanes hand each other: twice, so that the next exchange does not meet slow readers of this one.
struct Warp {
  alignas(16) unsigned char slots[2][32][64];
  int arrived = 0, operation = 0;
  unsigned turn = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool is_done;
  std::vector<std::vector<Copy>> groups;  // the last one is open
};

struct Machine {
  static constexpr size_t kStackBytes = size_t{1} << 18;
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::function<void()> body;
  int current = 0, at_barrier = 0;
  unsigned barrier_turn = 0;
  bool has_moved = false;
  std::string error;
};

inline Machine machine;

inline void yield() { swapcontext(&machine.fibers[machine.current].context, &machine.scheduler); }

// Ends the launch: control never comes back to this fiber.
inline void fail(const std::string& reason) {
  if (machine.error.empty()) machine.error = reason + " in thread " + std::to_string(machine.current);
  for (;;) yield();
}

inline void require_aligned(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail(std::string(what) + " of a misaligned address");
}

// Waits for all lanes of the warp, then gives what lane i handed in.
template <class Value>
auto exchange(int operation, const Value& value) {
  static_assert(sizeof(Value) <= 64, "a slot is too small");
  Warp& warp = machine.warps[machine.current / 32];
  const unsigned turn = warp.turn;
  std::memcpy(warp.slots[turn % 2][machine.current % 32], &value, sizeof(Value));
  if (warp.arrived == 0) warp.operation = operation;
  if (warp.operation != operation) fail("lanes of a warp meet in different operations");
  machine.has_moved = true;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.turn;
  } else {
    while (warp.turn == turn) yield();
  }
  return [&warp, turn](int lane) {
    Value found;
    std::memcpy(&found, warp.slots[turn % 2][lane], sizeof(Value));
    return found;
  };
}

inline void run_fiber() {
  machine.body();
  machine.fibers[machine.current].is_done = true;
  machine.has_moved = true;
  for (;;) yield();
}

inline void prepare_block(int threads, int shared_bytes) {
  machine.fibers.resize(threads);
  machine.warps.assign(threads / 32, Warp{});
  machine.shared = std::vector<unsigned char>(static_cast<size_t>(shared_bytes), 0xff);
  machine.at_barrier = 0;
  for (Fiber& fiber : machine.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[Machine::kStackBytes]);
    fiber.is_done = false;
    fiber.groups.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Machine::kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

inline bool run_block(int threads, int shared_bytes) {
  const bool is_reversed = std::getenv("UBP_EMULATION_REVERSED") != nullptr;
  prepare_block(threads, shared_bytes);
  for (int done = 0; done < threads;) {
    machine.has_moved = false;
    done = 0;
    for (int at = 0; at < threads; ++at) {
      machine.current = is_reversed ? threads - 1 - at : at;
      Fiber& fiber = machine.fibers[machine.current];
      threadIdx = dim3(static_cast<unsigned>(machine.current), 0, 0);
      if (!fiber.is_done) swapcontext(&machine.scheduler, &fiber.context);
      if (!machine.error.empty()) return false;
      done += fiber.is_done;
    }
    if (!machine.has_moved && done < threads) {
      machine.error = "threads wait for others that never come";
      return false;
    }
  }
  return true;
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : NAN;
  return bits >> 15 ? -value : value;
}

inline uint16_t float_to_float16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);
  const int unit = size == 0.0f || exponent - 11 < -24 ? -24 : exponent - 11;  // of the last digit
  const auto digits = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  return static_cast<uint16_t>(sign + (unit == -24 ? digits : ((unit + 24) << 10) + digits));
}

}  // namespace emulation

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return emulation::bfloat16_to_float(value.bits); }
inline float to_float(Float16 value) { return emulation::float16_to_float(value.bits); }

template <class T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<BFloat16>(float low, float high) {
  return emulation::float_to_bfloat16(low) | uint32_t{emulation::float_to_bfloat16(high)} << 16;
}
template <>
inline uint32_t pack<Float16>(float low, float high) {
  return emulation::float_to_float16(low) | uint32_t{emulation::float_to_float16(high)} << 16;
}

inline unsigned char* shared_memory() { return emulation::machine.shared.data(); }

inline void copy_async(void* target, const void* source, bool exists) {
  emulation::require_aligned(target, 16, "copy to");
  emulation::require_aligned(source, 16, "copy from");
  std::memset(target, 0xff, 16);
  emulation::machine.fibers[emulation::machine.current].groups.back().push_back({target, source, exists});
}

inline void commit_copies() { emulation::machine.fibers[emulation::machine.current].groups.emplace_back(); }

template <int kPending>
void wait_copies() {
  auto& groups = emulation::machine.fibers[emulation::machine.current].groups;
  while (groups.size() > kPending + 1) {
    for (const emulation::Copy& copy : groups.front()) {
      if (copy.exists)
        std::memcpy(copy.target, copy.source, 16);
      else
        std::memset(copy.target, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

// ldmatrix .x4: "threads 0-7 / 8-15 / 16-23 / 24-31 hold the addresses of the rows of matrix 0 / 1 / 2 / 3";
// thread t receives, of each, elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4.
inline void load_any(int operation, uint32_t (&to)[4], const void* row) {
  emulation::require_aligned(row, 16, "ldmatrix");
  const int lane = emulation::machine.current % 32;
  struct Row {
    uint16_t numbers[8];
  } mine;
  std::memcpy(&mine, row, 16);
  const auto rows = emulation::exchange(operation, mine);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int at_row, int at_column) {
      return rows(matrix * 8 + at_row).numbers[at_column];
    };
    const int major = lane / 4, minor = 2 * (lane % 4);
    const bool is_transposed = operation == 2;
    const uint32_t low = is_transposed ? element(minor, major) : element(major, minor),
                   high = is_transposed ? element(minor + 1, major) : element(major, minor + 1);
    to[matrix] = low | high << 16;
  }
}

inline void load_matrices(uint32_t (&to)[4], const void* row) { load_any(1, to, row); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { load_any(2, to, row); }

// mma.m16n8k16 with 16-bit numbers. With group = t / 4 and member = t % 4, number i of thread t is
//   A (i < 8)   row group for i in {0, 1, 4, 5}, else group + 8; column 2 member + (i & 1), + 8 for i >= 4
//   B (i < 4)   row 2 member + (i & 1), + 8 for i >= 2; column group
//   C (i < 4)   row group for i < 2, else group + 8; column 2 member + (i & 1)
template <class T>
void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto lanes = emulation::exchange(3, Operands{{a[0], a[1], a[2], a[3]}, {b_low, b_high}});
  const auto number = [](uint32_t packed, int at) {
    return to_float(T{static_cast<uint16_t>(packed >> at * 16)});
  };
  const int thread = emulation::machine.current % 32, group = thread / 4, member = thread % 4;
  float left[2][16], right[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      const int i = (k & 1) + 2 * half + (k >= 8 ? 4 : 0);
      left[half][k] = number(lanes(4 * group + k % 8 / 2).a[i / 2], i % 2);
      const int j = (k & 1) + (k >= 8 ? 2 : 0), column = 2 * member + half;
      right[half][k] = number(lanes(4 * column + k % 8 / 2).b[j / 2], j % 2);
    }
  }
  for (int i = 0; i < 4; ++i) {
    double total = 0;
    for (int k = 0; k < 16; ++k) total += double{left[i / 2][k]} * double{right[i % 2][k]};
    sum[i] = static_cast<float>(double{sum[i]} + total);
  }
}

inline float fast_exponential(float value) { return std::exp(value); }

template <class Problem>
const char* launch(void (*kernel)(Problem), dim3 grid, int threads, int shared_bytes, void*,
                   const Problem& problem) {
  emulation::Machine& machine = emulation::machine;
  machine.error.clear();
  if (threads % 32 != 0 || threads > 1024 || shared_bytes > 99 * 1024) return "a block that no device runs";
  machine.body = [&] { kernel(problem); };
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        if (!emulation::run_block(threads, shared_bytes)) return machine.error.c_str();
      }
  return nullptr;
}

}  // namespace ubp

inline void __syncthreads() {
  ubp::emulation::Machine& machine = ubp::emulation::machine;
  const unsigned turn = machine.barrier_turn;
  machine.has_moved = true;
  if (++machine.at_barrier == static_cast<int>(machine.fibers.size())) {
    machine.at_barrier = 0;
    ++machine.barrier_turn;
  } else {
    while (machine.barrier_turn == turn) ubp::emulation::yield();
  }
}

inline void __syncwarp() { ubp::emulation::exchange(4, 0); }

inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  if (mask != 0xffffffffu) ubp::emulation::fail("shuffle of some lanes only");
  return ubp::emulation::exchange(5, value)((ubp::emulation::machine.current % 32) ^ distance);
}

inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}
