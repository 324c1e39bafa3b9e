#include <algorithm>

#include "kernels.h"
#include "pool.h"

namespace fedmap {
namespace {

bool bit(const uint32_t* words, int64_t i) { return words[i >> 5] >> (i & 31) & 1; }

} // namespace

void relative(const uint32_t* child, const uint32_t* parent, const int64_t* parent_rank,
              int64_t numel, uint32_t* out, int threads) {
  (void)threads;
  std::fill_n(out, mask_words(parent_rank[mask_blocks(numel)]), 0u);
  int64_t o = 0;
  for (int64_t i = 0; i < numel; ++i)
    if (bit(parent, i)) {
      out[o >> 5] |= static_cast<uint32_t>(bit(child, i)) << (o & 31);
      ++o;
    }
}

void nest(const uint32_t* kept, const uint32_t* parent, const int64_t* parent_rank, int64_t numel,
          uint32_t* out, int threads) {
  (void)threads, (void)parent_rank;
  std::fill_n(out, mask_words(numel), 0u);
  int64_t o = 0;
  for (int64_t i = 0; i < numel; ++i)
    if (bit(parent, i))
      out[i >> 5] |= static_cast<uint32_t>(bit(kept, o++)) << (i & 31);
}

} // namespace fedmap
