// The bracket of a selection, from a stratified sample.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "select/selection.h"

namespace fedmap {

// Neighbours are sampled together: it is the cache lines that cost, 13 ns each on Zen 4. Where they
// resemble each other the sample is worth less, the bracket misses more often, and no more.
constexpr int64_t kTogether = 4;

// Sets the bracket; true if many of the values equal its ends.
bool Selection::guess(Bracket& bracket) {
  bracket = {-1, width_ == 4 ? INT32_MAX : INT16_MAX, 0, 0};
  set_shift(bracket);
  if (eligible_ <= kSmall)
    return false;
  double share = static_cast<double>(keep_) / eligible_;
  const double spread = std::sqrt(share * (1 - share));
  // The bracket spans 3.5 standard deviations to each side: a miss, one in 2000, costs two reads.
  // Of all values 7 spread / sqrt(size) are candidates then. A sampled key costs 2.5 times what a
  // candidate does, which gives the best size; the other keeps the candidates within their room,
  // 3.5 standard deviations of their own number included.
  const double best = std::pow(1.4 * spread * eligible_, 2.0 / 3);
  const double crowd = eligible_ / static_cast<double>(capacity_);
  const double excess = 3.5 / (7 * spread * std::sqrt(crowd) + 0.1);
  const double roomy = std::pow(7 * spread * crowd * (1 + excess), 2);
  const int64_t most = std::min<int64_t>({256 << 10, eligible_ / 16, capacity_});
  int64_t size =
      std::min(most, std::max<int64_t>(2048, static_cast<int64_t>(std::max(best, roomy))));
  const int64_t stride = (eligible_ + size - 1) / size;
  size = eligible_ / (kTogether * stride) * kTogether;
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
  uint32_t* end = keys;
  for (int64_t j = 0; j < size; ++j) { // without a branch: a tenth of them stay, at random
    const uint32_t key = keys[j];
    *end = key;
    end += key >> shift <= upper_bin && key >> shift >= lower_bin;
  }
  auto largest = [&](int64_t place) {
    std::nth_element(keys, keys + place, end, std::greater<uint32_t>());
    return keys[place];
  };
  bool ties = false;
  auto tied = [&](uint32_t key) { return std::count(keys, end, key) > kTogether; };
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

// kTogether of each kTogether * stride eligible keys, at a place that varies; counts them in the
// first slot's bins. In strata, it follows drifts along the array, such as those of sorted input.
void Selection::sample(int64_t stride, int64_t size) {
  const size_t tiles = tiles_.size();
  std::vector<int64_t> starts(tiles + 1);
  const bool counts = std::any_of(inputs_.begin(), inputs_.end(),
                                  [](const SelectInput& input) { return input.within; });
  for_tiles(counts ? threads_for(bytes_ / 32, threads_) : 1, [&](const Tile& tile, int) {
    const uint32_t* words = within(tile);
    starts[&tile - tiles_.data() + 1] = words ? count_bits(words, mask_words(tile.n)) : tile.n;
  });
  for (size_t t = 0; t < tiles; ++t)
    starts[t + 1] += starts[t];

  auto place = [stride](int64_t j) {
    const uint64_t stratum = static_cast<uint64_t>(j / kTogether);
    uint64_t hash = (stratum + 1) * 0x9E3779B97F4A7C15u;
    hash = (hash ^ hash >> 32) * 0xD6E8FEB86659FD93u >> 32;
    const uint64_t width = kTogether * stride;
    const uint64_t start = stratum * width + (hash * (width - kTogether + 1) >> 32);
    return static_cast<int64_t>(start) + j % kTogether;
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
    const int64_t start = starts[shares_[share]];
    int64_t j = start / (kTogether * stride) * kTogether;
    while (j < size && place(j) < start)
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

} // namespace fedmap
