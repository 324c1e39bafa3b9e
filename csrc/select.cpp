#include <algorithm>
#include <functional>

#include "kernels.h"
#include "pool.h"

namespace fedmap {
namespace {

template <class T>
uint32_t magnitude(const void* values, int64_t i) {
  T bits = static_cast<const T*>(values)[i];
  return bits & (static_cast<T>(~T{0}) >> 1);
}

uint32_t magnitude(const void* values, int dtype, int64_t i) {
  return dtype == kFloat32 ? magnitude<uint32_t>(values, i) : magnitude<uint16_t>(values, i);
}

bool bit(const uint32_t* words, int64_t i) { return words[i >> 5] >> (i & 31) & 1; }

} // namespace

uint32_t select(const std::vector<SelectInput>& inputs, int dtype, int64_t eligible, int64_t keep,
                int threads) {
  std::vector<uint32_t> keys;
  keys.reserve(eligible);
  for (const SelectInput& in : inputs)
    for (int64_t i = 0; i < in.numel; ++i)
      if (!in.within || bit(in.within, i))
        keys.push_back(magnitude(in.values, dtype, i));
  std::nth_element(keys.begin(), keys.begin() + (keep - 1), keys.end(), std::greater<uint32_t>());
  uint32_t threshold = keys[keep - 1];
  int64_t ties = keep - std::count_if(keys.begin(), keys.end(),
                                      [=](uint32_t key) { return key > threshold; });
  for (const SelectInput& in : inputs) {
    if (!in.words)
      continue;
    std::fill_n(in.words, mask_words(in.numel), 0u);
    for (int64_t i = 0; i < in.numel; ++i) {
      if (in.within && !bit(in.within, i))
        continue;
      uint32_t key = magnitude(in.values, dtype, i);
      if (key > threshold || (key == threshold && ties-- > 0))
        in.words[i >> 5] |= 1u << (i & 31);
    }
    rank_index(in.words, in.numel, in.rank, threads);
  }
  return threshold;
}

void zero_pruned(void* values, const uint32_t* before, const uint32_t* after, int64_t numel,
                 int dtype, int threads) {
  parallel_ranges(numel, 1 << 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if ((before && !bit(before, i)) || bit(after, i))
        continue;
      if (dtype == kFloat32)
        static_cast<uint32_t*>(values)[i] = 0;
      else
        static_cast<uint16_t*>(values)[i] = 0;
    }
  });
}

} // namespace fedmap
