// Small matrix products out of registers: C [m, n] = or += A [m, k] B [k, n], row-major, in one of three
// arithmetics: double, float, or pairs of bfloat16 summed in float.
#pragma once

#include "common/simd.h"

namespace ubp {
namespace {

// `Real`: products, sums and gradients. `Element`: one step of a product, kPair numbers of a row.
// kPart: steps summed one after the other; the sums of the parts are added up. kAddsLast: what C held is
// added to the sums at the end, so that long ones are sums of short ones; else the sums go on from it.
struct DoubleArithmetic {
  using Real = double;
  using Vec = DoubleVec;
  using Int = int64_t;
  using IntVec = Int64Vec;
  using Element = double;
  using Elements = DoubleVec;
  static constexpr int kLanes = kWidth / 2, kPair = 1;
  static constexpr int64_t kPart = 4096;
  static constexpr bool kAddsLast = true;
  UBP_INLINE Vec multiply_add(Elements a, Elements b, Vec sum) { return sum + a * b; }
};

struct FloatArithmetic {
  using Real = float;
  using Vec = ubp::Vec;
  using Int = int32_t;
  using IntVec = ubp::IntVec;
  using Element = float;
  using Elements = ubp::Vec;
  static constexpr int kLanes = kWidth, kPair = 1;
  static constexpr int64_t kPart = 64;
  static constexpr bool kAddsLast = true;
  UBP_INLINE Vec multiply_add(Elements a, Elements b, Vec sum) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct PairArithmetic : FloatArithmetic {
  using Element = uint32_t;  // the number with the lower index in the lower half
  typedef uint32_t Elements __attribute__((vector_size(kWidth * 4)));
  static constexpr int kPair = 2;
  static constexpr int64_t kPart = 4096;
  UBP_INLINE Vec multiply_add(Elements a, Elements b, Vec sum) {
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
  UBP_INLINE void round_pairs(Vec even, Vec odd, uint32_t* even_row, uint32_t* odd_row, uint32_t* columns) {
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

// C [kRows, kColumns vectors]. Rows of A are broadcast element by element; with kIsTransposed A is stored as
// [k, m].
template <class A, bool kIsTransposed, int kRows, int kColumns>
UBP_INLINE void register_tile(typename A::Real* c, int64_t c_stride, Operand<A> a, Operand<A> b, int64_t k,
                              bool adds) {
  using V = typename A::Vec;
  using E = typename A::Elements;
  V sums[kRows][kColumns];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int column = 0; column < kColumns; ++column)
      sums[row][column] = adds && !A::kAddsLast ? load_as<V>(c + row * c_stride + column * A::kLanes) : V{};
  for (int64_t step = 0; step < k; ++step) {
    E right[kColumns];
#pragma GCC unroll 8
    for (int column = 0; column < kColumns; ++column)
      right[column] = load_as<E>(b.data + step * b.stride + column * A::kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      // Minus nothing, unlike plus nothing, is the number itself, also where that is -0: no addition is left.
      const E left = (kIsTransposed ? a.data[step * a.stride + row] : a.data[row * a.stride + step]) - E{};
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
      store_as(target, adds && A::kAddsLast ? load_as<V>(target) + sums[row][column] : sums[row][column]);
    }
}

template <class A, bool kIsTransposed, int kColumns, int kRows>
UBP_INLINE void register_tile_of(int64_t rows, typename A::Real* c, int64_t c_stride, Operand<A> a,
                                 Operand<A> b, int64_t k, bool adds) {
  if (rows == kRows)
    register_tile<A, kIsTransposed, kRows, kColumns>(c, c_stride, a, b, k, adds);
  else if constexpr (kRows > 1)
    register_tile_of<A, kIsTransposed, kColumns, kRows - 1>(rows, c, c_stride, a, b, k, adds);
}

// Tiles of nearly equal height: a last tile of one row would wait for its own additions.
template <class A, bool kIsTransposed, int kColumns>
void column_strip(typename A::Real* c, int64_t c_stride, Operand<A> a, Operand<A> b, int64_t m, int64_t k,
                  bool adds) {
  for (int64_t tiles = ceil_div(m, kRegisterRows), row = 0; tiles > 0; --tiles) {
    const int64_t rows = ceil_div(m - row, tiles);
    const Operand<A> left{a.data + (kIsTransposed ? row : row * a.stride), a.stride};
    register_tile_of<A, kIsTransposed, kColumns, kRegisterRows>(rows, c + row * c_stride, c_stride, left, b,
                                                                k, adds);
    row += rows;
  }
}

// n must be a multiple of the lanes.
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

}  // namespace
}  // namespace ubp
