// float16 and bfloat16: scalar conversions, and vector loads and stores that convert, for each ISA
// level, all with the same bits.
//
// Narrowing rounds to nearest even and keeps subnormals; NaN becomes 0x7e00 (float16) or 0x7fc0
// (bfloat16) whatever its sign and payload. Both are done by integers where hardware differs:
// vcvtneps2bf16 flushes subnormals, vcvtps2ph keeps payloads. Widening is exact.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/cpu.h"

namespace fedmap {

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The least float32 magnitude, as bits, that T rounds to infinity: half a step above its largest.
template <class T>
constexpr uint32_t kOverflowBits = 0x7f800000;
template <>
inline constexpr uint32_t kOverflowBits<Float16> = 0x477ff000;
template <>
inline constexpr uint32_t kOverflowBits<Bfloat16> = 0x7f7f8000;

// Whether x is NaN or infinite once in T, and whether it overflowed on the way there.
template <class T>
inline int not_finite(float x) {
  return (float_bits(x) & 0x7fffffff) >= kOverflowBits<T>;
}
template <class T>
inline int overflows(float x) {
  return not_finite<T>(x) - not_finite<float>(x);
}

inline float widen(float x) {
  return x;
}
inline float widen(Bfloat16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}
inline float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude > 0x7c00) // as vcvtph2ps: quiet, payload kept
    return bits_float(sign | 0x7fc00000 | magnitude << 13);
  if (magnitude == 0x7c00)
    return bits_float(sign | 0x7f800000);
  if (magnitude >= 0x0400)
    return bits_float(sign | ((magnitude << 13) + 0x38000000));
  return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
}

template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline Bfloat16 narrow<Bfloat16>(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000)
    return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 narrow<Float16>(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    return {0x7e00};
  if (magnitude >= kOverflowBits<Float16>)
    half = 0x7c00;
  else if (magnitude >= 0x38800000)
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  else // one step of a subnormal float16 is one of the float32 numbers in [0.5, 1)
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000;
  return {static_cast<uint16_t>((bits >> 16 & 0x8000) | half)};
}

// Rounds a float64 to float32 so that narrowing the result again is as if rounded once: to nearest
// for float32 itself; to odd for the 16-bit types, which leaves the sticky bit in the last place
// (S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
template <class T>
inline float shorten(double x) {
  const float nearest = static_cast<float>(x);
  if (sizeof(T) == sizeof(float))
    return nearest;
  const uint32_t bits = float_bits(nearest);
  const double back = nearest;
  if (!(back < x || back > x) || (bits & 1))
    return nearest;
  const bool away = (back < 0 ? -back : back) > (x < 0 ? -x : x);
  return bits_float(away ? bits - 1 : bits + 1);
}

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

inline __m256 load(const float* src) {
  return _mm256_loadu_ps(src);
}
inline __m256 load(const Float16* src) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
}
inline __m256 load(const Bfloat16* src) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline __m128i narrow(__m256 x, const Float16*) {
  const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i magnitude = _mm_and_si128(half, _mm_set1_epi16(0x7fff));
  const __m128i nan = _mm_cmpgt_epi16(magnitude, _mm_set1_epi16(0x7c00));
  return _mm_blendv_epi8(half, _mm_set1_epi16(0x7e00), nan);
}
inline __m128i narrow(__m256 x, const Bfloat16*) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i half =
      _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

inline void store(float* dst, __m256 x) {
  _mm256_storeu_ps(dst, x);
}
template <class T>
inline void store(T* dst, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), narrow(x, dst));
}

// The low half of each 64-bit lane.
inline __m128i low_halves(__m256d mask) {
  const __m128 low = _mm_castpd_ps(_mm256_castpd256_pd128(mask));
  const __m128 high = _mm_castpd_ps(_mm256_extractf128_pd(mask, 1));
  return _mm_castps_si128(_mm_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0)));
}

// How many lanes are NaN or infinite once in T, and how many overflowed on the way there.
template <class T>
inline int not_finite(__m256 x) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
  const __m256i large = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(kOverflowBits<T> - 1));
  return _mm_popcnt_u32(_mm256_movemask_ps(_mm256_castsi256_ps(large)));
}
template <class T>
inline int overflows(__m256 x) {
  return not_finite<T>(x) - not_finite<float>(x);
}

template <class T>
inline __m128 shorten(__m256d x) {
  const __m128 nearest = _mm256_cvtpd_ps(x);
  if constexpr (sizeof(T) == sizeof(float))
    return nearest;
  const __m256d back = _mm256_cvtps_pd(nearest), sign = _mm256_set1_pd(-0.0);
  const __m128i bits = _mm_castps_si128(nearest);
  const __m128i one = _mm_set1_epi32(1);
  const __m128i inexact = low_halves(_mm256_cmp_pd(back, x, _CMP_NEQ_OQ));
  const __m128i away = low_halves(
      _mm256_cmp_pd(_mm256_andnot_pd(sign, back), _mm256_andnot_pd(sign, x), _CMP_GT_OQ));
  const __m128i even = _mm_cmpeq_epi32(_mm_and_si128(bits, one), _mm_setzero_si128());
  const __m128i step = _mm_or_si128(away, one); // -1 or 1
  return _mm_castsi128_ps(_mm_add_epi32(bits, _mm_and_si128(step, _mm_and_si128(inexact, even))));
}

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

inline __m512 widen(__m256i half, const Float16*) {
  return _mm512_cvtph_ps(half);
}
inline __m512 widen(__m256i half, const Bfloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline __m256i narrow(__m512 x, const Float16*) {
  const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i magnitude = _mm256_and_si256(half, _mm256_set1_epi16(0x7fff));
  const __mmask16 nan = _mm256_cmpgt_epi16_mask(magnitude, _mm256_set1_epi16(0x7c00));
  return _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00));
}
inline __m256i narrow(__m512 x, const Bfloat16*) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i half = _mm512_mask_mov_epi32(
      _mm512_srli_epi32(up, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(half);
}

// With `lanes`, only those of the 16 places are touched.
inline __m512 load(const float* src) {
  return _mm512_loadu_ps(src);
}
inline __m512 load(const float* src, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, src);
}
inline void store(float* dst, __m512 x) {
  _mm512_storeu_ps(dst, x);
}
inline void store(float* dst, __m512 x, __mmask16 lanes) {
  _mm512_mask_storeu_ps(dst, lanes, x);
}
template <class T>
inline __m512 load(const T* src) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)), src);
}
template <class T>
inline __m512 load(const T* src, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, src), src);
}
template <class T>
inline void store(T* dst, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), narrow(x, dst));
}
template <class T>
inline void store(T* dst, __m512 x, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(dst, lanes, narrow(x, dst));
}

template <class T>
inline int not_finite(__m512 x) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  return _mm_popcnt_u32(_mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(kOverflowBits<T>)));
}
template <class T>
inline int overflows(__m512 x) {
  return not_finite<T>(x) - not_finite<float>(x);
}

template <class T>
inline __m256 shorten(__m512d x) {
  const __m256 nearest = _mm512_cvtpd_ps(x);
  if constexpr (sizeof(T) == sizeof(float))
    return nearest;
  const __m512d back = _mm512_cvtps_pd(nearest);
  const __m256i bits = _mm256_castps_si256(nearest), one = _mm256_set1_epi32(1);
  const __mmask8 inexact = _mm512_cmp_pd_mask(back, x, _CMP_NEQ_OQ);
  const __mmask8 even = _mm256_mask_testn_epi32_mask(inexact, bits, one);
  const __mmask8 away = _mm512_cmp_pd_mask(_mm512_abs_pd(back), _mm512_abs_pd(x), _CMP_GT_OQ);
  const __m256i up = _mm256_mask_add_epi32(bits, even, bits, one);
  return _mm256_castsi256_ps(_mm256_mask_sub_epi32(up, even & away, bits, one));
}

} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {

inline float32x4_t load(const float* src) {
  return vld1q_f32(src);
}
inline float32x4_t load(const Float16* src) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&src->bits)));
}
inline float32x4_t load(const Bfloat16* src) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&src->bits), 16));
}

inline uint16x4_t narrow(float32x4_t x, const Float16*) {
  const uint16x4_t half = vreinterpret_u16_f16(vcvt_f16_f32(x));
  const uint16x4_t number = vmovn_u32(vceqq_f32(x, x));
  return vbsl_u16(number, half, vdup_n_u16(0x7e00));
}
inline uint16x4_t narrow(float32x4_t x, const Bfloat16*) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint16x4_t half = vaddhn_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  return vbsl_u16(vmovn_u32(vceqq_f32(x, x)), half, vdup_n_u16(0x7fc0));
}

inline void store(float* dst, float32x4_t x) {
  vst1q_f32(dst, x);
}
template <class T>
inline void store(T* dst, float32x4_t x) {
  vst1_u16(&dst->bits, narrow(x, dst));
}

// All ones in the lanes that are NaN or infinite once in T.
template <class T>
inline uint32x4_t not_finite(float32x4_t x) {
  const uint32x4_t magnitude = vreinterpretq_u32_f32(vabsq_f32(x));
  return vcgeq_u32(magnitude, vdupq_n_u32(kOverflowBits<T>));
}

template <class T>
inline float32x2_t shorten(float64x2_t x) {
  if constexpr (sizeof(T) == sizeof(float))
    return vcvt_f32_f64(x);
  return vcvtx_f32_f64(x); // the instruction for it: to odd
}

} // namespace neon
#endif

} // namespace fedmap
