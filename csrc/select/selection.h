// One selection of the largest magnitudes: its state, and what select.cpp, select_sample.cpp and
// select_fallback.cpp do with it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/bits.h"
#include "core/dtype.h"
#include "core/pool.h"
#include "select/select.h"
#include "select/select_scan.h"

namespace fedmap {

constexpr int kDigit = 11; // bits resolved at once: 8 KiB of counters stay in L1
constexpr int kBins = 1 << kDigit;
// Smaller shares of a read are slower: each start costs the prefetchers their streams.
constexpr int64_t kShare = 8 * kTile;
constexpr uint32_t kPositionMask = kTile - 1;
constexpr int64_t kSmall = 4096; // below this a sample is not worth its cost

struct Tile {
  int32_t input, n;
  int64_t begin; // its first element in the input
  int64_t first; // its first candidate
  int32_t candidates;
  int32_t ties; // how many of its candidates equal to the threshold are kept
};

// What one thread works with.
struct Slot {
  alignas(64) uint32_t bins[kBins];
  uint32_t words[kTile / 32];
  int64_t counts[kTile / kBlock];
  Tally tally;
  uint32_t* candidates;
};

// The bin that holds the want-th of the counted, from the highest bin down; `want` becomes its rank
// within that bin.
template <class Count>
inline int64_t descend(const Count* bins, int64_t size, int64_t& want) {
  int64_t bin = size - 1;
  for (; static_cast<int64_t>(bins[bin]) < want; --bin)
    want -= bins[bin];
  return bin;
}

class Selection {
 public:
  Selection(const std::vector<SelectInput>& inputs, int dtype, int64_t eligible, int64_t keep,
            int threads);
  uint32_t run();
  int reads() const { return reads_; }

 private:
  template <class F>
  void for_tiles(int workers, F&& f);
  int64_t shares() const { return static_cast<int64_t>(shares_.size()) - 1; }
  void clear_bins() {
    for (int i = 0; i < workers_; ++i)
      std::memset(slots_[i].bins, 0, sizeof slots_[i].bins);
  }
  void add_bins() {
    for (int i = 1; i < workers_; ++i)
      for (int b = 0; b < kBins; ++b)
        slots_[0].bins[b] += slots_[i].bins[b];
  }
  uint32_t bisect();
  bool guess(Bracket& bracket);
  void sample(int64_t stride, int64_t size);
  void set_shift(Bracket& bracket) const;
  Tally pass(const Bracket& bracket, bool count_ties);
  uint32_t resolve(const Bracket& bracket, int64_t want);
  uint32_t mark(const Bracket& bracket, uint32_t first, uint32_t last, int64_t want, int64_t count);
  void share_ties(const Bracket& bracket, uint32_t key, int64_t want, int workers);
  uint32_t radix();
  std::vector<uint64_t> histogram(uint32_t first, int shift, int bits);
  uint32_t settle(uint32_t threshold, int64_t want);
  uint32_t finish(uint32_t threshold);

  const uint32_t* within(const Tile& tile) const {
    const uint32_t* words = inputs_[tile.input].within;
    return words ? words + tile.begin / 32 : nullptr;
  }
  const void* values(const Tile& tile) const {
    return static_cast<const char*>(inputs_[tile.input].values) + tile.begin * width_;
  }
  // Where the bracket is narrow, as it is for 16 bits, a candidate holds its whole key: reading the
  // value again took most of the time of 10^8 bfloat16, of which every 600th equals the threshold.
  uint32_t key_of(const Bracket& bracket, const Tile& tile, uint32_t candidate) const {
    if (bracket.shift == 0)
      return static_cast<uint32_t>(bracket.below + 1) + (candidate >> kTileBits);
    return magnitude_key(values(tile), width_, candidate & kPositionMask);
  }
  uint32_t* words(const Tile& tile) const { return inputs_[tile.input].words + tile.begin / 32; }
  int64_t* counts(const Tile& tile) const { return inputs_[tile.input].rank + tile.begin / kBlock; }
  bool writes() const { return inputs_[0].rank; } // an empty tensor's words may be null
  Tally scan(Scan form, const Tile& tile, const Bracket& bracket, Slot& slot) const {
    return form(values(tile), within(tile), tile.n, bracket, writes() ? words(tile) : slot.words,
                writes() ? counts(tile) : slot.counts, slot.candidates);
  }

  const std::vector<SelectInput>& inputs_;
  const int dtype_, width_;
  const int64_t eligible_, keep_;
  int64_t bytes_ = 0;
  int threads_, workers_;
  int reads_ = 0;
  std::vector<Tile> tiles_;
  std::vector<int32_t> shares_; // first tile of each share, and the number of tiles
  Slot* slots_;
  int64_t capacity_, collected_ = 0;
  uint32_t* candidates_; // before they are collected, the sampled keys
};

template <class F>
void Selection::for_tiles(int workers, F&& f) {
  parallel_for(shares(), std::min(workers, workers_), [&](int64_t share, int slot) {
    for (int32_t t = shares_[share]; t < shares_[share + 1]; ++t)
      f(tiles_[t], slot);
  });
}

} // namespace fedmap
