// Compress, expand and join of 32 elements of 16 bits in the levels with AVX-512: one instruction
// each from Ice Lake and Zen 4 on, before them made of the forms for 32 bits.
#pragma once

#include "core/cpu.h"

#if FEDMAP_X86
namespace fedmap {

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

inline __m512i lanes_16() {
  return _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14,
                          13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

inline __m512i low_16(__m512i v) {
  return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v));
}

// `first` up to lane `count`, then `second` from its lane 0 on.
inline __m512i join_16(__m512i first, int64_t count, __m512i second) {
  const __m512i from = _mm512_sub_epi16(lanes_16(), _mm512_set1_epi16(static_cast<int16_t>(count)));
  return _mm512_mask_permutexvar_epi16(first, static_cast<__mmask32>(~uint64_t{0} << count), from,
                                       second);
}

// The chosen elements of v from lane 0 on; what follows them is of no use.
inline __m512i compress_16(__m512i v, __mmask32 chosen) {
  const __mmask16 low = static_cast<__mmask16>(chosen), high = chosen >> 16;
  const int count = _mm_popcnt_u32(low);
  const __m512i rest = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1));
  const __m256i first = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(low, low_16(v)));
  const __m256i second = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(high, rest));
  return join_16(_mm512_castsi256_si512(first), count, _mm512_castsi256_si512(second));
}

// `into`, and in its chosen lanes the elements of v from lane 0 on.
inline __m512i expand_16(__m512i into, __mmask32 chosen, __m512i v) {
  const __mmask16 low = static_cast<__mmask16>(chosen), high = chosen >> 16;
  const __m512i rest = _mm512_permutexvar_epi16(
      _mm512_add_epi16(lanes_16(), _mm512_set1_epi16(static_cast<int16_t>(_mm_popcnt_u32(low)))),
      v);
  const __m256i first = _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(low, low_16(v)));
  const __m256i second = _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(high, low_16(rest)));
  return _mm512_mask_mov_epi16(into, chosen,
                               _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
}

} // namespace avx512_core
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512
namespace avx512 {

inline __m512i join_16(__m512i first, int64_t count, __m512i second) {
  return _mm512_mask_expand_epi16(first, static_cast<__mmask32>(~uint64_t{0} << count), second);
}

inline __m512i compress_16(__m512i v, __mmask32 chosen) {
  return _mm512_mask_compress_epi16(v, chosen, v);
}

inline __m512i expand_16(__m512i into, __mmask32 chosen, __m512i v) {
  return _mm512_mask_expand_epi16(into, chosen, v);
}

} // namespace avx512
FEDMAP_TARGET_END

} // namespace fedmap
#endif
