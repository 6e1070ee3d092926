// Loops that do nothing but multiply and add, in the kernels' own vectors: what a core can reach.
// benchmarks/peaks.py compiles them for the machine at hand.
#include "common/tiles.h"

// Keeps a vector in a register and tells the compiler nothing about it.
#if defined(__aarch64__)
#define UBP_IN_REGISTER(value) "+w"(value)
#else
#define UBP_IN_REGISTER(value) "+x"(value)
#endif

namespace ubp {
namespace {

// More than latency times units: 12 are too few for the dot products of a Zen 5. No more than registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif

// `steps` times kSums vectors; returns the sum of all numbers, so that nothing can be left out.
template <class A>
float loop(int64_t steps, typename A::Elements a, typename A::Elements b) {
  typename A::Vec sums[kSums] = {};
  for (int64_t step = 0; step < steps; ++step) {
    asm volatile("" : UBP_IN_REGISTER(a));  // or a * b would be computed once
#pragma GCC unroll 24
    for (int at = 0; at < kSums; ++at) {
      sums[at] = A::multiply_add(a, b, sums[at]);
      asm volatile("" : UBP_IN_REGISTER(sums[at]));
    }
  }
#pragma GCC unroll 24
  for (int at = 1; at < kSums; ++at) sums[0] += sums[at];
  return sum_lanes(sums[0]);
}

}  // namespace
}  // namespace ubp

extern "C" {

// Floating-point operations of a step, 0 where the processor has no such instruction.
int multiply_add_flop() { return 2 * ubp::kSums * ubp::kWidth; }
float multiply_adds(int64_t steps, float number) {
  return ubp::loop<ubp::FloatArithmetic>(steps, ubp::broadcast(number), ubp::broadcast(number));
}

#if defined(UBP_HAS_TILES)
int dot_product_flop() { return 4 * 4 * ubp::kTile * ubp::kTile * ubp::kTile; }
float dot_products(int64_t steps, float) {
  float sums[ubp::kTile * ubp::kTile];
  ubp::TileArithmetic::begin_products();  // all registers hold zeros then
  for (int64_t step = 0; step < steps; ++step) {
    ubp::multiply_tiles<0, 4, 6>();
    ubp::multiply_tiles<1, 4, 7>();
    ubp::multiply_tiles<2, 5, 6>();
    ubp::multiply_tiles<3, 5, 7>();
  }
  ubp::store_tile<0>(sums, ubp::kTile * sizeof(float));
  ubp::TileArithmetic::end_products();
  return sums[0];
}
#elif defined(UBP_HAS_PAIRS)
int dot_product_flop() { return 4 * ubp::kSums * ubp::kWidth; }
float dot_products(int64_t steps, float) {
  const ubp::PairArithmetic::Elements ones = ubp::PairArithmetic::Elements{} + 0x3f803f80u;
  return ubp::loop<ubp::PairArithmetic>(steps, ones, ones);
}
#else
int dot_product_flop() { return 0; }
float dot_products(int64_t, float) { return 0; }
#endif
}
