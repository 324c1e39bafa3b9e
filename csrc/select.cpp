// Exact selection of the largest magnitudes.
//
// A stratified sample brackets the wanted rank; one read of the values writes the bitmap of what
// lies above the bracket and collects what lies within it; those candidates are resolved by radix,
// their ties by index. Where the bracket missed, or holds too many for the buffer, histograms of
// the keys take two more reads and a last one writes the mask: four in the worst case.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "select_scan.h"

namespace fedmap {
namespace {

constexpr int kDigit = 11; // bits resolved at once: 8 KiB of counters stay in L1
constexpr int kBins = 1 << kDigit;
constexpr int kOffsetBits = 32 - kTileBits;
// Smaller shares of a read are slower: each start costs the prefetchers their streams.
constexpr int64_t kShare = 8 * kTile;
constexpr uint32_t kPositionMask = kTile - 1;
constexpr int64_t kSmall = 4096; // below this a sample is not worth its cost
constexpr int64_t kSortable = 1024;

struct Tile {
  int32_t input, n;
  int64_t begin; // its first element in the input
  int64_t first; // its first candidate
  int32_t candidates;
  int32_t ties; // of its candidates, those equal to the threshold
};

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

// What one thread works with.
struct Slot {
  alignas(64) uint32_t bins[kBins];
  uint32_t words[kTile / 32];
  int64_t counts[kTile / kBlock];
  Tally tally;
  uint32_t* candidates;
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

// The bin that holds the want-th of the counted, from the highest bin down; `want` becomes its rank
// within that bin.
template <class Count>
int64_t descend(const Count* bins, int64_t size, int64_t& want) {
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

template <class F>
void Selection::for_tiles(int workers, F&& f) {
  parallel_for(shares(), std::min(workers, workers_), [&](int64_t share, int slot) {
    for (int32_t t = shares_[share]; t < shares_[share + 1]; ++t)
      f(tiles_[t], slot);
  });
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

// For what fits L1: as many counts as the key has bits.
uint32_t Selection::bisect() {
  uint32_t least = 0, most = width_ == 4 ? INT32_MAX : INT16_MAX;
  int64_t above = 0; // how many lie above `most`
  while (least < most) {
    const uint32_t middle = least + (most - least) / 2;
    int64_t count = 0;
    for (const Tile& tile : tiles_)
      count += count_above(values(tile), dtype_, within(tile), tile.n, middle);
    if (count < keep_) {
      most = middle;
      above = count;
    } else {
      least = middle + 1;
    }
  }
  return settle(most, keep_ - above);
}

// Sets the bracket; true if many of the values equal its ends.
bool Selection::guess(Bracket& bracket) {
  bracket = {-1, width_ == 4 ? INT32_MAX : INT16_MAX, 0, 0};
  set_shift(bracket);
  if (eligible_ <= kSmall)
    return false;
  double share = static_cast<double>(keep_) / eligible_;
  const double spread = std::sqrt(share * (1 - share));
  // The bracket spans 3.5 standard deviations to each side: a miss, one in 2000, costs two reads.
  // Of all values 7 spread / sqrt(size) are candidates then. A sampled key costs about twice a
  // candidate, which gives the best size; the other keeps candidates within 3/4 of their room.
  const double best = std::pow(2 * spread * eligible_, 2.0 / 3);
  const double roomy = std::pow(7 * spread * eligible_ / (0.75 * capacity_), 2);
  const int64_t most = std::min<int64_t>({128 << 10, eligible_ / 16, capacity_});
  int64_t size =
      std::min(most, std::max<int64_t>(2048, static_cast<int64_t>(std::max(best, roomy))));
  const int64_t stride = (eligible_ + size - 1) / size;
  size = eligible_ / stride;
  sample(stride, size);

  double rank = share * size, margin = 3.5 * std::sqrt(rank * (1 - share)) + 2;
  int64_t upper = static_cast<int64_t>(std::floor(rank - margin));
  int64_t lower = static_cast<int64_t>(std::ceil(rank + margin));
  int shift = (width_ == 4 ? 31 : 15) - kDigit;
  int64_t upper_in_bin = std::max<int64_t>(upper, 0) + 1;
  int64_t lower_in_bin = std::min(lower, size - 1) + 1;
  const int64_t to_lower = lower_in_bin - upper_in_bin;
  int64_t upper_bin = descend(slots_[0].bins, kBins, upper_in_bin);
  int64_t lower_bin = descend(slots_[0].bins, kBins, lower_in_bin);
  uint32_t* keys = candidates_;
  uint32_t* end = std::remove_if(keys, keys + size, [=](uint32_t key) {
    return key >> shift > upper_bin || key >> shift < lower_bin;
  });
  auto largest = [&](int64_t place) {
    std::nth_element(keys, keys + place, end, std::greater<uint32_t>());
    return keys[place];
  };
  bool ties = false;
  auto tied = [&](uint32_t key) { return std::count(keys, end, key) > 2; };
  if (upper >= 0) {
    uint32_t key = largest(upper_in_bin - 1);
    bracket.top = static_cast<int32_t>(key) - 1;
    ties |= tied(key);
  }
  if (lower < size) {
    uint32_t key = largest(upper_in_bin - 1 + to_lower);
    bracket.below = std::min(static_cast<int32_t>(key), bracket.top);
    ties |= tied(key);
  }
  set_shift(bracket);
  return ties;
}

// One key of each `stride` eligible elements, at a place that varies; counts them in the first
// slot's bins. In strata, it follows drifts along the array, such as those of sorted input.
void Selection::sample(int64_t stride, int64_t size) {
  const size_t tiles = tiles_.size();
  std::vector<int64_t> starts(tiles + 1);
  for_tiles(threads_for(bytes_ / 32, threads_), [&](const Tile& tile, int) {
    const uint32_t* words = within(tile);
    starts[&tile - tiles_.data() + 1] = words ? count_bits(words, mask_words(tile.n)) : tile.n;
  });
  for (size_t t = 0; t < tiles; ++t)
    starts[t + 1] += starts[t];

  auto place = [stride](int64_t j) {
    uint64_t hash = static_cast<uint64_t>(j + 1) * 0x9E3779B97F4A7C15u;
    hash = (hash ^ hash >> 32) * 0xD6E8FEB86659FD93u >> 32;
    return j * stride + static_cast<int64_t>(hash * stride >> 32);
  };
  uint32_t* keys = candidates_;
  clear_bins();
  const int shift = (width_ == 4 ? 31 : 15) - kDigit;
  const int workers = std::min(workers_, threads_for(size * 64, threads_));
  parallel_for(shares(), workers, [&](int64_t share, int slot) {
    constexpr int kBatch = 256; // half of the lines that L1 holds
    const void* batch[kBatch];
    int64_t places[kBatch];
    int n = 0;
    int64_t j = starts[shares_[share]] / stride;
    if (j < size && place(j) < starts[shares_[share]])
      ++j;
    auto flush = [&] {
      for (int k = 0; k < n; ++k) {
        const uint32_t key = magnitude_key(batch[k], width_, 0);
        keys[j - n + k] = key;
        ++slots_[slot].bins[key >> shift];
      }
      n = 0;
    };
    for (int32_t t = shares_[share]; t < shares_[share + 1]; ++t) {
      const Tile& tile = tiles_[t];
      for (bool more = true; more;) {
        const int begun = n;
        for (; j < size && n < kBatch && place(j) < starts[t + 1]; ++j)
          places[n++] = place(j) - starts[t];
        if (within(tile))
          locate(within(tile), mask_words(tile.n), places + begun, n - begun, places + begun);
        for (int k = begun; k < n; ++k) {
          batch[k] = static_cast<const char*>(values(tile)) + places[k] * width_;
          __builtin_prefetch(batch[k]);
        }
        more = n == kBatch;
        if (more)
          flush();
      }
    }
    flush();
  });
  add_bins();
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
        const uint32_t key = magnitude_key(values(tile), width_, found[k] & kPositionMask);
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
  const bool sorts = count <= kSortable; // else they are all equal, and only counted
  std::vector<Undecided> undecided(sorts ? count : 0);
  std::atomic<int64_t> filled{0};
  for_tiles(threads_for(collected_ * 4, threads_), [&](Tile& tile, int) {
    const uint32_t* found = candidates_ + tile.first;
    uint32_t* bits = words(tile);
    // Added up at the end of each block that has candidates: adding one by one to the block's count
    // in memory makes every candidate wait for the one before.
    int32_t marked[kTile / kBlock], added = 0;
    std::fill_n(marked, kTile / kBlock, 0);
    tile.ties = 0;
    for (int32_t k = 0; k < tile.candidates; ++k) {
      const uint32_t position = found[k] & kPositionMask, own = found[k] >> kTileBits;
      uint32_t above = own > high;
      if (own - low <= high - low) {
        const uint32_t key = magnitude_key(values(tile), width_, position);
        above = key > last;
        if (key - first <= last - first) {
          if (sorts)
            undecided[filled.fetch_add(1, std::memory_order_relaxed)] = {
                key, position, static_cast<int32_t>(&tile - tiles_.data())};
          else
            ++tile.ties;
        }
      }
      bits[position / 32] |= above << (position & 31);
      marked[position / kBlock] = added += above;
    }
    for (int64_t b = 0, before = 0; b < mask_blocks(tile.n); ++b) {
      const int64_t after = std::max<int64_t>(marked[b], before);
      counts(tile)[b] += after - before;
      before = after;
    }
  });
  auto keep = [&](const Tile& tile, uint32_t position) {
    words(tile)[position / 32] |= 1u << (position & 31);
    ++counts(tile)[position / kBlock];
  };
  if (sorts) {
    std::sort(undecided.begin(), undecided.end());
    for (int64_t k = 0; k < want; ++k)
      keep(tiles_[undecided[k].tile], undecided[k].position);
    return finish(undecided[want - 1].key);
  }
  for (size_t t = 0; want > 0; ++t) {
    const Tile& tile = tiles_[t];
    const uint32_t* found = candidates_ + tile.first;
    for (int32_t k = 0, left = tile.ties; left > 0 && want > 0; ++k) {
      const uint32_t position = found[k] & kPositionMask;
      if (magnitude_key(values(tile), width_, position) != first)
        continue;
      keep(tile, position);
      --left, --want;
    }
  }
  return finish(first);
}

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

// Turns the counts per block into ranks.
uint32_t Selection::finish(uint32_t threshold) {
  for (const SelectInput& input : inputs_) {
    const int64_t blocks = mask_blocks(input.numel);
    int64_t before = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t count = input.rank[b];
      input.rank[b] = before;
      before += count;
    }
    input.rank[blocks] = before;
  }
  return threshold;
}

thread_local int last_reads = 0;

} // namespace

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
