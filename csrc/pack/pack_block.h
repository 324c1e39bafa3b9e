// Moving the survivors of one block between their places and a packed buffer, for each ISA level.
//
// T has 4 or 2 bytes and is moved as bits. `words` holds the mask of `n` elements; bits past n are
// ignored, and nothing of `src` or `dst` past n is touched. Packed buffers need kPackSlack bytes of
// room past their survivors: whole vectors are written and read there.
//
// Dense parts are prefetched by hand where `read_ahead` says so (core/ahead.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/ahead.h"
#include "core/bits.h"
#include "core/compress.h"
#include "core/cpu.h"

namespace fedmap {

constexpr int64_t kPackSlack = 64;
// Parts of kSpan elements with fewer than one survivor in kSparse, the least limit of any level,
// are read survivor by survivor, the others by chunks.
constexpr int64_t kChunk = 512;
constexpr int64_t kSpan = 8 * 2048;
constexpr int64_t kSparse = 28;

// Into L2: there more misses can be under way than into L1. At density .01 it halves the time on
// Zen 4; into L1 it takes a tenth less on Intel.
template <class T>
inline void prefetch(const T* src, const uint16_t* places, int64_t count) {
  if (read_ahead())
    for (int64_t i = 0; i < count; ++i)
      __builtin_prefetch(src + places[i], 0, 3);
  else
    for (int64_t i = 0; i < count; ++i)
      __builtin_prefetch(src + places[i], 0, 2);
}

template <class T>
inline void gather(const T* src, const uint16_t* places, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = src[places[i]];
}

namespace scalar {

inline int64_t count_block(const uint32_t* words, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 32)
    count += __builtin_popcount(words[i / 32] & low_bits(n - i));
  return count;
}

// Of n elements, how many to move at once: a level may take more where few survive, kChunk
// survivors at most.
inline int64_t next_chunk(const uint32_t* /*words*/, int64_t n) {
  return n < kChunk ? n : kChunk;
}

// Packing reads survivor by survivor where fewer than one in so many survive.
template <class T>
int64_t sparse_limit() {
  return kSparse;
}

// Lists the survivors' places.
inline int64_t find_block(const uint32_t* words, int64_t n, uint16_t* places) {
  int64_t at = 0;
  for (int64_t i = 0; i < n; i += 32)
    for (uint32_t word = words[i / 32] & low_bits(n - i); word; word &= word - 1)
      places[at++] = static_cast<uint16_t>(i + __builtin_ctz(word));
  return at;
}

template <class T>
inline const T* unpack_word(const T* packed, uint32_t word, T* dst, int64_t n) {
  if (n == 32) // a constant size becomes a few stores
    std::memset(static_cast<void*>(dst), 0, 32 * sizeof(T));
  else
    std::memset(static_cast<void*>(dst), 0, n * sizeof(T));
  for (; word; word &= word - 1)
    dst[__builtin_ctz(word)] = *packed++;
  return packed;
}

// Returns the number of survivors, as pack_block does.
template <class T>
inline int64_t pack_from(int64_t i, int64_t at, const T* src, const uint32_t* words, int64_t n,
                         T* out) {
  for (; i < n; i += 32)
    for (uint32_t word = words[i / 32] & low_bits(n - i); word; word &= word - 1)
      out[at++] = src[i + __builtin_ctz(word)];
  return at;
}

template <class T>
int64_t pack_block(const T* src, const uint32_t* words, int64_t n, T* out) {
  return pack_from(0, 0, src, words, n, out);
}

// Two arrays by one mask.
template <class T>
int64_t pack_both(const T* a, const T* b, const uint32_t* words, int64_t n, T* a_out, T* b_out) {
  pack_block(a, words, n, a_out);
  return pack_block(b, words, n, b_out);
}

template <class T>
inline void unpack_block(const T* packed, const uint32_t* words, int64_t n, T* dst) {
  for (int64_t i = 0; i < n; i += 32)
    packed = unpack_word(packed, words[i / 32] & low_bits(n - i), dst + i, n - i < 32 ? n - i : 32);
}

} // namespace scalar

#if FEDMAP_X86
alignas(64) inline constexpr uint16_t kPlaces[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                     11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                     22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

FEDMAP_TARGET_AVX2
namespace avx2 {

inline int64_t count_block(const uint32_t* words, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 32)
    count += _mm_popcnt_u32(words[i / 32] & low_bits(n - i));
  return count;
}

using scalar::find_block;
using scalar::next_chunk;
using scalar::sparse_limit;

// A shuffle of bytes from one of 2-byte elements; 0x80 saturates and stays "zero".
inline __m128i byte_pairs(__m128i elements) {
  const __m128i low = _mm_adds_epu8(elements, elements);
  return _mm_unpacklo_epi8(low, _mm_or_si128(low, _mm_set1_epi8(1)));
}

template <class T>
inline void pack_8(const T* src, uint32_t byte, T* out) {
  const __m128i places = table_row(kByteTables.pack[byte]);
  if constexpr (sizeof(T) == 4) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(places)));
  } else {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(v, byte_pairs(places)));
  }
}

template <class T>
inline void unpack_8(const T* packed, uint32_t byte, T* dst) {
  const __m128i places = table_row(kByteTables.unpack[byte]);
  if constexpr (sizeof(T) == 4) {
    const __m256i index = _mm256_cvtepi8_epi32(places);
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(dst),
        _mm256_andnot_si256(_mm256_srai_epi32(index, 31), _mm256_permutevar8x32_epi32(v, index)));
  } else {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm_shuffle_epi8(v, byte_pairs(places)));
  }
}

template <class T, bool kAhead>
int64_t pack_block_as(const T* src, const uint32_t* words, int64_t n, T* out, int64_t ahead) {
  int64_t i = 0, at = 0;
  for (; i + 32 <= n; i += 32) {
    if constexpr (kAhead)
      fetch_lines(reinterpret_cast<const char*>(src + i) + ahead, 32 * sizeof(T));
    const uint32_t word = words[i / 32];
    for (int64_t bit = 0; bit < 32; bit += 8) {
      const uint32_t byte = word >> bit & 0xff;
      pack_8(src + i + bit, byte, out + at);
      at += _mm_popcnt_u32(byte);
    }
  }
  return scalar::pack_from(i, at, src, words, n, out);
}

template <class T>
int64_t pack_block(const T* src, const uint32_t* words, int64_t n, T* out) {
  const int64_t ahead = read_ahead();
  return ahead ? pack_block_as<T, true>(src, words, n, out, ahead)
               : pack_block_as<T, false>(src, words, n, out, 0);
}

template <class T>
int64_t pack_both(const T* a, const T* b, const uint32_t* words, int64_t n, T* a_out, T* b_out) {
  pack_block(a, words, n, a_out);
  return pack_block(b, words, n, b_out);
}

template <class T>
void unpack_block(const T* packed, const uint32_t* words, int64_t n, T* dst) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const uint32_t word = words[i / 32];
    for (int byte = 0; byte < 32; byte += 8) {
      unpack_8(packed, word >> byte & 0xff, dst + i + byte);
      packed += _mm_popcnt_u32(word >> byte & 0xff);
    }
  }
  scalar::unpack_block(packed, words + i / 32, n - i, dst + i);
}

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {
using avx2::count_block;
// One by one: by compress_16 packing at density .01 took 4.5 ms of a Cascade Lake, not 3.6.
using scalar::find_block;
using scalar::next_chunk;

// 31.6 M elements of a Cascade Lake: by chunks 6.6 to 7.3 ms at any density from .012 on and 3.6 to
// 4.3 in 16 bits, by survivors 5.3 and 4.9 at .012, 11.3 and 8.5 at .03.
template <class T>
int64_t sparse_limit() {
  return sizeof(T) == 4 ? 64 : 112;
}

// Widened, 16 lanes at a time: 0.21 ns per element of a Cascade Lake at density .1, by compress_16
// 0.26 (within the cache).
inline void pack_64(const uint16_t* src, uint64_t word, uint16_t* out) {
  for (int lane = 0; lane < 64; lane += 16) {
    const auto* from = reinterpret_cast<const __m256i*>(src + lane);
    const __mmask16 bits = static_cast<__mmask16>(word >> lane);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(bits, wide)));
    out += _mm_popcnt_u32(bits);
  }
}

#include "pack/pack_block_avx512.h"
} // namespace avx512_core
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512
namespace avx512 {
using scalar::sparse_limit;

inline int64_t find_block(const uint32_t* words, int64_t n, uint16_t* places) {
  __m512i place = _mm512_load_si512(kPlaces);
  int64_t at = 0;
  for (int64_t i = 0; i < n; i += 32) {
    const uint32_t word = words[i / 32] & low_bits(n - i);
    _mm512_storeu_si512(places + at, compress_16(place, word));
    at += _mm_popcnt_u32(word);
    place = _mm512_add_epi16(place, _mm512_set1_epi16(32));
  }
  return at;
}

#include "pack/pack_block_avx512.h"

} // namespace avx512
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
#include "pack/pack_block_neon.h"
#endif

} // namespace fedmap
