// Looks for pruned weights that are not +0.0: what someone wrote that torch does not count.
// Contract: fedmap_sparse/_writes.py, `written_unseen`.
#include <algorithm>
#include <atomic>

#include "core/bits.h"
#include "core/cpu.h"
#include "core/dtype.h"
#include "core/pool.h"
#include "masked_step/segment.h"
#include "pack/pack_block.h"

namespace fedmap {

namespace scalar {
namespace {

// Whether any of n values outside the set bits has a bit set.
template <class T>
bool any_pruned(const T* values, const uint32_t* words, int64_t n) {
  uint32_t found = 0;
  for (int64_t i = 0; i < n; ++i)
    if (!(words[i / 32] >> (i & 31) & 1))
      found |= values[i];
  return found;
}

} // namespace
} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {
namespace {

template <class T>
bool any_pruned(const T* values, const uint32_t* words, int64_t n) {
  const int64_t whole = n / 32 * 32;
  const __m256i zero = _mm256_setzero_si256();
  const auto at = [&](int64_t i) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
  };
  uint32_t found = 0;
  for (int64_t i = 0; i < whole; i += 32) {
    uint32_t zeros = 0;
    if constexpr (sizeof(T) == 4) {
      for (int lane = 0; lane < 32; lane += 8) {
        const __m256i is = _mm256_cmpeq_epi32(at(i + lane), zero);
        zeros |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is))) << lane;
      }
    } else {
      const __m256i low = _mm256_cmpeq_epi16(at(i), zero),
                    high = _mm256_cmpeq_epi16(at(i + 16), zero);
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
      zeros = static_cast<uint32_t>(_mm256_movemask_epi8(both));
    }
    found |= ~zeros & ~words[i / 32];
  }
  return found || scalar::any_pruned(values + whole, words + whole / 32, n - whole);
}

} // namespace
} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {
namespace {

template <class T>
bool any_pruned(const T* values, const uint32_t* words, int64_t n) {
  const int64_t whole = n / 32 * 32;
  uint32_t found = 0;
  for (int64_t i = 0; i < whole; i += 32) {
    const __m512i low = _mm512_loadu_si512(values + i);
    uint32_t set;
    if constexpr (sizeof(T) == 4) {
      const __m512i high = _mm512_loadu_si512(values + i + 16);
      set = _mm512_test_epi32_mask(low, low) |
            static_cast<uint32_t>(_mm512_test_epi32_mask(high, high)) << 16;
    } else {
      set = _mm512_test_epi16_mask(low, low);
    }
    found |= set & ~words[i / 32];
  }
  return found || scalar::any_pruned(values + whole, words + whole / 32, n - whole);
}

} // namespace
} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {
namespace {

// Whether a value of 32 whose bit is not set has a bit set.
bool any_of_32(const uint32_t* values, uint32_t word) {
  static constexpr uint32_t kFirst[4] = {1, 2, 4, 8};
  uint32x4_t bit = vld1q_u32(kFirst), found = vdupq_n_u32(0);
  for (int k = 0; k < 32; k += 4, bit = vshlq_n_u32(bit, 4))
    found = vorrq_u32(found, vbicq_u32(vld1q_u32(values + k), vtstq_u32(vdupq_n_u32(word), bit)));
  return vmaxvq_u32(found);
}
bool any_of_32(const uint16_t* values, uint32_t word) {
  static constexpr uint16_t kFirst[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint16x8_t bit = vld1q_u16(kFirst);
  uint16x8_t found = vdupq_n_u16(0);
  for (int k = 0; k < 32; k += 8) {
    const uint16x8_t byte = vdupq_n_u16(static_cast<uint16_t>(word >> k & 0xff));
    found = vorrq_u16(found, vbicq_u16(vld1q_u16(values + k), vtstq_u16(byte, bit)));
  }
  return vmaxvq_u16(found);
}

template <class T>
bool any_pruned(const T* values, const uint32_t* words, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    if (any_of_32(values + i, words[i / 32]))
      return true;
  return scalar::any_pruned(values + i, words + i / 32, n - i);
}

} // namespace
} // namespace neon
#endif

namespace {

constexpr int64_t kAll = 1 << 16; // a model of so many prunable elements is read whole
constexpr int64_t kPiece = 256;   // of each span of larger ones
// Spans from a piece's lines being asked for to their being read. Pieces lie too far apart for the
// hardware to foresee: without this a cold mobilenetv2 took 85 us, 50 with it.
constexpr int kAhead = 4;
constexpr int64_t kTask = 8 * kSpan; // elements of a thread's task
// A smaller model is looked at by the caller: to wake a thread took a cold resnet20 longer.
constexpr int64_t kAlone = 1 << 20;

// Elements [begin, limit) of the prunable part of a model, a span at a time, and what of it is
// looked at.
struct Spans {
  const Segment *segment, *last;
  int64_t begin, limit, turn;
  bool all;                // elements of a span, not a piece of it
  int64_t at = 0, end = 0; // the span
  int64_t from = 0, to = 0;

  bool next() {
    const bool inside = end > 0 && end < segment->offset + segment->numel;
    if (!inside && end > 0)
      ++segment;
    while (segment < last && (segment->numel == 0 || segment->offset + segment->numel <= begin))
      ++segment;
    if (segment >= last)
      return false;
    at = inside ? end : std::max(segment->offset, begin);
    if (at >= limit)
      return false;
    from = at;
    to = end = std::min(segment->offset + segment->numel, at / kSpan * kSpan + kSpan);
    if (!all) {
      const int64_t pieces = (end - at + kPiece - 1) / kPiece;
      from = at + (turn + at / kSpan) % pieces * kPiece;
      to = std::min(end, from + kPiece);
    }
    return true;
  }
};

template <class T>
bool look(const T* values, const uint32_t* words, const int64_t* rank, Spans span) {
  const auto any = FEDMAP_DISPATCH(any_pruned<T>);
  const auto before = [&](int64_t at) {
    const int64_t block = at / kBlock, first = block * kBlockWords;
    return rank[block] + count_bits(words + first, at / 32 - first);
  };
  Spans ahead = span;
  const auto fetch = [&] {
    if (span.turn < 0 || !ahead.next() || ahead.to - ahead.from > kPiece)
      return;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = ahead.from; i < ahead.to; i += kLine)
      __builtin_prefetch(values + i);
    __builtin_prefetch(words + ahead.from / 32);
    for (const int64_t edge : {ahead.at, ahead.end}) {
      __builtin_prefetch(rank + edge / kBlock);
      for (int64_t i = edge / kBlock * kBlock; i < edge; i += 512) // a line of words
        __builtin_prefetch(words + i / 32);
    }
  };
  for (int i = 0; i < kAhead; ++i)
    fetch();
  while (span.next()) {
    fetch();
    const int64_t n = span.end - span.at;
    // Padding after a segment is zero and has no survivor: counting to a whole word is exact.
    const bool stepped = span.turn >= 0 && span.segment->gradient &&
                         before(mask_words(span.end) * 32) - before(span.at) >=
                             (n + kSparse - 1) / kSparse; // a step writes its zeros
    if (!stepped && any(values + span.from, words + span.from / 32, span.to - span.from))
      return true;
  }
  return false;
}

template <class T>
bool look(const T* values, const uint32_t* words, const int64_t* rank, int64_t prunable,
          const Segment* segments, int64_t nseg, int64_t turn, int threads) {
  const bool all = turn < 0 || prunable <= kAll;
  const int64_t task = prunable <= kAlone ? std::max<int64_t>(prunable, 1) : kTask;
  std::atomic<bool> found{false};
  parallel_ranges(prunable, task, threads, [&](int64_t begin, int64_t end) {
    if (!found && look(values, words, rank, {segments, segments + nseg, begin, end, turn, all}))
      found = true;
  });
  return found;
}

} // namespace

bool written_unseen(const void* values, int dtype, const uint32_t* words, const int64_t* rank,
                    int64_t prunable, const Segment* segments, int64_t nseg, int64_t turn,
                    int threads) {
  const auto of = [&](const auto* typed) {
    return look(typed, words, rank, prunable, segments, nseg, turn, threads);
  };
  return dtype == kFloat32 ? of(static_cast<const uint32_t*>(values))
                           : of(static_cast<const uint16_t*>(values));
}

} // namespace fedmap
