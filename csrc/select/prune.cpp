#include <algorithm>

#include "core/cpu.h"
#include "core/dtype.h"
#include "core/pool.h"
#include "select/select.h"

namespace fedmap {

namespace scalar {
namespace {

// Zeroes the values of the set bits; `words` are read through `gone`.
template <class T>
void zero_pruned(T* values, const uint32_t* before, const uint32_t* after, int64_t numel) {
  for (int64_t i = 0; i < numel; i += 32) {
    uint32_t gone = (before ? before[i / 32] : ~0u) & ~after[i / 32];
    if (numel - i < 32)
      gone &= (1u << (numel - i)) - 1;
    for (; gone; gone &= gone - 1)
      values[i + __builtin_ctz(gone)] = 0;
  }
}

} // namespace
} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {
namespace {

// All ones in the lanes of the set bits.
template <class T>
__m256i lanes(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit),
                              bit);
  } else {
    const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                          8192, 16384, static_cast<int16_t>(0x8000));
    return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(bits)), bit),
                              bit);
  }
}

template <class T>
void zero_pruned(T* values, const uint32_t* before, const uint32_t* after, int64_t numel) {
  constexpr int kLanes = 32 / sizeof(T);
  const int64_t whole = numel / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32) {
    uint32_t gone = (before ? before[i / 32] : ~0u) & ~after[i / 32];
    for (int64_t j = i; gone; j += kLanes, gone = kLanes < 32 ? gone >> kLanes : 0) {
      if (!(gone & ((1u << kLanes) - 1)))
        continue;
      __m256i* at = reinterpret_cast<__m256i*>(values + j);
      _mm256_storeu_si256(at, _mm256_andnot_si256(lanes<T>(gone), _mm256_loadu_si256(at)));
    }
  }
  scalar::zero_pruned(values + whole, before ? before + whole / 32 : before, after + whole / 32,
                      numel - whole);
}

} // namespace
} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {
namespace {

template <class T>
void zero_pruned(T* values, const uint32_t* before, const uint32_t* after, int64_t numel) {
  constexpr int kLanes = 64 / sizeof(T);
  const int64_t whole = numel / 32 * 32;
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t i = 0; i < whole; i += 32) {
    const uint32_t gone = (before ? before[i / 32] : ~0u) & ~after[i / 32];
    for (int lane = 0; lane < 32; lane += kLanes) {
      const uint32_t bits = gone >> lane;
      if constexpr (sizeof(T) == 4) {
        if (const __mmask16 k = static_cast<__mmask16>(bits))
          _mm512_mask_storeu_epi32(values + i + lane, k, zero);
      } else if (bits) {
        _mm512_mask_storeu_epi16(values + i + lane, bits, zero);
      }
    }
  }
  scalar::zero_pruned(values + whole, before ? before + whole / 32 : before, after + whole / 32,
                      numel - whole);
}

} // namespace
} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {
namespace {

// Clears the lanes of 32 elements whose bits are set.
void clear(uint32_t* values, uint32_t gone) {
  static constexpr uint32_t kFirst[4] = {1, 2, 4, 8};
  uint32x4_t bit = vld1q_u32(kFirst);
  const uint32x4_t word = vdupq_n_u32(gone);
  for (int k = 0; k < 32; k += 4, bit = vshlq_n_u32(bit, 4))
    vst1q_u32(values + k, vbicq_u32(vld1q_u32(values + k), vtstq_u32(word, bit)));
}
void clear(uint16_t* values, uint32_t gone) {
  static constexpr uint16_t kFirst[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint16x8_t bit = vld1q_u16(kFirst);
  for (int k = 0; k < 32; k += 8) {
    const uint16x8_t word = vdupq_n_u16(static_cast<uint16_t>(gone >> k & 0xff));
    vst1q_u16(values + k, vbicq_u16(vld1q_u16(values + k), vtstq_u16(word, bit)));
  }
}

template <class T>
void zero_pruned(T* values, const uint32_t* before, const uint32_t* after, int64_t numel) {
  const int64_t whole = numel / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32)
    if (const uint32_t gone = (before ? before[i / 32] : ~0u) & ~after[i / 32])
      clear(values + i, gone);
  scalar::zero_pruned(values + whole, before ? before + whole / 32 : before, after + whole / 32,
                      numel - whole);
}

} // namespace
} // namespace neon
#endif

namespace {

template <class T>
void zero_all(void* values, const uint32_t* before, const uint32_t* after, int64_t numel,
              int threads) {
  const auto zero_pruned = FEDMAP_DISPATCH(zero_pruned<T>);
  T* elements = static_cast<T*>(values);
  parallel_ranges(numel, 1 << 18, threads_for(numel * sizeof(T), threads),
                  [&](int64_t begin, int64_t end) {
                    zero_pruned(elements + begin, before ? before + begin / 32 : nullptr,
                                after + begin / 32, end - begin);
                  });
}

} // namespace

void zero_pruned(void* values, const uint32_t* before, const uint32_t* after, int64_t numel,
                 int dtype, int threads) {
  if (dtype == kFloat32)
    zero_all<uint32_t>(values, before, after, numel, threads);
  else
    zero_all<uint16_t>(values, before, after, numel, threads);
}

} // namespace fedmap
