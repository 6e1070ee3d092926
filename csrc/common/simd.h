// One vector type for all instruction sets: the vector extensions of GCC and Clang, as wide as the unit is
// compiled for.
//
// The operators +, -, *, comparison and ?: work on it lane by lane; with -ffp-contract=fast a * b + c is one
// FMA. Everything is static: a unit compiled for AVX-512 must not leave symbols that another unit could be
// linked to.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define UBP_INLINE static inline __attribute__((always_inline))

// The namespace of the instruction set that a unit is compiled for.
#define UBP_JOIN_(a, b) a##b
#define UBP_JOIN(a, b) UBP_JOIN_(a, b)
#define UBP_ISA_NAMESPACE UBP_JOIN(isa_, UBP_ISA)

namespace ubp {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kRegisterColumns = 4;  // 6 x 4 accumulators of the 32 registers
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kRegisterColumns = 2;  // 6 x 2 accumulators of the 16 registers
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kRegisterColumns = 4;  // 6 x 4 accumulators of the 32 registers
#else
constexpr int kWidth = 4;
constexpr int kRegisterColumns = 2;
#endif
constexpr int kRegisterRows = 6;

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef double DoubleVec __attribute__((vector_size(kWidth * 4)));
typedef int64_t Int64Vec __attribute__((vector_size(kWidth * 4)));

UBP_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
UBP_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
UBP_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
UBP_INLINE int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

template <class V, class Number>
UBP_INLINE V load_as(const Number* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

template <class V, class Number>
UBP_INLINE void store_as(Number* target, V value) {
  std::memcpy(target, &value, sizeof(V));
}

UBP_INLINE Vec load(const float* source) { return load_as<Vec>(source); }
UBP_INLINE void store(float* target, Vec value) { store_as(target, value); }

UBP_INLINE Vec broadcast(float value) { return Vec{} + value; }

// The number itself, of which the compiler knows nothing: no product becomes part of an FMA.
UBP_INLINE Vec rounded_by_itself(Vec value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  asm("" : "+x"(value));
#endif
  return value;
}

UBP_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// Lane numbers. Written out: GCC builds vectors that a loop fills lane by lane when it runs, not before.
UBP_INLINE IntVec lanes() {
#if defined(__AVX512F__)
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return IntVec{0, 1, 2, 3};
#endif
}

// Where the lanes of a result come from, counted over two vectors side by side, 0 .. 2 kWidth - 1.
template <int kDistance>
struct Rotated {  // by kDistance, around the end of the first
  static constexpr int source(int lane) { return (lane + kDistance) & (kWidth - 1); }
};
template <int kHalf>
struct Upper {  // groups of kHalf lanes: the first ones of both, in turns
  static constexpr int source(int lane) { return (lane & kHalf) == 0 ? lane : lane - kHalf + kWidth; }
};
template <int kHalf>
struct Lower {  // the second ones
  static constexpr int source(int lane) { return (lane & kHalf) == 0 ? lane + kHalf : lane + kWidth; }
};

template <class Order, int... kLane>
UBP_INLINE Vec shuffle(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, Order::source(kLane)...);
}

template <class Order>
UBP_INLINE Vec shuffle(Vec a, Vec b) {
  return shuffle<Order>(a, b, std::make_integer_sequence<int, kWidth>{});
}

template <int kHalf = kWidth / 2>
UBP_INLINE float sum_lanes(Vec value) {
  value += shuffle<Rotated<kHalf>>(value, value);
  if constexpr (kHalf > 1) return sum_lanes<kHalf / 2>(value);
  return value[0];
}

template <int kHalf = kWidth / 2>
UBP_INLINE float max_lanes(Vec value) {
  value = maximum(value, shuffle<Rotated<kHalf>>(value, value));
  if constexpr (kHalf > 1) return max_lanes<kHalf / 2>(value);
  return value[0];
}

// Rows become columns, by exchanging halves, then quarters, and so on.
template <int kHalf>
UBP_INLINE void transpose_halves(Vec (&rows)[kWidth]) {
#pragma GCC unroll 16
  for (int row = 0; row < kWidth; ++row) {
    if ((row & kHalf) != 0) continue;
    const Vec a = rows[row], b = rows[row + kHalf];
    rows[row] = shuffle<Upper<kHalf>>(a, b);
    rows[row + kHalf] = shuffle<Lower<kHalf>>(a, b);
  }
  if constexpr (kHalf > 1) transpose_halves<kHalf / 2>(rows);
}

// exp(x) for x <= 88, relative error below 3e-7; anything under -87.3, minus infinity too, gives 0. NaN stays
// NaN. x = n ln2 + r with |r| <= ln2 / 2, then a degree 6 polynomial for exp(r) (Cephes coefficients) times
// 2^n.
UBP_INLINE Vec polynomial_of_exponential(Vec r) {
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + (r + 1.f);
}

UBP_INLINE Vec exponential(Vec x) {
#if defined(__AVX512F__)
  const __mmask16 is_counted = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  const Vec n = (Vec)_mm512_maskz_roundscale_ps(0xffff, (__m512)(x * 1.44269504f),
                                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  return (Vec)_mm512_maskz_scalef_ps(is_counted, (__m512)polynomial_of_exponential(r), (__m512)n);
#else
  const IntVec is_zero = x < broadcast(-87.3f);
  const Vec clamped = is_zero ? broadcast(-87.3f) : x;
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer; its low bits are that integer.
  const Vec shifted = clamped * 1.44269504f + 12582912.f;
  const Vec n = shifted - 12582912.f;
  Vec r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const IntVec exponent = (bits + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof(power));
  return is_zero ? Vec{} : polynomial_of_exponential(r) * power;
#endif
}

// exp(x) for x <= 709, relative error below 4e-16; anything under -708 gives 0. x = n ln2 + r with
// |r| <= ln2 / 2, then the first terms of the series of exp(r), times 2^n.
UBP_INLINE DoubleVec exponential(DoubleVec x) {
  const Int64Vec is_zero = x < DoubleVec{} - 708.0;
  const DoubleVec clamped = is_zero ? DoubleVec{} - 708.0 : x;
  const DoubleVec shifted = clamped * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52
  const DoubleVec n = shifted - 6755399441055744.0;
  DoubleVec r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  constexpr double kInverseFactorials[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  DoubleVec p = DoubleVec{};
  for (const double coefficient : kInverseFactorials) p = p * r + coefficient;
  const Int64Vec exponent = (load_as<Int64Vec>(&shifted) + 1023) << 52;
  return is_zero ? DoubleVec{} : p * load_as<DoubleVec>(&exponent);
}

}  // namespace
}  // namespace ubp
