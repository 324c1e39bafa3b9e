#include "select/select_scan.h"

#include <algorithm>
#include <cstring>

#include "core/ahead.h"
#include "core/bits.h"
#include "core/compress.h"
#include "core/cpu.h"
#include "core/dtype.h"

namespace fedmap {

namespace scalar {
namespace {

template <class T>
uint32_t candidate(const T* values, int64_t position, const Bracket& bracket) {
  const uint32_t offset = magnitude_key(values, sizeof(T), position) - (bracket.below + 1);
  return offset >> bracket.shift << kTileBits | static_cast<uint32_t>(position);
}

// From element `begin`, a multiple of 32; `counts` of its block and of those after it are zeroed or
// started already.
template <class T, bool kTies>
[[gnu::always_inline]] inline Tally
scan_from(int64_t begin, const T* values, const uint32_t* within, int64_t n, const Bracket& bracket,
          uint32_t* words, int64_t* counts, uint32_t* candidates) {
  Tally tally;
  uint32_t* out = candidates;
  for (int64_t i = begin; i < n; i += 32) {
    uint32_t eligible = within ? within[i / 32] : ~0u;
    eligible &= low_bits(n - i);
    uint32_t kept = 0, between = 0, at_below = 0, above_top = 0;
    for (int64_t j = 0; eligible && j < std::min<int64_t>(32, n - i); ++j) {
      int32_t key = static_cast<int32_t>(magnitude_key(values, sizeof(T), i + j));
      kept |= static_cast<uint32_t>(key > bracket.top) << j;
      between |= static_cast<uint32_t>(key > bracket.below) << j;
      if (kTies) {
        at_below |= static_cast<uint32_t>(key == bracket.below) << j;
        above_top |= static_cast<uint32_t>(key - 1 == bracket.top) << j;
      }
    }
    kept &= eligible;
    words[i / 32] = kept;
    counts[i / kBlock] += __builtin_popcount(kept);
    tally.kept += __builtin_popcount(kept);
    tally.at_below += __builtin_popcount(at_below & eligible);
    tally.above_top += __builtin_popcount(above_top & eligible);
    for (between &= eligible & ~kept; between; between &= between - 1)
      *out++ = candidate(values, i + __builtin_ctz(between), bracket);
  }
  tally.candidates = out - candidates;
  return tally;
}

template <class T, bool kTies>
Tally scan(const void* values, const uint32_t* within, int64_t n, const Bracket& bracket,
           uint32_t* words, int64_t* counts, uint32_t* candidates) {
  std::fill_n(counts, mask_blocks(n), int64_t{0});
  return scan_from<T, kTies>(0, static_cast<const T*>(values), within, n, bracket, words, counts,
                             candidates);
}

template <class T>
int64_t count_above_from(int64_t begin, const T* values, const uint32_t* within, int64_t n,
                         uint32_t limit) {
  int64_t count = 0;
  for (int64_t i = begin; i < n; ++i)
    count += magnitude_key(values, sizeof(T), i) > limit &&
             (!within || (within[i / 32] >> (i & 31) & 1));
  return count;
}

template <class T>
int64_t count_above(const void* values, const uint32_t* within, int64_t n, uint32_t limit) {
  return count_above_from(0, static_cast<const T*>(values), within, n, limit);
}

void locate(const uint32_t* words, int64_t count, const int64_t* ranks, int64_t n,
            int64_t* positions) {
  int64_t before = 0, j = 0;
  for (int64_t i = 0; i < count && j < n; ++i) {
    uint32_t word = words[i];
    int64_t after = before + __builtin_popcount(word);
    for (int64_t skipped = before; j < n && ranks[j] < after; ++j) {
      for (; skipped < ranks[j]; ++skipped)
        word &= word - 1;
      positions[j] = 32 * i + __builtin_ctz(word);
    }
    before = after;
  }
}

} // namespace
} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {
namespace {

template <class T>
class Keys {
 public:
  explicit Keys(const Bracket& b)
      : below_(set(b.below)), top_(set(b.top)),
        after_(set(static_cast<int32_t>(static_cast<uint32_t>(b.top) + 1))) {}

  template <bool kTies>
  uint64_t take(const T* values, uint64_t eligible, int64_t at, Tally& tally,
                uint16_t*& next) const {
    __m256i keys[kVectors];
    load(values, keys);
    const uint64_t kept = above(keys, top_) & eligible;
    if (kTies) {
      tally.at_below += _mm_popcnt_u64(equal(keys, below_) & eligible);
      tally.above_top += _mm_popcnt_u64(equal(keys, after_) & eligible);
    }
    uint64_t between = above(keys, below_) & eligible & ~kept;
    for (int lane = 0; lane < 64; lane += 8, between >>= 8) {
      const __m128i places = _mm_cvtepu8_epi16(table_row(kByteTables.pack[between & 0xff]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(next),
                       _mm_add_epi16(places, _mm_set1_epi16(static_cast<int16_t>(at + lane))));
      next += _mm_popcnt_u32(between & 0xff);
    }
    return kept;
  }

  static uint64_t above(const T* values, int32_t limit) {
    __m256i keys[kVectors];
    load(values, keys);
    return above(keys, set(limit));
  }

 private:
  static constexpr int kVectors = 2 * sizeof(T);

  static void load(const T* values, __m256i* keys) {
    const __m256i magnitude = set(sizeof(T) == 4 ? INT32_MAX : INT16_MAX);
    for (int k = 0; k < kVectors; ++k)
      keys[k] = _mm256_and_si256(magnitude,
                                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values) + k));
  }

  static __m256i set(int32_t key) {
    return sizeof(T) == 4 ? _mm256_set1_epi32(key) : _mm256_set1_epi16(static_cast<int16_t>(key));
  }

  // One bit of each of the 64 comparisons.
  template <class Compare>
  static uint64_t bits(const __m256i* keys, Compare compare) {
    uint64_t result = 0;
    for (int half = 0; half < 64; half += 32, keys += kVectors / 2) {
      __m256i packed;
      if constexpr (sizeof(T) == 4) {
        packed = _mm256_packs_epi16(_mm256_packs_epi32(compare(keys[0]), compare(keys[1])),
                                    _mm256_packs_epi32(compare(keys[2]), compare(keys[3])));
        packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      } else {
        packed =
            _mm256_permute4x64_epi64(_mm256_packs_epi16(compare(keys[0]), compare(keys[1])), 0xd8);
      }
      result |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(packed))) << half;
    }
    return result;
  }

  static uint64_t above(const __m256i* keys, __m256i limit) {
    return bits(keys, [limit](__m256i v) {
      return sizeof(T) == 4 ? _mm256_cmpgt_epi32(v, limit) : _mm256_cmpgt_epi16(v, limit);
    });
  }

  static uint64_t equal(const __m256i* keys, __m256i key) {
    return bits(keys, [key](__m256i v) {
      return sizeof(T) == 4 ? _mm256_cmpeq_epi32(v, key) : _mm256_cmpeq_epi16(v, key);
    });
  }

  const __m256i below_, top_, after_;
};

// The candidates at n places, counted from `begin`.
template <class T>
uint32_t* collect(const T* values, int64_t begin, const uint16_t* places, int64_t n,
                  const Bracket& bracket, uint32_t* out) {
  for (int64_t k = 0; k < n; ++k)
    *out++ = scalar::candidate(values, begin + places[k], bracket);
  return out;
}

#include "select/select_scan_body.h"

void locate(const uint32_t* words, int64_t count, const int64_t* ranks, int64_t n,
            int64_t* positions) {
  int64_t before = 0, j = 0;
  for (int64_t i = 0; i < count && j < n; ++i) {
    const int64_t after = before + _mm_popcnt_u32(words[i]);
    for (; j < n && ranks[j] < after; ++j)
      positions[j] = 32 * i + _tzcnt_u32(_pdep_u32(1u << (ranks[j] - before), words[i]));
    before = after;
  }
}

} // namespace
} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

// The first two without a branch: of 32 elements rarely more are candidates, and compress_16 takes
// a dozen instructions here.
static void append(__mmask32 between, int64_t at, uint16_t*& next) {
  uint32_t left = _cvtmask32_u32(between);
  const int count = _mm_popcnt_u32(left);
  for (int k = 0; k < 2; ++k, left = _blsr_u32(left))
    next[k] = static_cast<uint16_t>(at + _tzcnt_u32(left));
  for (int k = 2; left; ++k, left = _blsr_u32(left))
    next[k] = static_cast<uint16_t>(at + _tzcnt_u32(left));
  next += count;
}

#include "select/select_scan_avx512.h"
using avx2::locate;

} // namespace avx512_core
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512
namespace avx512 {

// Positions are compressed as 16-bit lanes, without a branch: 2.4 ms of work for 26 M float32 on
// one Zen 4 core with 1% candidates, against 5.2 to look for the vectors that hold one, and 2.7
// to compress keys and positions in 32-bit lanes.
static void append(__mmask32 between, int64_t at, uint16_t*& next) {
  const __m512i places = _mm512_add_epi16(lanes_16(), _mm512_set1_epi16(static_cast<int16_t>(at)));
  const __m512i found = compress_16(places, between);
  const int count = _mm_popcnt_u32(_cvtmask32_u32(between));
  // A whole vector would cross a line nearly each time.
  _mm_storeu_si128(reinterpret_cast<__m128i*>(next), _mm512_castsi512_si128(found));
  if (count > 8)
    _mm512_storeu_si512(next, found);
  next += count;
}

#include "select/select_scan_avx512.h"

} // namespace avx512
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
#include "select/select_scan_neon.h"
#endif

Scan scan_for(int dtype, bool count_ties) {
  if (dtype == kFloat32)
    return count_ties ? FEDMAP_DISPATCH(scan<uint32_t, true>)
                      : FEDMAP_DISPATCH(scan<uint32_t, false>);
  return count_ties ? FEDMAP_DISPATCH(scan<uint16_t, true>)
                    : FEDMAP_DISPATCH(scan<uint16_t, false>);
}

int64_t count_above(const void* values, int dtype, const uint32_t* within, int64_t n,
                    uint32_t limit) {
  return dtype == kFloat32 ? FEDMAP_DISPATCH(count_above<uint32_t>)(values, within, n, limit)
                           : FEDMAP_DISPATCH(count_above<uint16_t>)(values, within, n, limit);
}

void locate(const uint32_t* words, int64_t count, const int64_t* ranks, int64_t n,
            int64_t* positions) {
  FEDMAP_DISPATCH(locate)(words, count, ranks, n, positions);
}

} // namespace fedmap
