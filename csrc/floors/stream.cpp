// Plain streams over memory: the floors that benchmarks measure beside each case.
#include <atomic>
#include <cstring>

#include "core/ahead.h"
#include "core/bits.h"
#include "core/cpu.h"
#include "core/pool.h"
#include "floors/stream.h"

namespace fedmap {

constexpr int64_t kFloorShare = 1 << 20; // bytes

namespace scalar {

static uint64_t read(const uint64_t* src, int64_t n) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i)
    sum += src[i];
  return sum;
}

static void copy(const uint64_t* src, uint64_t* dst, int64_t n) {
  std::memcpy(dst, src, n * 8);
}

static void inplace(uint64_t* buf, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    buf[i] += 1;
}

static void touched(uint32_t* buf, const uint16_t* lines, int64_t n) {
  for (int64_t line = 0; line < n; ++line)
    if (lines[line])
      for (int64_t i = 16 * line; i < 16 * line + 16; ++i)
        buf[i] += 1;
}

} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

static __m256i load(const uint64_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

static uint64_t read(const uint64_t* src, int64_t n) {
  __m256i sums[4] = {};
  const int64_t ahead = read_ahead();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    if (ahead)
      fetch_lines(reinterpret_cast<const char*>(src + i) + ahead, 128);
    for (int k = 0; k < 4; ++k)
      sums[k] = _mm256_add_epi64(sums[k], load(src + i + 4 * k));
  }
  uint64_t total[4];
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(total),
      _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3])));
  return total[0] + total[1] + total[2] + total[3] + scalar::read(src + i, n - i);
}

// Past the cache, which spares the read of each line that is written, unless those are asked for.
static void copy(const uint64_t* src, uint64_t* dst, int64_t n) {
  if (reinterpret_cast<uintptr_t>(dst) % 32)
    return scalar::copy(src, dst, n);
  const int64_t ahead = read_ahead(), writes = write_ahead();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    ask(src + i, ahead);
    ask(dst + i, writes);
    for (int k = 0; k < 8; k += 4) {
      __m256i* const to = reinterpret_cast<__m256i*>(dst + i + k);
      if (writes)
        _mm256_store_si256(to, load(src + i + k));
      else
        _mm256_stream_si256(to, load(src + i + k));
    }
  }
  _mm_sfence();
  scalar::copy(src + i, dst + i, n - i);
}

static void inplace(uint64_t* buf, int64_t n) {
  const int64_t ahead = read_ahead();
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    if (ahead && i % 8 == 0)
      fetch_lines(reinterpret_cast<const char*>(buf + i) + ahead, 64);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buf + i),
                        _mm256_add_epi64(load(buf + i), _mm256_set1_epi64x(1)));
  }
  scalar::inplace(buf + i, n - i);
}

static void touched(uint32_t* buf, const uint16_t* lines, int64_t n) {
  const int64_t ahead = read_ahead() / 64; // lines
  for (int64_t line = 0; line < n; ++line) {
    if (ahead && line + ahead < n && lines[line + ahead])
      fetch_lines(buf + 16 * (line + ahead), 64);
    if (!lines[line])
      continue;
    __m256i* at = reinterpret_cast<__m256i*>(buf + 16 * line);
    for (int k = 0; k < 2; ++k)
      _mm256_storeu_si256(at + k,
                          _mm256_add_epi32(_mm256_loadu_si256(at + k), _mm256_set1_epi32(1)));
  }
}

} // namespace avx2
FEDMAP_TARGET_END

// Wider vectors move no more bytes: memory is the limit.
namespace avx512_core {
using avx2::copy;
using avx2::inplace;
using avx2::read;
using avx2::touched;
} // namespace avx512_core

#elif FEDMAP_ARM64
// Compilers make vectors of these loops by themselves.
namespace neon {
using scalar::copy;
using scalar::inplace;
using scalar::read;
using scalar::touched;
} // namespace neon
#endif

uint64_t stream_read(const void* src, int64_t nbytes, int threads) {
  const uint64_t* words = static_cast<const uint64_t*>(src);
  const auto read = FEDMAP_DISPATCH(read);
  std::atomic<uint64_t> total{0};
  parallel_ranges(nbytes / 8, kFloorShare / 8, threads_for(nbytes, threads),
                  [&](int64_t begin, int64_t end) {
                    total.fetch_add(read(words + begin, end - begin), std::memory_order_relaxed);
                  });
  return total.load();
}

void stream_copy(const void* src, void* dst, int64_t nbytes, int threads) {
  const uint64_t* from = static_cast<const uint64_t*>(src);
  uint64_t* to = static_cast<uint64_t*>(dst);
  const auto copy = FEDMAP_DISPATCH(copy);
  parallel_ranges(nbytes / 8, kFloorShare / 8, threads_for(nbytes, threads),
                  [&](int64_t begin, int64_t end) { copy(from + begin, to + begin, end - begin); });
}

void stream_inplace(void* buf, int64_t nbytes, int threads) {
  uint64_t* words = static_cast<uint64_t*>(buf);
  const auto inplace = FEDMAP_DISPATCH(inplace);
  parallel_ranges(nbytes / 8, kFloorShare / 8, threads_for(nbytes, threads),
                  [&](int64_t begin, int64_t end) { inplace(words + begin, end - begin); });
}

void stream_touched(float* buf, const uint32_t* words, int64_t numel, int threads) {
  const auto touched = FEDMAP_DISPATCH(touched);
  parallel_ranges(numel / 16, kFloorShare / 64, threads_for(numel * 4, threads),
                  [&](int64_t begin, int64_t end) {
                    touched(reinterpret_cast<uint32_t*>(buf) + 16 * begin,
                            reinterpret_cast<const uint16_t*>(words) + begin, end - begin);
                  });
}

} // namespace fedmap
