// Masks made and read: bools, subset, digest, rank index.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/bits.h"
#include "core/cpu.h"
#include "core/pool.h"
#include "mask/mask.h"

namespace fedmap {
namespace {

// The digest's constants: the golden ratio's, and splitmix64's two multipliers.
constexpr uint64_t kPosition = 0x9E3779B97F4A7C15u;
constexpr uint64_t kMiddle = 0xBF58476D1CE4E5B9u;
constexpr uint64_t kLast = 0x94D049BB133111EBu;

// Words that one task takes: 256 KiB.
constexpr int64_t kMaskShare = 1 << 16;

struct Sums {
  uint64_t middle = 0, output = 0;
};

} // namespace

namespace scalar {
namespace {

void from_bools(const uint8_t* bools, int64_t numel, uint32_t* words) {
  for (int64_t i = 0; i < numel; i += 32) {
    uint32_t word = 0;
    for (int64_t j = i; j < std::min(numel, i + 32); ++j)
      word |= static_cast<uint32_t>(bools[j] != 0) << (j - i);
    words[i / 32] = word;
  }
}

void to_bools(const uint32_t* words, int64_t numel, uint8_t* bools) {
  for (int64_t i = 0; i < numel; ++i)
    bools[i] = words[i / 32] >> (i & 31) & 1;
}

bool subset(const uint32_t* a, const uint32_t* b, int64_t count) {
  uint32_t outside = 0;
  for (int64_t j = 0; j < count; ++j)
    outside |= a[j] & ~b[j];
  return !outside;
}

// Of `count` words, the first being the 64-bit word number `position`.
Sums digest(const uint32_t* words, int64_t count, int64_t position) {
  Sums sums;
  uint64_t at = static_cast<uint64_t>(position) * kPosition;
  for (int64_t j = 0; j < count; j += 2) {
    const uint64_t word = j + 1 < count ? load_64(words + j) : words[j];
    at += kPosition;
    uint64_t t = word + at;
    t = (t ^ t >> 30) * kMiddle;
    t ^= t >> 27;
    uint64_t u = t * kLast;
    sums.middle += t;
    sums.output += u ^ u >> 31;
  }
  return sums;
}

} // namespace
} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {
namespace {

void from_bools(const uint8_t* bools, int64_t numel, uint32_t* words) {
  const int64_t whole = numel / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bools + i));
    words[i / 32] = ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256()));
  }
  scalar::from_bools(bools + whole, numel - whole, words + whole / 32);
}

void to_bools(const uint32_t* words, int64_t numel, uint8_t* bools) {
  const int64_t whole = numel / 32 * 32;
  const __m256i spread =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  for (int64_t i = 0; i < whole; i += 32) {
    const __m256i bytes =
        _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(words[i / 32])), spread);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bools + i),
                        _mm256_and_si256(set, _mm256_set1_epi8(1)));
  }
  scalar::to_bools(words + whole / 32, numel - whole, bools + whole);
}

bool subset(const uint32_t* a, const uint32_t* b, int64_t count) {
  const int64_t whole = count / 8 * 8;
  __m256i outside = _mm256_setzero_si256();
  for (int64_t j = 0; j < whole; j += 8)
    outside = _mm256_or_si256(
        outside, _mm256_andnot_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + j)),
                                     _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + j))));
  return _mm256_testz_si256(outside, outside) &&
         scalar::subset(a + whole, b + whole, count - whole);
}

// The low halves of 64-bit products, from 32-bit multiplications.
__m256i multiply(__m256i x, uint64_t factor) {
  const __m256i low = _mm256_set1_epi64x(static_cast<int64_t>(factor));
  const __m256i high = _mm256_set1_epi64x(static_cast<int64_t>(factor >> 32));
  const __m256i crossed =
      _mm256_add_epi64(_mm256_mul_epu32(x, high), _mm256_mul_epu32(_mm256_srli_epi64(x, 32), low));
  return _mm256_add_epi64(_mm256_mul_epu32(x, low), _mm256_slli_epi64(crossed, 32));
}

Sums digest(const uint32_t* words, int64_t count, int64_t position) {
  const int64_t whole = count / 8 * 8;
  const __m256i step = _mm256_set1_epi64x(static_cast<int64_t>(4 * kPosition));
  __m256i at = multiply(
      _mm256_add_epi64(_mm256_set1_epi64x(position), _mm256_setr_epi64x(1, 2, 3, 4)), kPosition);
  __m256i middles = _mm256_setzero_si256(), outputs = middles;
  for (int64_t j = 0; j < whole; j += 8) {
    __m256i t =
        _mm256_add_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + j)), at);
    at = _mm256_add_epi64(at, step);
    t = multiply(_mm256_xor_si256(t, _mm256_srli_epi64(t, 30)), kMiddle);
    t = _mm256_xor_si256(t, _mm256_srli_epi64(t, 27));
    const __m256i u = multiply(t, kLast);
    middles = _mm256_add_epi64(middles, t);
    outputs = _mm256_add_epi64(outputs, _mm256_xor_si256(u, _mm256_srli_epi64(u, 31)));
  }
  Sums sums = scalar::digest(words + whole, count - whole, position + whole / 2);
  uint64_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), middles);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes + 4), outputs);
  for (int k = 0; k < 4; ++k) {
    sums.middle += lanes[k];
    sums.output += lanes[4 + k];
  }
  return sums;
}

} // namespace
} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {
namespace {

void from_bools(const uint8_t* bools, int64_t numel, uint32_t* words) {
  const int64_t whole = numel / 64 * 64;
  for (int64_t i = 0; i < whole; i += 64) {
    const __m512i v = _mm512_loadu_si512(bools + i);
    const uint64_t word = _mm512_test_epi8_mask(v, v);
    std::memcpy(words + i / 32, &word, sizeof word);
  }
  scalar::from_bools(bools + whole, numel - whole, words + whole / 32);
}

void to_bools(const uint32_t* words, int64_t numel, uint8_t* bools) {
  const int64_t whole = numel / 64 * 64;
  for (int64_t i = 0; i < whole; i += 64)
    _mm512_storeu_si512(bools + i,
                        _mm512_maskz_mov_epi8(load_64(words + i / 32), _mm512_set1_epi8(1)));
  scalar::to_bools(words + whole / 32, numel - whole, bools + whole);
}

bool subset(const uint32_t* a, const uint32_t* b, int64_t count) {
  const int64_t whole = count / 16 * 16;
  __m512i outside = _mm512_setzero_si512();
  for (int64_t j = 0; j < whole; j += 16)
    outside = _mm512_or_si512(
        outside, _mm512_andnot_si512(_mm512_loadu_si512(b + j), _mm512_loadu_si512(a + j)));
  return !_mm512_test_epi64_mask(outside, outside) &&
         scalar::subset(a + whole, b + whole, count - whole);
}

Sums digest(const uint32_t* words, int64_t count, int64_t position) {
  const int64_t whole = count / 16 * 16;
  const __m512i one = _mm512_set1_epi64(static_cast<int64_t>(kPosition));
  const __m512i middle = _mm512_set1_epi64(static_cast<int64_t>(kMiddle));
  const __m512i last = _mm512_set1_epi64(static_cast<int64_t>(kLast));
  const __m512i step = _mm512_set1_epi64(static_cast<int64_t>(8 * kPosition));
  __m512i at = _mm512_mullo_epi64(one, _mm512_add_epi64(_mm512_set1_epi64(position),
                                                        _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8)));
  __m512i middles = _mm512_setzero_si512(), outputs = middles;
  for (int64_t j = 0; j < whole; j += 16) {
    __m512i t = _mm512_add_epi64(_mm512_loadu_si512(words + j), at);
    at = _mm512_add_epi64(at, step);
    t = _mm512_mullo_epi64(_mm512_xor_si512(t, _mm512_srli_epi64(t, 30)), middle);
    t = _mm512_xor_si512(t, _mm512_srli_epi64(t, 27));
    const __m512i u = _mm512_mullo_epi64(t, last);
    middles = _mm512_add_epi64(middles, t);
    outputs = _mm512_add_epi64(outputs, _mm512_xor_si512(u, _mm512_srli_epi64(u, 31)));
  }
  Sums sums = scalar::digest(words + whole, count - whole, position + whole / 2);
  sums.middle += static_cast<uint64_t>(_mm512_reduce_add_epi64(middles));
  sums.output += static_cast<uint64_t>(_mm512_reduce_add_epi64(outputs));
  return sums;
}

} // namespace
} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {
namespace {

void from_bools(const uint8_t* bools, int64_t numel, uint32_t* words) {
  const auto is_set = [](const uint8_t* at) {
    const uint8x16_t v = vld1q_u8(at);
    return vtstq_u8(v, v);
  };
  const int64_t whole = numel / 64 * 64;
  for (int64_t i = 0; i < whole; i += 64)
    store_64(words + i / 32, bits_of(is_set(bools + i), is_set(bools + i + 16),
                                     is_set(bools + i + 32), is_set(bools + i + 48)));
  scalar::from_bools(bools + whole, numel - whole, words + whole / 32);
}

void to_bools(const uint32_t* words, int64_t numel, uint8_t* bools) {
  const int64_t whole = numel / 32 * 32;
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
  const uint8x16_t first = vcombine_u8(vdup_n_u8(0), vdup_n_u8(1));
  const uint8x16_t second = vcombine_u8(vdup_n_u8(2), vdup_n_u8(3));
  for (int64_t i = 0; i < whole; i += 32) {
    const uint8x16_t word = vreinterpretq_u8_u32(vdupq_n_u32(words[i / 32]));
    vst1q_u8(bools + i, vshrq_n_u8(vtstq_u8(vqtbl1q_u8(word, first), bit), 7));
    vst1q_u8(bools + i + 16, vshrq_n_u8(vtstq_u8(vqtbl1q_u8(word, second), bit), 7));
  }
  scalar::to_bools(words + whole / 32, numel - whole, bools + whole);
}

// Compilers make vectors of the one; the other is 64-bit products, which NEON has not.
using scalar::digest;
using scalar::subset;

} // namespace
} // namespace neon
#endif

int64_t rank_index(const uint32_t* words, int64_t numel, int64_t* rank, int threads) {
  const int64_t count = mask_words(numel);
  parallel_ranges(count, kMaskShare, threads_for(count * 4, threads),
                  [&](int64_t begin, int64_t end) {
                    count_blocks(words + begin, end - begin, rank + begin / kBlockWords);
                  });
  return sum_ranks(rank, mask_blocks(numel));
}

void mask_from_bools(const uint8_t* bools, int64_t numel, uint32_t* words, int threads) {
  const auto from_bools = FEDMAP_DISPATCH(from_bools);
  parallel_ranges(numel, 4 * kMaskShare, threads_for(numel, threads),
                  [&](int64_t begin, int64_t end) {
                    from_bools(bools + begin, end - begin, words + begin / 32);
                  });
}

void mask_to_bools(const uint32_t* words, int64_t numel, uint8_t* bools, int threads) {
  const auto to_bools = FEDMAP_DISPATCH(to_bools);
  parallel_ranges(numel, 4 * kMaskShare, threads_for(numel, threads),
                  [&](int64_t begin, int64_t end) {
                    to_bools(words + begin / 32, end - begin, bools + begin);
                  });
}

bool mask_subset(const uint32_t* a, const uint32_t* b, int64_t numel, int threads) {
  const int64_t count = mask_words(numel);
  const auto subset = FEDMAP_DISPATCH(subset);
  std::atomic<bool> holds{true};
  parallel_ranges(
      count, kMaskShare, threads_for(count * 8, threads), [&](int64_t begin, int64_t end) {
        if (holds.load(std::memory_order_relaxed) && !subset(a + begin, b + begin, end - begin))
          holds.store(false, std::memory_order_relaxed);
      });
  return holds.load();
}

std::array<uint64_t, 2> mask_digest(const uint32_t* words, int64_t numel, int threads) {
  const int64_t count = mask_words(numel);
  const auto digest = FEDMAP_DISPATCH(digest);
  std::atomic<uint64_t> middle{static_cast<uint64_t>(numel)};
  std::atomic<uint64_t> output{static_cast<uint64_t>(numel) * kPosition};
  parallel_ranges(count, kMaskShare, threads_for(count * 4, threads),
                  [&](int64_t begin, int64_t end) {
                    Sums sums = digest(words + begin, end - begin, begin / 2);
                    middle.fetch_add(sums.middle, std::memory_order_relaxed);
                    output.fetch_add(sums.output, std::memory_order_relaxed);
                  });
  return {middle.load(), output.load()};
}

void ranks_at(const uint32_t* words, const int64_t* rank, const int64_t* positions, int64_t count,
              int64_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = positions[i], block = position / kBlock;
    int64_t sum = rank[block];
    for (int64_t w = block * kBlockWords; w < position / 32; ++w)
      sum += __builtin_popcount(words[w]);
    if (position % 32)
      sum += __builtin_popcount(words[position / 32] & ((1u << position % 32) - 1));
    out[i] = sum;
  }
}

} // namespace fedmap
