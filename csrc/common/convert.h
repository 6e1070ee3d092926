// float32 <-> bfloat16 and float16, rounding to nearest even.
#pragma once

#include "common/simd.h"

namespace ubp {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &value, sizeof(half));
  return half;
#else
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x400u) {
    const float tiny =
        static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, the step of subnormals
    return sign != 0 ? -tiny : tiny;
  }
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

inline void from_float(float value, float& target) { target = value; }

inline void from_float(float value, BFloat16& target) {
  const uint32_t bits = float_to_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  target.bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_float(float value, Float16& target) {
#if defined(__F16C__)
  target.bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const __fp16 half = value;
  std::memcpy(&target, &half, sizeof(half));
#else
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    target.bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    target.bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 puts the rounded digits into the low bits
    target.bits =
        static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  } else {
    target.bits =
        static_cast<uint16_t>(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13));
  }
#endif
}

typedef uint16_t HalfVec __attribute__((vector_size(kWidth * 2)));

// kWidth numbers at once.
UBP_INLINE Vec load_floats(const float* source) { return load(source); }

UBP_INLINE Vec load_floats(const BFloat16* source) {
  HalfVec halves;
  std::memcpy(&halves, source, sizeof(halves));
  const IntVec bits = __builtin_convertvector(halves, IntVec) << 16;
  Vec value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

UBP_INLINE Vec load_floats(const Float16* source) {
#if defined(__AVX512F__)
  // The form with a mask: GCC 12 warns about its own header at the plain one.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__) && defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16(load_as<float16x4_t>(source));
#else
  Vec value;
  for (int lane = 0; lane < kWidth; ++lane) value[lane] = to_float(source[lane]);
  return value;
#endif
}

UBP_INLINE void store_floats(float* target, Vec value) { store(target, value); }

UBP_INLINE void store_floats(BFloat16* target, Vec value) {
  IntVec bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfVec halves = __builtin_convertvector(value == value ? rounded : IntVec{} + 0x7fc0, HalfVec);
  std::memcpy(target, &halves, sizeof(halves));
}

UBP_INLINE void store_floats(Float16* target, Vec value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  store_as(target, vcvt_f16_f32((float32x4_t)value));
#else
  for (int lane = 0; lane < kWidth; ++lane) from_float(value[lane], target[lane]);
#endif
}

}  // namespace
}  // namespace ubp
