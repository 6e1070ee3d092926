// Products of pairs of bfloat16 by AMX: eight registers of 16 rows of 64 bytes, and one instruction that
// multiplies two of them. What it is given are the operands of `multiply` as they lie: rows of A, and two
// rows of B side by side.
//
// Edges are copies with zeros behind them, so that one configuration of the registers serves all products.
// Each sum is made of 16 steps at a time, from the first on: equal rows have equal products wherever they
// are.
#pragma once

#include "common/gemm.h"

#if defined(__AMX_BF16__) || defined(UBP_EMULATES_TILES)
#define UBP_HAS_TILES 1
#endif

namespace ubp {
namespace {

#if defined(UBP_HAS_TILES)

constexpr int64_t kTile = 16;  // rows of a register, and its columns of 32 bits
static_assert(kWidth == kTile, "a vector is a row of a register");

struct TileConfiguration {
  uint8_t palette, first_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64, "as the instruction reads it");

constexpr TileConfiguration kWholeTiles{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile}};

#if defined(UBP_EMULATES_TILES)

// The instructions in plain C++, for machines without. What the processor refuses ends the process here, too.
struct TileRegisters {
  TileConfiguration shape;  // palette 0: none
  IntVec rows[8][kTile];
};
static thread_local TileRegisters registers;

UBP_INLINE void require(bool is_legal) {
  if (!is_legal) __builtin_trap();
}

UBP_INLINE Vec flushed(Vec value) {
  const IntVec bits = load_as<IntVec>(&value), sign = bits & INT32_MIN;
  const IntVec result = (bits & 0x7f800000) == 0 ? sign : bits;
  return load_as<Vec>(&result);
}

UBP_INLINE Vec as_floats(IntVec bits) { return load_as<Vec>(&bits); }

inline void configure_tiles(const TileConfiguration& shape) {
  require(shape.palette == 1 && shape.first_row == 0);
  for (int tile = 0; tile < 8; ++tile) require(shape.rows[tile] <= kTile && shape.row_bytes[tile] <= 64);
  registers = {};
  registers.shape = shape;
}

inline void release_tiles() { registers = {}; }

template <int kRegister>
void load_tile(const void* source, int64_t stride_bytes) {
  require(registers.shape.palette == 1);
  for (int row = 0; row < kTile; ++row) {
    registers.rows[kRegister][row] = IntVec{};
    if (row < registers.shape.rows[kRegister])
      std::memcpy(&registers.rows[kRegister][row], static_cast<const char*>(source) + row * stride_bytes,
                  registers.shape.row_bytes[kRegister]);
  }
}

template <int kRegister>
void store_tile(void* target, int64_t stride_bytes) {
  require(registers.shape.palette == 1);
  for (int row = 0; row < registers.shape.rows[kRegister]; ++row)
    std::memcpy(static_cast<char*>(target) + row * stride_bytes, &registers.rows[kRegister][row],
                registers.shape.row_bytes[kRegister]);
}

template <int kRegister>
void clear_tile() {
  require(registers.shape.palette == 1);
  for (IntVec& row : registers.rows[kRegister]) row = IntVec{};
}

// Sums of the products of the first and of the second numbers of all pairs, each from 0 on; then both and
// what the register held. Denormal numbers are 0, going in and coming out.
template <int kSums, int kLeft, int kRight>
void multiply_tiles() {
  const TileConfiguration& shape = registers.shape;
  require(shape.palette == 1 && shape.rows[kSums] == shape.rows[kLeft] &&
          shape.row_bytes[kSums] == shape.row_bytes[kRight] &&
          shape.row_bytes[kLeft] == 4 * shape.rows[kRight]);
  constexpr int32_t kUpper = static_cast<int32_t>(0xffff0000u);
  for (int row = 0; row < shape.rows[kSums]; ++row) {
    const IntVec left = registers.rows[kLeft][row];
    Vec even = {}, odd = {};
    for (int step = 0; step < shape.row_bytes[kLeft] / 4; ++step) {
      const IntVec pair = IntVec{} + left[step], right = registers.rows[kRight][step];
      const auto first = [](IntVec pairs) { return flushed(as_floats(pairs << 16)); };
      const auto second = [](IntVec pairs) { return flushed(as_floats(pairs & kUpper)); };
      even = flushed(first(pair) * first(right) + even);
      odd = flushed(second(pair) * second(right) + odd);
    }
    IntVec& sums = registers.rows[kSums][row];
    store_as(&sums, flushed(flushed(as_floats(sums)) + flushed(even + odd)));
  }
}

#else

// Not the compiler's intrinsics: those of GCC say neither that they read memory nor that they write it.
UBP_INLINE void configure_tiles(const TileConfiguration& shape) { asm volatile("ldtilecfg %0" ::"m"(shape)); }
UBP_INLINE void release_tiles() { asm volatile("tilerelease"); }
template <int kRegister>
UBP_INLINE void load_tile(const void* source, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride_bytes), "i"(kRegister) : "memory");
}
template <int kRegister>
UBP_INLINE void store_tile(void* target, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride_bytes), "i"(kRegister) : "memory");
}
template <int kRegister>
UBP_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}
template <int kSums, int kLeft, int kRight>
UBP_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

#endif

// The first `count` numbers, and zeros.
UBP_INLINE IntVec load_some(const uint32_t* source, int64_t count) {
  const int64_t some = count < 0 ? 0 : smaller(count, kTile);
  return (IntVec)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << some) - 1), source);
}

struct TileArithmetic : PairArithmetic {
  static constexpr bool kHasTiles = true;
  static constexpr int64_t kBlock = 2 * kTile;  // rows and columns of a block of sums: registers 0 to 3
  UBP_INLINE void begin_products() { configure_tiles(kWholeTiles); }
  UBP_INLINE void end_products() { release_tiles(); }

  // As `multiply` in gemm.h; k is at least 1.
  template <bool kIsTransposed>
  static void product(float* c, int64_t c_stride, const uint32_t* a, int64_t a_stride, const uint32_t* b,
                      int64_t b_stride, int64_t m, int64_t n, int64_t k, bool adds, Prefetch* prefetch) {
    alignas(64) uint32_t left_copy[kBlock * kCopyStride], tail[kTile * kBlock];
    alignas(64) float sums[kBlock * kBlock];
    for (int64_t first = 0; first < k; first += kDepth, adds = true) {
      const int64_t steps = smaller(kDepth, k - first), whole = steps / kTile * kTile;
      for (int64_t row = 0; row < m; row += kBlock) {
        const int64_t rows = smaller(kBlock, m - row);
        const uint32_t* left = a + (kIsTransposed ? first * a_stride + row : row * a_stride + first);
        int64_t left_stride = a_stride;
        if (kIsTransposed || rows % kTile != 0 || whole < steps) {
          copy_left<kIsTransposed>(left, a_stride, rows, steps, left_copy);
          left = left_copy;
          left_stride = kCopyStride;
        }
        for (int64_t column = 0; column < n; column += kBlock) {
          if (prefetch != nullptr) prefetch->step();
          const int64_t columns = smaller(kBlock, n - column);
          const uint32_t* right = b + first * b_stride + column;
          if (whole < steps)
            for (int64_t at = 0; at < kTile * kBlock; at += kTile)
              store_as(tail + at, load_some(right + (whole + at / kBlock) * b_stride + at % kBlock,
                                            whole + at / kBlock < steps ? columns - at % kBlock : 0));
          float* target = c + row * c_stride + column;
          const bool is_edge = rows % kTile != 0;
          if (is_edge && adds) copy_sums(target, c_stride, rows, columns, sums, kBlock);
          const auto of_size = rows > kTile ? (columns > kTile ? &block<2, 2> : &block<2, 1>)
                                            : (columns > kTile ? &block<1, 2> : &block<1, 1>);
          of_size(is_edge ? sums : target, is_edge ? kBlock : c_stride, left, left_stride, right, b_stride,
                  whole, whole < steps ? tail : nullptr, adds);
          if (is_edge) copy_sums(sums, kBlock, rows, columns, target, c_stride);
        }
      }
    }
  }

 private:
  static constexpr int64_t kDepth = 128;                  // steps of a block that are copied at a time
  static constexpr int64_t kCopyStride = kDepth + kTile;  // no power of two

  // Whole registers of rows and steps.
  template <bool kIsTransposed>
  static void copy_left(const uint32_t* source, int64_t stride, int64_t rows, int64_t steps,
                        uint32_t* target) {
    for (int64_t row = 0; row < rows; row += kTile)
      for (int64_t step = 0; step < steps; step += kTile) {
        Vec part[kTile];
#pragma GCC unroll 16
        for (int64_t at = 0; at < kTile; ++at) {
          const int64_t of_row = kIsTransposed ? step + at : row + at, of_all = kIsTransposed ? steps : rows,
                        begin = kIsTransposed ? row : step, end = kIsTransposed ? rows : steps;
          part[at] =
              (Vec)load_some(source + of_row * stride + begin, of_row < of_all ? end - begin : int64_t{0});
        }
        if (kIsTransposed) transpose_halves<kTile / 2>(part);
#pragma GCC unroll 16
        for (int64_t at = 0; at < kTile; ++at) store_as(target + (row + at) * kCopyStride + step, part[at]);
      }
  }

  static void copy_sums(const float* source, int64_t source_stride, int64_t rows, int64_t columns,
                        float* target, int64_t target_stride) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; column += kTile)
        store(target + row * target_stride + column, load(source + row * source_stride + column));
  }

  // 16 steps: registers 4 and 5 are rows of A, 6 and 7 columns of B.
  template <int kRows, int kColumns>
  UBP_INLINE void add_steps(const uint32_t* left, int64_t left_stride, const uint32_t* right,
                            int64_t right_stride) {
    load_tile<4>(left, left_stride * 4);
    load_tile<6>(right, right_stride * 4);
    multiply_tiles<0, 4, 6>();
    if constexpr (kRows == 2) {
      load_tile<5>(left + kTile * left_stride, left_stride * 4);
      multiply_tiles<2, 5, 6>();
    }
    if constexpr (kColumns == 2) {
      load_tile<7>(right + kTile, right_stride * 4);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (kRows == 2 && kColumns == 2) multiply_tiles<3, 5, 7>();
  }

  // `tail`, if any: the last steps of B [16, kBlock].
  template <int kRows, int kColumns>
  static void block(float* c, int64_t c_stride, const uint32_t* left, int64_t left_stride,
                    const uint32_t* right, int64_t right_stride, int64_t whole, const uint32_t* tail,
                    bool adds) {
    float* const lower = c + kTile * c_stride;
    adds ? load_tile<0>(c, c_stride * 4) : clear_tile<0>();
    if constexpr (kColumns == 2) adds ? load_tile<1>(c + kTile, c_stride * 4) : clear_tile<1>();
    if constexpr (kRows == 2) adds ? load_tile<2>(lower, c_stride * 4) : clear_tile<2>();
    if constexpr (kRows == 2 && kColumns == 2)
      adds ? load_tile<3>(lower + kTile, c_stride * 4) : clear_tile<3>();
    for (int64_t step = 0; step < whole; step += kTile)
      add_steps<kRows, kColumns>(left + step, left_stride, right + step * right_stride, right_stride);
    if (tail != nullptr) add_steps<kRows, kColumns>(left + whole, left_stride, tail, kBlock);
    store_tile<0>(c, c_stride * 4);
    if constexpr (kColumns == 2) store_tile<1>(c + kTile, c_stride * 4);
    if constexpr (kRows == 2) store_tile<2>(lower, c_stride * 4);
    if constexpr (kRows == 2 && kColumns == 2) store_tile<3>(lower + kTile, c_stride * 4);
  }
};

using BFloat16Arithmetic = TileArithmetic;

#elif defined(UBP_HAS_PAIRS)

using BFloat16Arithmetic = PairArithmetic;

#endif

}  // namespace
}  // namespace ubp
