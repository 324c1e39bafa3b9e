#include <atomic>
#include <cstring>

#include "kernels.h"
#include "pool.h"

namespace fedmap {

uint64_t stream_read(const void* src, int64_t nbytes, int threads) {
  std::atomic<uint64_t> total{0};
  const uint64_t* words = static_cast<const uint64_t*>(src);
  parallel_ranges(nbytes / 8, 1 << 16, threads, [&](int64_t begin, int64_t end) {
    uint64_t sum = 0;
    for (int64_t i = begin; i < end; ++i)
      sum += words[i];
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total.load();
}

void stream_copy(const void* src, void* dst, int64_t nbytes, int threads) {
  parallel_ranges(nbytes, 1 << 19, threads, [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(dst) + begin, static_cast<const char*>(src) + begin,
                end - begin);
  });
}

void stream_inplace(void* buf, int64_t nbytes, int threads) {
  uint64_t* words = static_cast<uint64_t*>(buf);
  parallel_ranges(nbytes / 8, 1 << 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      words[i] += 1;
  });
}

void stream_touched(float* buf, const uint32_t* words, int64_t numel, int threads) {
  const uint16_t* lines = reinterpret_cast<const uint16_t*>(words);
  uint32_t* bits = reinterpret_cast<uint32_t*>(buf);
  parallel_ranges(numel / 16, 1 << 13, threads, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line)
      if (lines[line])
        for (int64_t i = 16 * line; i < 16 * line + 16; ++i)
          bits[i] += 1;
  });
}

} // namespace fedmap
