#include "core/bits.h"

#include <algorithm>

namespace fedmap {

namespace scalar {
namespace {

int64_t count_bits(const uint32_t* words, int64_t count) {
  int64_t bits = 0;
  for (int64_t j = 0; j < count; ++j)
    bits += __builtin_popcount(words[j]);
  return bits;
}

} // namespace
} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {
namespace {

int64_t count_bits(const uint32_t* words, int64_t count) {
  int64_t bits = 0, j = 0;
  for (; j + 8 <= count; j += 8)
    bits += _mm_popcnt_u64(load_64(words + j)) + _mm_popcnt_u64(load_64(words + j + 2)) +
            _mm_popcnt_u64(load_64(words + j + 4)) + _mm_popcnt_u64(load_64(words + j + 6));
  return bits + scalar::count_bits(words + j, count - j);
}

} // namespace
} // namespace avx2
FEDMAP_TARGET_END

namespace avx512_core {
using avx2::count_bits;
}

FEDMAP_TARGET_AVX512
namespace avx512 {

static int64_t count_bits(const uint32_t* words, int64_t count) {
  const int64_t whole = count / 16 * 16;
  __m512i bits = _mm512_setzero_si512();
  for (int64_t j = 0; j < whole; j += 16)
    bits = _mm512_add_epi64(bits, _mm512_popcnt_epi64(_mm512_loadu_si512(words + j)));
  return _mm512_reduce_add_epi64(bits) + scalar::count_bits(words + whole, count - whole);
}

} // namespace avx512
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {
namespace {

int64_t count_bits(const uint32_t* words, int64_t count) {
  int64_t bits = 0, j = 0;
  while (j + 4 <= count) {
    // A byte of the sums has room for the counts of 31 vectors.
    const int64_t end = std::min(count / 4 * 4, j + 4 * 31);
    uint8x16_t sums = vdupq_n_u8(0);
    for (; j < end; j += 4)
      sums = vaddq_u8(sums, vcntq_u8(vreinterpretq_u8_u32(vld1q_u32(words + j))));
    bits += vaddlvq_u8(sums);
  }
  return bits + scalar::count_bits(words + j, count - j);
}

} // namespace
} // namespace neon
#endif

int64_t count_bits(const uint32_t* words, int64_t count) {
  return FEDMAP_DISPATCH(count_bits)(words, count);
}

void count_blocks(const uint32_t* words, int64_t count, int64_t* counts) {
  const auto count_bits = FEDMAP_DISPATCH(count_bits);
  for (int64_t j = 0; j < count; j += kBlockWords)
    counts[j / kBlockWords] = count_bits(words + j, std::min(kBlockWords, count - j));
}

int64_t sum_ranks(int64_t* rank, int64_t blocks) {
  int64_t before = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t bits = rank[b];
    rank[b] = before;
    before += bits;
  }
  return rank[blocks] = before;
}

} // namespace fedmap
