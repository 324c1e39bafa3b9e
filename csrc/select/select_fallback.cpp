// What a selection does where its bracket missed, or where ties fill it.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "select/selection.h"

namespace fedmap {

uint32_t Selection::radix() {
  const bool wide = width_ == 4;
  int64_t want = keep_;
  std::vector<uint64_t> bins = histogram(0, wide ? 16 : 0, 15);
  uint32_t first = static_cast<uint32_t>(descend(bins.data(), bins.size(), want));
  if (!wide)
    return settle(first, want);
  first <<= 16;
  if (static_cast<int64_t>(bins[first >> 16]) <= capacity_) {
    Bracket bracket{static_cast<int32_t>(first) - 1, static_cast<int32_t>(first | 0xffff), 0, 0};
    set_shift(bracket);
    pass(bracket, false);
    return resolve(bracket, want);
  }
  bins = histogram(first, 0, 16);
  first += static_cast<uint32_t>(descend(bins.data(), bins.size(), want));
  return settle(first, want);
}

// Counts the keys from `first` on in 2^bits bins of 2^shift keys. One thread for each 64 MiB: the
// counters of more would outgrow the memory that selection may use.
std::vector<uint64_t> Selection::histogram(uint32_t first, int shift, int bits) {
  ++reads_;
  std::vector<std::vector<uint64_t>> parts(workers_);
  parts[0].resize(size_t{1} << bits);
  for_tiles(threads_for(bytes_, threads_, 64 << 20), [&](const Tile& tile, int slot) {
    parts[slot].resize(size_t{1} << bits);
    uint64_t* bins = parts[slot].data();
    const void* from = values(tile);
    const uint32_t* words = within(tile);
    for (int64_t i = 0; i < tile.n; i += 32) {
      uint32_t eligible = words ? words[i / 32] : ~0u;
      if (tile.n - i < 32)
        eligible &= (1u << (tile.n - i)) - 1;
      for (; eligible; eligible &= eligible - 1) {
        uint32_t offset = magnitude_key(from, width_, i + __builtin_ctz(eligible)) - first;
        if (offset >> shift >> bits == 0)
          ++bins[offset >> shift];
      }
    }
  });
  for (int i = 1; i < workers_; ++i)
    for (size_t b = 0; b < parts[i].size(); ++b)
      parts[0][b] += parts[i][b];
  return std::move(parts[0]);
}

// Writes the mask of all keys above the threshold and the first `want` equal to it. In one read:
// tiles are begun in order, and each waits for those before it to say how many ties they left.
uint32_t Selection::settle(uint32_t threshold, int64_t want) {
  if (!writes())
    return threshold;
  ++reads_;
  const int32_t key = static_cast<int32_t>(threshold);
  const Bracket above{key - 1, key, 0, 0}, from{key - 1, key - 1, 0, 0};
  const Scan form = scan_for(dtype_, false);
  std::atomic<int64_t> turn{0};
  int64_t left = want;
  parallel_for(static_cast<int64_t>(tiles_.size()), workers_, [&](int64_t t, int index) {
    const Tile& tile = tiles_[t];
    Slot& slot = slots_[index];
    const int64_t ties = scan(form, tile, above, slot).candidates;
    for (int spins = 0; turn.load(std::memory_order_acquire) != t; ++spins)
      if (spins > 1000)
        std::this_thread::yield();
    const int64_t take = std::min(left, ties);
    left -= take;
    turn.store(t + 1, std::memory_order_release);
    // Many at once: the tile is still in L2, and reading it again is faster than bit by bit.
    if (take == ties && ties > tile.n / 8) {
      scan(form, tile, from, slot);
      return;
    }
    for (int64_t k = 0; k < take; ++k) {
      const uint32_t position = slot.candidates[k] & kPositionMask;
      words(tile)[position / 32] |= 1u << (position & 31);
      ++counts(tile)[position / kBlock];
    }
  });
  return finish(threshold);
}

} // namespace fedmap
