// The scan of the levels with AVX-512: select_scan.cpp includes this once in each one's target
// region, where `append` differs: it lists the positions of candidates among 32 elements from `at`
// on.
template <class T>
class Keys {
 public:
  explicit Keys(const Bracket& b)
      : below_(set(b.below)), top_(set(b.top)), after_(set(b.top + int64_t{1})),
        origin_(set(b.below + 1)), width_(set(int64_t{b.top} - b.below)) {}

  template <bool kTies>
  uint64_t take(const T* values, uint64_t eligible, int64_t at, Tally& tally,
                uint16_t*& next) const {
    __mmask32 kept[2], between[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __mmask32 held = _cvtu32_mask32(static_cast<uint32_t>(eligible >> 32 * half));
      if constexpr (sizeof(T) == 4) {
        const __m512i low = load(values + 32 * half), high = load(values + 32 * half + 16);
        kept[half] = _mm512_kunpackw(above(high, top_), above(low, top_));
        between[half] = _mm512_kunpackw(inside(high), inside(low));
        if (kTies) {
          tally.at_below += count(held, _mm512_kunpackw(equal(high, below_), equal(low, below_)));
          tally.above_top += count(held, _mm512_kunpackw(equal(high, after_), equal(low, after_)));
        }
      } else {
        const __m512i keys = load(values + 32 * half);
        kept[half] = above(keys, top_);
        between[half] = inside(keys);
        if (kTies) {
          tally.at_below += count(held, equal(keys, below_));
          tally.above_top += count(held, equal(keys, after_));
        }
      }
      append(_kand_mask32(between[half], held), at + 32 * half, next);
    }
    return _cvtmask64_u64(_mm512_kunpackd(kept[1], kept[0])) & eligible;
  }

  static uint64_t above(const T* values, int32_t limit) {
    uint64_t result = 0;
    for (int lane = 0; lane < 64; lane += kLanes)
      result |= static_cast<uint64_t>(above(load(values + lane), set(limit))) << lane;
    return result;
  }

 private:
  static constexpr int kLanes = 64 / sizeof(T);
  using Lanes = std::conditional_t<sizeof(T) == 4, __mmask16, __mmask32>;

  static __m512i set(int64_t key) {
    return sizeof(T) == 4 ? _mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(key)))
                          : _mm512_set1_epi16(static_cast<int16_t>(static_cast<uint16_t>(key)));
  }

  static __m512i load(const T* values) {
    return _mm512_and_si512(set(sizeof(T) == 4 ? INT32_MAX : INT16_MAX),
                            _mm512_loadu_si512(values));
  }

  static Lanes above(__m512i keys, __m512i limit) {
    if constexpr (sizeof(T) == 4)
      return _mm512_cmpgt_epi32_mask(keys, limit);
    else
      return _mm512_cmpgt_epi16_mask(keys, limit);
  }

  static Lanes equal(__m512i keys, __m512i key) {
    if constexpr (sizeof(T) == 4)
      return _mm512_cmpeq_epi32_mask(keys, key);
    else
      return _mm512_cmpeq_epi16_mask(keys, key);
  }

  Lanes inside(__m512i keys) const {
    if constexpr (sizeof(T) == 4)
      return _mm512_cmplt_epu32_mask(_mm512_sub_epi32(keys, origin_), width_);
    else
      return _mm512_cmplt_epu16_mask(_mm512_sub_epi16(keys, origin_), width_);
  }

  static int count(__mmask32 held, __mmask32 lanes) {
    return _mm_popcnt_u32(_cvtmask32_u32(_kand_mask32(held, lanes)));
  }

  const __m512i below_, top_, after_, origin_, width_;
};

template <class T>
uint32_t* collect(const T* values, int64_t begin, const uint16_t* places, int64_t n,
                  const Bracket& bracket, uint32_t* out) {
  const __m512i origin = _mm512_set1_epi32(bracket.below + 1);
  const __m512i shift = _mm512_set1_epi32(kTileBits - bracket.shift);
  for (int64_t k = 0; k < n; k += 16) {
    const __mmask16 held = static_cast<__mmask16>(n - k < 16 ? (1 << (n - k)) - 1 : 0xffff);
    const __m512i at = _mm512_add_epi32(
        _mm512_set1_epi32(static_cast<int>(begin)),
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(places + k))));
    __m512i keys;
    if constexpr (sizeof(T) == 4) {
      keys = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), held, at, values, 4);
      keys = _mm512_and_si512(keys, _mm512_set1_epi32(INT32_MAX));
    } else {
      // In pairs, of which the wanted one is shifted down: no byte past the last is read.
      keys = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), held, _mm512_srli_epi32(at, 1),
                                         values, 4);
      const __m512i second = _mm512_and_si512(at, _mm512_set1_epi32(1));
      keys = _mm512_and_si512(_mm512_srlv_epi32(keys, _mm512_slli_epi32(second, 4)),
                              _mm512_set1_epi32(INT16_MAX));
    }
    const __m512i offsets = _mm512_sllv_epi32(_mm512_sub_epi32(keys, origin), shift);
    // The offset's bits from the tile's upwards, the position's below.
    _mm512_storeu_si512(out + k,
                        _mm512_ternarylogic_epi32(_mm512_set1_epi32(kTile - 1), at, offsets, 0xca));
  }
  return out + n;
}

#include "select/select_scan_body.h"
