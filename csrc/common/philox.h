// Philox4x32 with 10 rounds, one number per lane: random bits that depend on a counter and a seed only.
//
// Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
#pragma once

#include "common/simd.h"

namespace ubp {
namespace {

typedef uint32_t WordVec __attribute__((vector_size(kWidth * 4)));
typedef uint64_t LongVec __attribute__((vector_size(kWidth * 4)));

// Products of the low words of all 64-bit lanes, whatever their high words hold.
UBP_INLINE LongVec multiply_low_words(LongVec a, uint32_t factor) {
#if defined(__aarch64__)
  return (LongVec)vmull_n_u32(vmovn_u64((uint64x2_t)a), factor);
#else
  const LongVec b = LongVec{} + factor;
#if defined(__AVX512F__)
  return reinterpret_cast<LongVec>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<LongVec>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<LongVec>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
#endif
}

// Word 0 for the counter (low word of each lane, `second`, `third`, 0). The numbers are in the low words of
// the result; the high words hold remains of the products.
UBP_INLINE LongVec philox(LongVec first, uint32_t second, uint32_t third, uint64_t seed) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  LongVec a = first, b = LongVec{} + second, c = LongVec{} + third, d = {};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const LongVec left = multiply_low_words(a, 0xD2511F53u), right = multiply_low_words(c, 0xCD9E8D57u);
    a = (right >> 32) ^ b ^ low;
    b = right;
    c = (left >> 32) ^ d ^ high;
    d = left;
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return a;
}

// The same for kWidth counters that follow each other from `first` on, in the order of the lanes.
UBP_INLINE WordVec philox_words(uint32_t first, uint32_t second, uint32_t third, uint64_t seed) {
  const WordVec counters = reinterpret_cast<WordVec>(lanes()) + first;
  LongVec even;
  std::memcpy(&even, &counters, sizeof(even));
  const LongVec odd = even >> 32;
  const LongVec words =
      (philox(even, second, third, seed) & 0xffffffffu) | (philox(odd, second, third, seed) << 32);
  WordVec result;
  std::memcpy(&result, &words, sizeof(result));
  return result;
}

}  // namespace
}  // namespace ubp
