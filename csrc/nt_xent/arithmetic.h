// What a tile is computed in: double (small problems), float, or pairs of bfloat16 summed in float; and the
// products of small matrices in each of them.
#pragma once

#include "common/convert.h"
#include "common/simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define UBP_MEMBER static inline __attribute__((always_inline))

namespace ubp {
namespace {

typedef double DoubleVec __attribute__((vector_size(kWidth * 4)));
typedef int64_t LongVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t PairVec __attribute__((vector_size(kWidth * 4)));

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

// exp(x) for x <= 709, relative error below 4e-16; anything under -708 gives 0. x = n ln2 + r with
// |r| <= ln2 / 2, then the first terms of the series of exp(r), times 2^n.
UBP_INLINE DoubleVec exponential(DoubleVec x) {
  const LongVec is_zero = x < DoubleVec{} - 708.0;
  const DoubleVec clamped = is_zero ? DoubleVec{} - 708.0 : x;
  const DoubleVec shifted = clamped * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52, as in simd.h
  const DoubleVec n = shifted - 6755399441055744.0;
  DoubleVec r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  constexpr double kInverseFactorials[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  DoubleVec p = DoubleVec{};
  for (const double coefficient : kInverseFactorials) p = p * r + coefficient;
  const LongVec exponent = (load_as<LongVec>(&shifted) + 1023) << 52;
  return is_zero ? DoubleVec{} : p * load_as<DoubleVec>(&exponent);
}

// `Real`: products, sums and gradients. `Element`: one step of a product, kPair numbers of a row.
// kPart: steps summed one after the other; the sums of the parts are added up. kLargestShared: see cpu.cpp.
struct DoubleArithmetic {
  using Real = double;
  using Vec = DoubleVec;
  using Int = int64_t;
  using IntVec = LongVec;
  using Element = double;
  using Elements = DoubleVec;
  static constexpr int kLanes = kWidth / 2, kPair = 1;
  static constexpr int64_t kPart = 4096;
  static constexpr double kLargestShared = 300.0;
  UBP_MEMBER Vec multiply_add(Elements a, Elements b, Vec sum) { return sum + a * b; }
};

struct FloatArithmetic {
  using Real = float;
  using Vec = ubp::Vec;
  using Int = int32_t;
  using IntVec = ubp::IntVec;
  using Element = float;
  using Elements = ubp::Vec;
  static constexpr int kLanes = kWidth, kPair = 1;
  static constexpr int64_t kPart = 32;
  static constexpr double kLargestShared = 60.0;
  UBP_MEMBER Vec multiply_add(Elements a, Elements b, Vec sum) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct PairArithmetic : FloatArithmetic {
  using Element = uint32_t;  // the number with the lower index in the lower half
  using Elements = PairVec;
  static constexpr int kPair = 2;
  static constexpr int64_t kPart = 4096;
  UBP_MEMBER Vec multiply_add(Elements a, Elements b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  // Rows 2 i and 2 i + 1 side by side: one step of a product over rows.
  static void join_rows(const uint32_t* even, const uint32_t* odd, int64_t steps, uint32_t* target) {
    for (int64_t step = 0; step < steps; ++step) {
      target[2 * step] = (even[step] & 0xffffu) | odd[step] << 16;
      target[2 * step + 1] = even[step] >> 16 | (odd[step] & 0xffff0000u);
    }
  }

  // One element of neighbours in a row, and one of neighbours in a column, from 16 numbers of two rows.
  UBP_MEMBER void round_pairs(Vec even, Vec odd, uint32_t* even_row, uint32_t* odd_row, uint32_t* columns) {
    typedef uint16_t Halves __attribute__((vector_size(32)));
    const auto low = (Halves)_mm512_cvtneps_pbh((__m512)even), high = (Halves)_mm512_cvtneps_pbh((__m512)odd);
    store_as(even_row, low);
    store_as(odd_row, high);
    store_as(columns, __builtin_convertvector(low, Elements) | __builtin_convertvector(high, Elements) << 16);
  }
};
#endif

template <class A>
struct Operand {
  const typename A::Element* data;
  int64_t stride;  // between rows, in elements
};

// C [kRows, kColumns vectors] (+)= A B over k steps; rows of A are broadcast element by element, with
// kIsTransposed A is stored as [k, rows]. What C held is added last: long sums are sums of short ones.
template <class A, bool kIsTransposed, int kRows, int kColumns>
UBP_INLINE void register_tile(typename A::Real* c, int64_t c_stride, Operand<A> a, Operand<A> b, int64_t k,
                              bool adds) {
  using V = typename A::Vec;
  using E = typename A::Elements;
  V sums[kRows][kColumns] = {};
  for (int64_t step = 0; step < k; ++step) {
    E right[kColumns];
#pragma GCC unroll 8
    for (int column = 0; column < kColumns; ++column)
      right[column] = load_as<E>(b.data + step * b.stride + column * A::kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const E left = E{} + (kIsTransposed ? a.data[step * a.stride + row] : a.data[row * a.stride + step]);
#pragma GCC unroll 8
      for (int column = 0; column < kColumns; ++column)
        sums[row][column] = A::multiply_add(left, right[column], sums[row][column]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int column = 0; column < kColumns; ++column) {
      typename A::Real* target = c + row * c_stride + column * A::kLanes;
      store_as(target, adds ? load_as<V>(target) + sums[row][column] : sums[row][column]);
    }
}

template <class A, bool kIsTransposed, int kColumns>
void column_strip(typename A::Real* c, int64_t c_stride, Operand<A> a, Operand<A> b, int64_t m, int64_t k,
                  bool adds) {
  const auto left = [&](int64_t at) {
    return Operand<A>{a.data + (kIsTransposed ? at : at * a.stride), a.stride};
  };
  int64_t row = 0;
  for (; row + kRegisterRows <= m; row += kRegisterRows)
    register_tile<A, kIsTransposed, kRegisterRows, kColumns>(c + row * c_stride, c_stride, left(row), b, k,
                                                             adds);
  for (; row + 2 <= m; row += 2)
    register_tile<A, kIsTransposed, 2, kColumns>(c + row * c_stride, c_stride, left(row), b, k, adds);
  if (row < m)
    register_tile<A, kIsTransposed, 1, kColumns>(c + row * c_stride, c_stride, left(row), b, k, adds);
}

// C [m, n] (+)= A B; n a multiple of the lanes.
template <class A, bool kIsTransposed>
void multiply(typename A::Real* c, int64_t c_stride, Operand<A> a, Operand<A> b, int64_t m, int64_t n,
              int64_t k, bool adds) {
  constexpr int kWide = kRegisterColumns * A::kLanes;
  int64_t column = 0;
  const auto right = [&] { return Operand<A>{b.data + column, b.stride}; };
  for (; column + kWide <= n; column += kWide)
    column_strip<A, kIsTransposed, kRegisterColumns>(c + column, c_stride, a, right(), m, k, adds);
  if (kRegisterColumns > 2 && column + 2 * A::kLanes <= n) {
    column_strip<A, kIsTransposed, 2>(c + column, c_stride, a, right(), m, k, adds);
    column += 2 * A::kLanes;
  }
  for (; column + A::kLanes <= n; column += A::kLanes)
    column_strip<A, kIsTransposed, 1>(c + column, c_stride, a, right(), m, k, adds);
}

template <class V>
UBP_INLINE auto add_lanes(V value) {
  constexpr int kCount = sizeof(V) / sizeof(value[0]);
  auto sum = value[0];
  for (int lane = 1; lane < kCount; ++lane) sum += value[lane];
  return sum;
}

template <class V>
UBP_INLINE auto largest_lane(V value) {
  constexpr int kCount = sizeof(V) / sizeof(value[0]);
  auto largest = value[0];
  for (int lane = 1; lane < kCount; ++lane) largest = value[lane] > largest ? value[lane] : largest;
  return largest;
}

}  // namespace
}  // namespace ubp
