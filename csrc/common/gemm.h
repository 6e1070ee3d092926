// Small matrix products out of registers: C [m, n] = or += A [m, k] B [k, n], row-major, in one of three
// arithmetics: double, float, or pairs of bfloat16 summed in float.
#pragma once

#include "common/simd.h"

namespace ubp {
namespace {

// `Real`: products, sums and gradients. `Element`: one step of a product, kPair numbers of a row.
// kPart: steps summed one after the other; the sums of the parts are added up. kAddsLast: what C held is
// added to the sums at the end, so that long ones are sums of short ones; else the sums go on from it.
// kIsFar: C is then asked for at the start, because it lies beyond the first-level cache.
// kHasTiles: products are those of tiles.h, between begin_products and end_products of the same thread.
struct DoubleArithmetic {
  using Real = double;
  using Vec = DoubleVec;
  using Int = int64_t;
  using IntVec = Int64Vec;
  using Element = double;
  using Elements = DoubleVec;
  static constexpr int kLanes = kWidth / 2, kPair = 1;
  static constexpr int64_t kPart = 4096;
  static constexpr bool kAddsLast = true, kIsFar = false, kHasTiles = false;
  UBP_INLINE void begin_products() {}
  UBP_INLINE void end_products() {}
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
  static constexpr bool kAddsLast = true, kIsFar = false, kHasTiles = false;
  UBP_INLINE void begin_products() {}
  UBP_INLINE void end_products() {}
  UBP_INLINE Vec multiply_add(Elements a, Elements b, Vec sum) { return sum + a * b; }
};

// The machine has sums of products of pairs of bfloat16.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define UBP_HAS_PAIRS 1
struct PairArithmetic : FloatArithmetic {
  using Element = uint32_t;  // the number with the lower index in the lower half
  typedef uint32_t Elements __attribute__((vector_size(kWidth * 4)));
  static constexpr int kPair = 2;
  static constexpr int64_t kPart = 4096;
  typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));
#if defined(__aarch64__)
  UBP_INLINE Vec multiply_add(Elements a, Elements b, Vec sum) {
    return (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
  }
  UBP_INLINE Halves rounded(Vec value) { return (Halves)vcvt_bf16_f32((float32x4_t)value); }
#else
  UBP_INLINE Vec multiply_add(Elements a, Elements b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  UBP_INLINE Halves rounded(Vec value) { return (Halves)_mm512_cvtneps_pbh((__m512)value); }
#endif

  // Rows 2 i and 2 i + 1 side by side: one step of a product over rows.
  static void join_rows(const uint32_t* even, const uint32_t* odd, int64_t steps, uint32_t* target) {
    for (int64_t step = 0; step < steps; ++step) {
      target[2 * step] = (even[step] & 0xffffu) | odd[step] << 16;
      target[2 * step + 1] = even[step] >> 16 | (odd[step] & 0xffff0000u);
    }
  }

  // One element of neighbours in a row, and one of neighbours in a column, from a vector of each of two rows.
  UBP_INLINE void round_pairs(Vec even, Vec odd, uint32_t* even_row, uint32_t* odd_row, uint32_t* columns) {
    const Halves low = rounded(even), high = rounded(odd);
    store_as(even_row, low);
    store_as(odd_row, high);
    store_as(columns, __builtin_convertvector(low, Elements) | __builtin_convertvector(high, Elements) << 16);
  }
};
#endif

// Asks for memory that is needed soon, a little with every step, where the processor cannot guess what comes
// next.
class Prefetch {
 public:
  void add(const void* begin, int64_t bytes) {
    const char* at = static_cast<const char*>(begin);
    parts_[count_++] = {at, at + bytes};
    lines_ += bytes / kLine + 1;
  }

  // At most `most` lines with every step: what is asked for too fast holds up what is needed now.
  void spread(int64_t steps, int64_t most) {
    lines_per_step_ = steps == 0 ? 0 : smaller(lines_ / steps + 1, most);
  }

  // Not inlined: the loop over register tiles is slower with it.
  __attribute__((noinline)) void step(int64_t steps = 1) {
    for (int64_t line = 0; line < steps * lines_per_step_ && current_ < count_; ++line) {
      Part& part = parts_[current_];
      __builtin_prefetch(part.at, 0, 2);
      part.at += kLine;
      if (part.at >= part.end) ++current_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Part {
    const char *at, *end;
  };
  Part parts_[8];
  int count_ = 0, current_ = 0;
  int64_t lines_ = 0, lines_per_step_ = 0;
};

template <class A>
struct Operand {
  const typename A::Element* data;
  int64_t stride;  // between rows, in elements
};

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// A register tile of 2 x 2 blocks of sums. BFMMLA does to the four of a block what two steps of multiply_add
// do, with the same roundings. Where kRows is odd, the last row is a pair with itself.
template <class A, bool kIsTransposed, int kRows, int kColumns>
struct BlockTile {
  static constexpr int kPairs = (kRows + 1) / 2;
  float32x4_t sums[kPairs][kColumns][2];

  static constexpr int second(int pair) { return 2 * pair + 1 < kRows ? 2 * pair + 1 : 2 * pair; }

  // Two steps of two rows of A; of the last step of an odd number, the other is 0.
  template <bool kIsWhole>
  UBP_INLINE bfloat16x8_t rows_of(Operand<A> a, int64_t step, int pair) {
    const auto element = [&](int row, int64_t at) {
      return kIsTransposed ? a.data[at * a.stride + row] : a.data[row * a.stride + at];
    };
    const int one = 2 * pair, other = second(pair);
    const auto two = [&](int64_t row, int64_t column) { return vld1_u32(&a.data[row * a.stride + column]); };
    if (kIsWhole && !kIsTransposed) return (bfloat16x8_t)vcombine_u32(two(one, step), two(other, step));
    if (kIsWhole && other != one) {
      const uint32x2_t first = two(step, one), last = two(step + 1, one);
      return (bfloat16x8_t)vcombine_u32(vzip1_u32(first, last), vzip2_u32(first, last));
    }
    return (bfloat16x8_t)uint32x4_t{element(one, step), kIsWhole ? element(one, step + 1) : 0,
                                    element(other, step), kIsWhole ? element(other, step + 1) : 0};
  }

  template <bool kIsWhole>
  UBP_INLINE void add(BlockTile& tile, Operand<A> a, Operand<A> b, int64_t step) {
    bfloat16x8_t left[kPairs];
#pragma GCC unroll 12
    for (int pair = 0; pair < kPairs; ++pair) left[pair] = rows_of<kIsWhole>(a, step, pair);
#pragma GCC unroll 12
    for (int column = 0; column < kColumns; ++column) {
      const uint32_t* source = b.data + step * b.stride + column * A::kLanes;
      const uint32x4_t even = vld1q_u32(source), odd = kIsWhole ? vld1q_u32(source + b.stride) : uint32x4_t{};
      const auto first = (bfloat16x8_t)vzip1q_u32(even, odd), last = (bfloat16x8_t)vzip2q_u32(even, odd);
#pragma GCC unroll 12
      for (int pair = 0; pair < kPairs; ++pair) {
        tile.sums[pair][column][0] = vbfmmlaq_f32(tile.sums[pair][column][0], left[pair], first);
        tile.sums[pair][column][1] = vbfmmlaq_f32(tile.sums[pair][column][1], left[pair], last);
      }
    }
  }

  UBP_INLINE void multiply(float* c, int64_t c_stride, Operand<A> a, Operand<A> b, int64_t k, bool adds) {
    BlockTile tile;
    const bool goes_on = adds && !A::kAddsLast;
#pragma GCC unroll 12
    for (int pair = 0; pair < kPairs; ++pair)
#pragma GCC unroll 12
      for (int column = 0; column < kColumns; ++column) {
        const float *one = c + 2 * pair * c_stride + column * 4,
                    *other = c + second(pair) * c_stride + column * 4;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
          tile.sums[pair][column][half] =
              goes_on ? vcombine_f32(vld1_f32(one + 2 * half), vld1_f32(other + 2 * half)) : float32x4_t{};
      }
    int64_t step = 0;
    for (; step + 2 <= k; step += 2) add<true>(tile, a, b, step);
    if (step < k) add<false>(tile, a, b, step);
#pragma GCC unroll 12
    for (int pair = 0; pair < kPairs; ++pair)
#pragma GCC unroll 12
      for (int column = 0; column < kColumns; ++column) {
        const float32x4_t first = tile.sums[pair][column][0], last = tile.sums[pair][column][1];
        const auto write = [&](int row, float32x4_t sums) {
          float* target = c + row * c_stride + column * 4;
          vst1q_f32(target, adds && A::kAddsLast ? vaddq_f32(vld1q_f32(target), sums) : sums);
        };
        write(2 * pair, vcombine_f32(vget_low_f32(first), vget_low_f32(last)));
        if (2 * pair + 1 < kRows)
          write(2 * pair + 1, vcombine_f32(vget_high_f32(first), vget_high_f32(last)));
      }
  }
};
#endif

// C [kRows, kColumns vectors]. Rows of A are broadcast element by element; with kIsTransposed A is stored as
// [k, m].
template <class A, bool kIsTransposed, int kRows, int kColumns>
UBP_INLINE void register_tile(typename A::Real* c, int64_t c_stride, Operand<A> a, Operand<A> b, int64_t k,
                              bool adds) {
  using V = typename A::Vec;
  using E = typename A::Elements;
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  if constexpr (A::kPair == 2)
    return BlockTile<A, kIsTransposed, kRows, kColumns>::multiply(c, c_stride, a, b, k, adds);
#endif
  V sums[kRows][kColumns];
  if (adds && A::kIsFar)
    for (int row = 0; row < kRows; ++row)
      for (int column = 0; column < kColumns; ++column)
        __builtin_prefetch(c + row * c_stride + column * A::kLanes, 1);
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 12
    for (int column = 0; column < kColumns; ++column)
      sums[row][column] = adds && !A::kAddsLast ? load_as<V>(c + row * c_stride + column * A::kLanes) : V{};
  for (int64_t step = 0; step < k; ++step) {
    E right[kColumns];
#pragma GCC unroll 12
    for (int column = 0; column < kColumns; ++column)
      right[column] = load_as<E>(b.data + step * b.stride + column * A::kLanes);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      // Minus nothing, unlike plus nothing, is the number itself, also where that is -0: no addition is left.
      const E left = (kIsTransposed ? a.data[step * a.stride + row] : a.data[row * a.stride + step]) - E{};
#pragma GCC unroll 12
      for (int column = 0; column < kColumns; ++column)
        sums[row][column] = A::multiply_add(left, right[column], sums[row][column]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 12
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

// Rows of a register tile: the fewer columns, the more.
constexpr int tile_rows(int64_t columns) {
  return columns == 1 ? 12 : kRegisterColumns * kRegisterRows / static_cast<int>(columns);
}

// Tiles of nearly equal height: a last tile of one row would wait for its own additions.
template <class A, bool kIsTransposed, int kColumns>
void column_strip(typename A::Real* c, int64_t c_stride, Operand<A> a, Operand<A> b, int64_t m, int64_t k,
                  bool adds, Prefetch* prefetch) {
  constexpr int kRows = tile_rows(kColumns);
  for (int64_t tiles = ceil_div(m, kRows), row = 0; tiles > 0; --tiles) {
    const int64_t rows = ceil_div(m - row, tiles);
    const Operand<A> left{a.data + (kIsTransposed ? row : row * a.stride), a.stride};
    if (prefetch != nullptr) prefetch->step();
    register_tile_of<A, kIsTransposed, kColumns, kRows>(rows, c + row * c_stride, c_stride, left, b, k, adds);
    row += rows;
  }
}

template <class A, bool kIsTransposed, int kColumns>
void column_strip_of(int64_t columns, typename A::Real* c, int64_t c_stride, Operand<A> a, Operand<A> b,
                     int64_t m, int64_t k, bool adds, Prefetch* prefetch) {
  if (columns == kColumns)
    column_strip<A, kIsTransposed, kColumns>(c, c_stride, a, b, m, k, adds, prefetch);
  else if constexpr (kColumns > 1)
    column_strip_of<A, kIsTransposed, kColumns - 1>(columns, c, c_stride, a, b, m, k, adds, prefetch);
}

// n must be a multiple of the lanes. Strips of nearly equal width, too. `prefetch` takes a step with every
// register tile.
template <class A, bool kIsTransposed>
void multiply(typename A::Real* c, int64_t c_stride, Operand<A> a, Operand<A> b, int64_t m, int64_t n,
              int64_t k, bool adds, Prefetch* prefetch = nullptr) {
  if constexpr (A::kHasTiles) {
    A::template product<kIsTransposed>(c, c_stride, a.data, a.stride, b.data, b.stride, m, n, k, adds,
                                       prefetch);
  } else {
    const int64_t vectors = n / A::kLanes;
    for (int64_t strips = ceil_div(vectors, kRegisterColumns), vector = 0; strips > 0; --strips) {
      const int64_t columns = ceil_div(vectors - vector, strips), at = vector * A::kLanes;
      column_strip_of<A, kIsTransposed, kRegisterColumns>(columns, c + at, c_stride, a,
                                                          {b.data + at, b.stride}, m, k, adds, prefetch);
      vector += columns;
    }
  }
}

// Register tiles of a product.
template <class A>
int64_t count_tiles(int64_t m, int64_t n) {
  if constexpr (A::kHasTiles) return ceil_div(m, A::kBlock) * ceil_div(n, A::kBlock);
  int64_t tiles = 0;
  for (int64_t vectors = ceil_div(n, A::kLanes), strips = ceil_div(vectors, kRegisterColumns); strips > 0;
       --strips) {
    const int64_t columns = ceil_div(vectors, strips);
    tiles += ceil_div(m, tile_rows(columns));
    vectors -= columns;
  }
  return tiles;
}

}  // namespace
}  // namespace ubp
