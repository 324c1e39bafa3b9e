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
#endif

} // namespace fedmap
