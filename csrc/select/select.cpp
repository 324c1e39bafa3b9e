// Exact selection of the largest magnitudes.
//
// A stratified sample brackets the wanted rank; one read of the values writes the bitmap of what
// lies above the bracket and collects what lies within it; those candidates are resolved by radix,
// their ties by index. Where the bracket missed, or holds too many for the buffer, histograms of
// the keys take two more reads and a last one writes the mask: four in the worst case.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "core/pool.h"
#include "select/select_scan.h"
#include "select/selection.h"

namespace fedmap {
namespace {

constexpr int kOffsetBits = 32 - kTileBits;
constexpr int64_t kSortable = 1024;

// A candidate that shares its leading bits with the threshold. The largest first, ties by index.
struct Undecided {
  uint32_t key, position;
  int32_t tile;

  bool operator<(const Undecided& other) const {
    return key != other.key     ? key > other.key
           : tile != other.tile ? tile < other.tile
                                : position < other.position;
  }
};

// Kept by each thread that selects, for its next call: giving a megabyte back to the system and
// faulting it in again costs as much as selecting from 10,000 elements.
char* scratch(size_t bytes) {
  static thread_local std::unique_ptr<char[]> block;
  static thread_local size_t size = 0;
  if (size < bytes) {
    block.reset();
    block.reset(new char[bytes]);
    size = bytes;
  }
  return block.get();
}

constexpr size_t whole_lines(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

int bit_width(uint32_t x) {
  return x ? 32 - __builtin_clz(x) : 0;
}

thread_local int last_reads = 0;

} // namespace

Selection::Selection(const std::vector<SelectInput>& inputs, int dtype, int64_t eligible,
                     int64_t keep, int threads)
    : inputs_(inputs), dtype_(dtype), width_(static_cast<int>(dtype_bytes(dtype))),
      eligible_(eligible), keep_(keep), threads_(threads) {
  int64_t in_share = kShare, largest = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    bytes_ += inputs[i].numel * width_;
    for (int64_t begin = 0; begin < inputs[i].numel; begin += kTile) {
      int64_t n = std::min(kTile, inputs[i].numel - begin);
      if (in_share >= kShare) {
        shares_.push_back(static_cast<int32_t>(tiles_.size()));
        in_share = 0;
      }
      in_share += n;
      largest = std::max(largest, n);
      tiles_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(n), begin, 0, 0, 0});
    }
  }
  shares_.push_back(static_cast<int32_t>(tiles_.size()));
  workers_ = threads_for(bytes_, threads);
  // At four bytes each, 1.6% of the input.
  capacity_ = eligible / (width_ == 4 ? 64 : 128) + (16 << 10);
  const size_t own = whole_lines((largest + kScanSlack) * sizeof(uint32_t));
  char* block = scratch(workers_ * (sizeof(Slot) + own) + capacity_ * sizeof(uint32_t) + 64);
  block += -reinterpret_cast<uintptr_t>(block) & 63;
  slots_ = reinterpret_cast<Slot*>(block);
  block += workers_ * sizeof(Slot);
  for (int i = 0; i < workers_; ++i, block += own)
    new (slots_ + i) Slot{{}, {}, {}, {}, reinterpret_cast<uint32_t*>(block)};
  candidates_ = reinterpret_cast<uint32_t*>(block);
}

uint32_t Selection::run() {
  if (bytes_ <= kSmall * width_)
    return bisect();
  Bracket bracket;
  bool count_ties = guess(bracket);
  Tally tally = pass(bracket, count_ties);
  int64_t want = keep_ - tally.kept;
  if (0 < want && want <= tally.candidates)
    return resolve(bracket, want);
  if (-tally.above_top < want && want <= 0)
    return settle(bracket.top + 1, want + tally.above_top);
  want -= tally.candidates;
  if (0 < want && want <= tally.at_below)
    return settle(bracket.below, want);
  return radix();
}

// For what fits L1: as many counts as the key has bits, or, where no one asks for the threshold, as
// many as it takes to part those that are kept from the others: 17 of 31 among 1,000 normal values.
uint32_t Selection::bisect() {
  uint32_t least = 0, most = width_ == 4 ? INT32_MAX : INT16_MAX;
  int64_t above = 0; // how many lie above `most`
  while (least < most) {
    const uint32_t middle = least + (most - least) / 2;
    int64_t count = 0;
    for (const Tile& tile : tiles_)
      count += count_above(values(tile), dtype_, within(tile), tile.n, middle);
    if (count == keep_ && writes())
      return settle(middle, 0);
    if (count < keep_) {
      most = middle;
      above = count;
    } else {
      least = middle + 1;
    }
  }
  return settle(most, keep_ - above);
}

void Selection::set_shift(Bracket& bracket) const {
  int bits = bracket.top > bracket.below
                 ? bit_width(static_cast<uint32_t>(bracket.top) - (bracket.below + 1))
                 : 0;
  bracket.shift = std::max(0, bits - kOffsetBits);
  bracket.bins_shift = std::max(0, bits - bracket.shift - kDigit);
}

// The one read: bitmap, counts and candidates of every tile, the candidates counted in the slots'
// bins by their leading bits.
Tally Selection::pass(const Bracket& bracket, bool count_ties) {
  ++reads_;
  clear_bins();
  for (int i = 0; i < workers_; ++i)
    slots_[i].tally = {};
  std::atomic<int64_t> collected{0};
  const Scan form = scan_for(dtype_, count_ties);
  for_tiles(workers_, [&](Tile& tile, int index) {
    Slot& slot = slots_[index];
    Tally tally = scan(form, tile, bracket, slot);
    slot.tally += tally;
    tile.candidates = static_cast<int32_t>(tally.candidates);
    tile.first = collected.fetch_add(tally.candidates, std::memory_order_relaxed);
    const uint32_t* found = slot.candidates;
    for (int64_t k = 0; k < tally.candidates; ++k)
      ++slot.bins[found[k] >> (kTileBits + bracket.bins_shift)];
    if (tile.first + tally.candidates <= capacity_)
      std::copy_n(found, tally.candidates, candidates_ + tile.first);
  });
  collected_ = collected.load();
  add_bins();
  for (int i = 1; i < workers_; ++i)
    slots_[0].tally += slots_[i].tally;
  return slots_[0].tally;
}

// The want-th largest of the candidates, and the mask with it. Digits of 11 bits: the first was
// counted on the way; the others, at most two, are counted over the candidates that share it,
// until those left are few enough to be sorted.
uint32_t Selection::resolve(const Bracket& bracket, int64_t want) {
  const uint32_t* bins = slots_[0].bins;
  const uint32_t origin = bracket.below + 1;
  int64_t bin = descend(bins, kBins, want);
  int span = bracket.shift + bracket.bins_shift;
  uint32_t first = origin + (static_cast<uint32_t>(bin) << span);
  if (collected_ > capacity_)
    return span == 0 ? settle(first, want) : radix();
  while (span > 0 && (bins[bin] > kSortable || !writes())) {
    const uint32_t last = first + ((1u << span) - 1);
    const uint32_t low = (first - origin) >> bracket.shift, high = (last - origin) >> bracket.shift;
    span = std::max(0, span - kDigit);
    clear_bins();
    for_tiles(threads_for(collected_ * 4, threads_), [&](const Tile& tile, int slot) {
      const uint32_t* found = candidates_ + tile.first;
      for (int32_t k = 0; k < tile.candidates; ++k) {
        if ((found[k] >> kTileBits) - low > high - low)
          continue;
        const uint32_t key = key_of(bracket, tile, found[k]);
        if (key - first <= last - first)
          ++slots_[slot].bins[(key - first) >> span];
      }
    });
    add_bins();
    bin = descend(bins, kBins, want);
    first += static_cast<uint32_t>(bin) << span;
  }
  return writes() ? mark(bracket, first, first + ((1u << span) - 1), want, bins[bin]) : first;
}

// Adds the candidates above `last` to the mask, and the `want` largest of the `count` in
// [first, last]. Returns the least key kept.
uint32_t Selection::mark(const Bracket& bracket, uint32_t first, uint32_t last, int64_t want,
                         int64_t count) {
  const uint32_t origin = bracket.below + 1;
  const uint32_t low = (first - origin) >> bracket.shift, high = (last - origin) >> bracket.shift;
  const bool sorts = count <= kSortable; // else they are all equal, and the first are taken
  std::vector<Undecided> undecided(sorts ? count : 0);
  std::atomic<int64_t> filled{0};
  const int workers = threads_for(collected_ * 4, threads_);
  if (!sorts)
    share_ties(bracket, first, want, workers);
  for_tiles(workers, [&](Tile& tile, int) {
    const uint32_t* found = candidates_ + tile.first;
    uint32_t* bits = words(tile);
    // Added up at the end of each block that has candidates: adding one by one to the block's count
    // in memory makes every candidate wait for the one before.
    int32_t marked[kTile / kBlock], added = 0, ties = sorts ? 0 : tile.ties;
    std::fill_n(marked, kTile / kBlock, 0);
    for (int32_t k = 0; k < tile.candidates; ++k) {
      const uint32_t position = found[k] & kPositionMask, own = found[k] >> kTileBits;
      uint32_t kept = own > high;
      if (own - low <= high - low) {
        const uint32_t key = key_of(bracket, tile, found[k]);
        const bool tied = key - first <= last - first;
        if (tied && sorts)
          undecided[filled.fetch_add(1, std::memory_order_relaxed)] = {
              key, position, static_cast<int32_t>(&tile - tiles_.data())};
        const bool taken = tied & (ties > 0);
        ties -= taken;
        kept = (key > last) | taken;
      }
      bits[position / 32] |= kept << (position & 31);
      marked[position / kBlock] = added += kept;
    }
    for (int64_t b = 0, before = 0; b < mask_blocks(tile.n); ++b) {
      const int64_t after = std::max<int64_t>(marked[b], before);
      counts(tile)[b] += after - before;
      before = after;
    }
  });
  if (!sorts)
    return finish(first);
  std::sort(undecided.begin(), undecided.end());
  for (int64_t k = 0; k < want; ++k) {
    const Tile& tile = tiles_[undecided[k].tile];
    words(tile)[undecided[k].position / 32] |= 1u << (undecided[k].position & 31);
    ++counts(tile)[undecided[k].position / kBlock];
  }
  return finish(undecided[want - 1].key);
}

// Sets how many of its candidates equal to `key` each tile keeps: the first `want` of all of them.
void Selection::share_ties(const Bracket& bracket, uint32_t key, int64_t want, int workers) {
  const uint32_t own = (key - (bracket.below + 1)) >> bracket.shift;
  for_tiles(workers, [&](Tile& tile, int) {
    const uint32_t* found = candidates_ + tile.first;
    tile.ties = 0;
    for (int32_t k = 0; k < tile.candidates; ++k)
      tile.ties += found[k] >> kTileBits == own && key_of(bracket, tile, found[k]) == key;
  });
  for (Tile& tile : tiles_) {
    tile.ties = static_cast<int32_t>(std::min<int64_t>(tile.ties, want));
    want -= tile.ties;
  }
}

// Turns the counts per block into ranks.
uint32_t Selection::finish(uint32_t threshold) {
  for (const SelectInput& input : inputs_)
    sum_ranks(input.rank, mask_blocks(input.numel));
  return threshold;
}

uint32_t select(const std::vector<SelectInput>& inputs, int dtype, int64_t eligible, int64_t keep,
                int threads) {
  Selection selection(inputs, dtype, eligible, keep, threads);
  const uint32_t threshold = selection.run();
  last_reads = selection.reads();
  return threshold;
}

int select_reads() {
  return last_reads;
}

} // namespace fedmap
