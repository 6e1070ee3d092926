// Small matrix products out of registers: C [m, n] (+)= A [m, k] B [k, n], row-major, n a multiple of kWidth.
#pragma once

#include "common/simd.h"

namespace ubp {
namespace {

struct Operand {
  const float* data;
  int64_t stride;  // between rows, in floats
};

// Rows of A are broadcast element by element; with kIsTransposed A is stored as [k, m].
template <bool kIsTransposed, int kRows, int kColumns>
UBP_INLINE void register_tile(float* c, int64_t c_stride, Operand a, Operand b, int64_t k, bool adds) {
  Vec sums[kRows][kColumns];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int column = 0; column < kColumns; ++column)
      sums[row][column] = adds ? load(c + row * c_stride + column * kWidth) : Vec{};
  for (int64_t step = 0; step < k; ++step) {
    Vec right[kColumns];
#pragma GCC unroll 8
    for (int column = 0; column < kColumns; ++column)
      right[column] = load(b.data + step * b.stride + column * kWidth);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Vec left =
          broadcast(kIsTransposed ? a.data[step * a.stride + row] : a.data[row * a.stride + step]);
#pragma GCC unroll 8
      for (int column = 0; column < kColumns; ++column) sums[row][column] += left * right[column];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int column = 0; column < kColumns; ++column)
      store(c + row * c_stride + column * kWidth, sums[row][column]);
}

// Tiles of nearly equal height: a last tile of one row would wait for its own additions.
template <bool kIsTransposed, int kColumns>
void column_strip(float* c, int64_t c_stride, Operand a, Operand b, int64_t m, int64_t k, bool adds) {
  for (int64_t tiles = (m + kRegisterRows - 1) / kRegisterRows, row = 0; tiles > 0; --tiles) {
    const int64_t rows = (m - row + tiles - 1) / tiles;
    const Operand left{a.data + (kIsTransposed ? row : row * a.stride), a.stride};
    float* target = c + row * c_stride;
    row += rows;
    switch (rows) {
      case 6:
        register_tile<kIsTransposed, 6, kColumns>(target, c_stride, left, b, k, adds);
        break;
      case 5:
        register_tile<kIsTransposed, 5, kColumns>(target, c_stride, left, b, k, adds);
        break;
      case 4:
        register_tile<kIsTransposed, 4, kColumns>(target, c_stride, left, b, k, adds);
        break;
      case 3:
        register_tile<kIsTransposed, 3, kColumns>(target, c_stride, left, b, k, adds);
        break;
      case 2:
        register_tile<kIsTransposed, 2, kColumns>(target, c_stride, left, b, k, adds);
        break;
      default:
        register_tile<kIsTransposed, 1, kColumns>(target, c_stride, left, b, k, adds);
        break;
    }
  }
}

template <bool kIsTransposed>
void multiply(float* c, int64_t c_stride, Operand a, Operand b, int64_t m, int64_t n, int64_t k, bool adds) {
  int64_t column = 0;
  const auto right = [&] { return Operand{b.data + column, b.stride}; };
  for (; column + kRegisterColumns * kWidth <= n; column += kRegisterColumns * kWidth)
    column_strip<kIsTransposed, kRegisterColumns>(c + column, c_stride, a, right(), m, k, adds);
  if (kRegisterColumns > 2 && column + 2 * kWidth <= n) {
    column_strip<kIsTransposed, 2>(c + column, c_stride, a, right(), m, k, adds);
    column += 2 * kWidth;
  }
  for (; column + kWidth <= n; column += kWidth)
    column_strip<kIsTransposed, 1>(c + column, c_stride, a, right(), m, k, adds);
}

}  // namespace
}  // namespace ubp
