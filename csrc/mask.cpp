#include <atomic>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace fedmap {
namespace {

constexpr uint64_t kPosition = 0x9E3779B97F4A7C15ull;

} // namespace

int64_t rank_index(const uint32_t* words, int64_t numel, int64_t* rank, int threads) {
  (void)threads;
  int64_t total = 0, blocks = mask_blocks(numel), count = mask_words(numel);
  for (int64_t b = 0; b < blocks; ++b) {
    rank[b] = total;
    for (int64_t j = b * kBlockWords; j < std::min(count, (b + 1) * kBlockWords); ++j)
      total += __builtin_popcount(words[j]);
  }
  rank[blocks] = total;
  return total;
}

void mask_from_bools(const uint8_t* bools, int64_t numel, uint32_t* words, int threads) {
  parallel_ranges(mask_words(numel), 4096, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      uint32_t word = 0;
      for (int64_t i = 32 * j; i < std::min(numel, 32 * j + 32); ++i)
        word |= static_cast<uint32_t>(bools[i] != 0) << (i & 31);
      words[j] = word;
    }
  });
}

void mask_to_bools(const uint32_t* words, int64_t numel, uint8_t* bools, int threads) {
  parallel_ranges(numel, 1 << 17, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      bools[i] = words[i >> 5] >> (i & 31) & 1;
  });
}

bool mask_subset(const uint32_t* a, const uint32_t* b, int64_t numel, int threads) {
  std::atomic<bool> subset{true};
  parallel_ranges(mask_words(numel), 1 << 15, threads, [&](int64_t begin, int64_t end) {
    uint32_t outside = 0;
    for (int64_t j = begin; j < end; ++j)
      outside |= a[j] & ~b[j];
    if (outside)
      subset.store(false, std::memory_order_relaxed);
  });
  return subset.load();
}

std::array<uint64_t, 2> mask_digest(const uint32_t* words, int64_t numel, int threads) {
  (void)threads;
  int64_t count = mask_words(numel);
  uint64_t h1 = static_cast<uint64_t>(numel), h2 = static_cast<uint64_t>(numel) * kPosition;
  for (int64_t j = 0; 2 * j < count; ++j) {
    uint64_t w = words[2 * j];
    if (2 * j + 1 < count)
      w |= static_cast<uint64_t>(words[2 * j + 1]) << 32;
    uint64_t t = w + static_cast<uint64_t>(j + 1) * kPosition;
    t = (t ^ (t >> 30)) * 0xBF58476D1CE4E5B9ull;
    t ^= t >> 27;
    h1 += t;
    uint64_t u = t * 0x94D049BB133111EBull;
    h2 += u ^ (u >> 31);
  }
  return {h1, h2};
}

} // namespace fedmap
