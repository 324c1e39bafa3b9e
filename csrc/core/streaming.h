// Stores that go past the cache (non-temporal), with a conversion where the dtype has 16 bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/ahead.h"
#include "core/cpu.h"
#include "core/half.h"

namespace fedmap {

// From this size on results go past the cache, by `stream`: they would not stay in it, and a line
// that is written whole need not be read first (unpacking 26 M float32 on Zen 4, 2 threads: 4.2
// instead of 6.3 ms). Only where `dst` is aligned, here and below, to whole vectors, and where
// lines to be written are not asked for ahead. Who puts lines together first needs an element's
// alignment.
constexpr int64_t kPastCache = 16 << 20;

inline bool goes_past_cache(const void* dst, int64_t bytes, size_t alignment = 64) {
  return bytes >= kPastCache && reinterpret_cast<uintptr_t>(dst) % alignment == 0 && !write_ahead();
}

// An sfence: other threads see streamed stores before those that follow.
inline void end_of_stream() {
#if FEDMAP_X86
  _mm_sfence();
#endif
}

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

inline void stream(float* dst, __m256 x) {
  _mm256_stream_ps(dst, x);
}
template <class T>
inline void stream(T* dst, __m256 x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(dst), narrow(x, dst));
}

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

inline void stream(float* dst, __m512 x) {
  _mm512_stream_ps(dst, x);
}
template <class T>
inline void stream(T* dst, __m512 x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), narrow(x, dst));
}

} // namespace avx512_core
FEDMAP_TARGET_END
#endif

} // namespace fedmap
