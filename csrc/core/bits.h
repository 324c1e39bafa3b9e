// Bitmaps of int32 words and their rank index: sizes, loads, counts. docs/format.md, 4, has the
// layout: element i is bit i & 31 of word i >> 5.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/cpu.h"

namespace fedmap {

// Rank index: entry b counts the survivors before element kBlock * b; the last is their total.
constexpr int64_t kBlock = 2048;
constexpr int64_t kBlockWords = kBlock / 32;

inline int64_t mask_words(int64_t numel) {
  return (numel + 31) / 32;
}
inline int64_t mask_blocks(int64_t numel) {
  return (numel + kBlock - 1) / kBlock;
}

// The lowest n bits of a word, all from 32 on.
inline uint32_t low_bits(int64_t n) {
  return n >= 32 ? ~0u : (1u << n) - 1;
}

inline uint64_t load_64(const void* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}
inline void store_64(void* to, uint64_t word) {
  std::memcpy(to, &word, sizeof word);
}

// The survivors in `count` words.
int64_t count_bits(const uint32_t* words, int64_t count);
// The two halves of a rank index: the survivors of each block, and their sums before each.
void count_blocks(const uint32_t* words, int64_t count, int64_t* counts);
int64_t sum_ranks(int64_t* rank, int64_t blocks);

#if FEDMAP_X86

// For each byte of mask: `pack` lists the set bits, lowest first; `unpack` gives each set bit's
// place among them, and 0x80, which shuffles read as zero, to the others.
struct ByteTables {
  uint8_t pack[256][8], unpack[256][8];
};
constexpr ByteTables make_byte_tables() {
  ByteTables t{};
  for (int byte = 0; byte < 256; ++byte)
    for (int bit = 0, place = 0; bit < 8; ++bit) {
      t.unpack[byte][bit] = byte >> bit & 1 ? place : 0x80;
      if (byte >> bit & 1)
        t.pack[byte][place++] = bit;
    }
  return t;
}
alignas(64) inline constexpr ByteTables kByteTables = make_byte_tables();

FEDMAP_TARGET_AVX2
namespace avx2 {

inline __m128i table_row(const uint8_t (&row)[8]) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row));
}

} // namespace avx2
FEDMAP_TARGET_END

#elif FEDMAP_ARM64

// Shuffles of 8 elements of kWidth bytes, for each byte of mask: `pack` brings the elements of the
// set bits together, `unpack` takes them back; 255 reads as zero.
template <int kWidth>
struct Shuffles {
  uint8_t pack[256][8 * kWidth], unpack[256][8 * kWidth];
};
template <int kWidth>
constexpr Shuffles<kWidth> make_shuffles() {
  Shuffles<kWidth> t{};
  for (int byte = 0; byte < 256; ++byte)
    for (int bit = 0, place = 0; bit < 8; ++bit) {
      const bool set = byte >> bit & 1;
      for (int k = 0; k < kWidth; ++k) {
        t.unpack[byte][kWidth * bit + k] = set ? kWidth * place + k : 255;
        if (set)
          t.pack[byte][kWidth * place + k] = kWidth * bit + k;
      }
      place += set;
    }
  return t;
}
template <int kWidth>
alignas(64) inline constexpr Shuffles<kWidth> kShuffles = make_shuffles<kWidth>();

namespace neon {

// The bits in the opposite order: the first set bit is then found by one instruction.
inline uint64_t reversed(uint64_t x) {
  __asm__("rbit %0, %1" : "=r"(x) : "r"(x));
  return x;
}

// Calls f(place) for each set bit of a reversed word, from the first on.
template <class F>
inline void for_each_set(uint64_t reversed_bits, F&& f) {
  while (reversed_bits) {
    const int place = __builtin_clzll(reversed_bits);
    reversed_bits &= ~(uint64_t{1} << 63 >> place);
    f(place);
  }
}

// One bit of each byte of four vectors that hold all ones or zeros.
inline uint64_t bits_of(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d) {
  const uint8x16_t weight = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
  const uint8x16_t low = vpaddq_u8(vandq_u8(a, weight), vandq_u8(b, weight));
  const uint8x16_t high = vpaddq_u8(vandq_u8(c, weight), vandq_u8(d, weight));
  const uint8x16_t both = vpaddq_u8(low, high);
  return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(both, both)), 0);
}

// The prefix sums of the bytes' counts: byte k counts the set bits of bytes 0 to k.
inline uint64_t counts_before(uint64_t word) {
  const uint8x8_t counts = vcnt_u8(vcreate_u8(word));
  return vget_lane_u64(vreinterpret_u64_u8(counts), 0) * 0x0101010101010101u;
}

} // namespace neon
#endif

} // namespace fedmap
