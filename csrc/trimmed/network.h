// Batcher's odd-even merge sort (1968): which rows to compare, in which order.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace fedmap {

struct Step {
  int32_t low, high; // rows; the lesser value goes to `low`, the greater to `high`
};

// Calls f for each step that sorts `count` rows of which runs of `sorted`, a power of two, are in
// order already.
template <class F>
constexpr void each_step(int count, int sorted, F&& f) {
  for (int64_t p = sorted; p < count; p *= 2)
    for (int64_t k = p; k >= 1; k /= 2)
      for (int64_t j = k % p; j + k < count; j += 2 * k)
        for (int64_t i = j; i < std::min(j + k, count - k); ++i)
          if (i / (2 * p) == (i + k) / (2 * p))
            f(Step{static_cast<int32_t>(i), static_cast<int32_t>(i + k)});
}

constexpr int steps_of(int count) {
  int steps = 0;
  each_step(count, 1, [&](Step) { ++steps; });
  return steps;
}

template <int kCount>
constexpr auto sorting_steps() {
  std::array<Step, steps_of(kCount)> steps{};
  int at = 0;
  each_step(kCount, 1, [&](Step step) { steps[at++] = step; });
  return steps;
}

// What sorts kCount rows, for code that is compiled for that number.
template <int kCount>
constexpr auto kSortingSteps = sorting_steps<kCount>();

// The steps that merge runs of `sorted` rows, without those that no rank from `first` to before
// `stop` depends on.
inline std::vector<Step> merging_steps(int count, int sorted, int first, int stop) {
  std::vector<Step> steps;
  each_step(count, sorted, [&](Step step) { steps.push_back(step); });
  std::vector<char> wanted(count, 0);
  std::fill(wanted.begin() + first, wanted.begin() + stop, 1);
  auto kept = steps.end();
  for (auto step = steps.end(); step != steps.begin();) {
    --step;
    if (wanted[step->low] || wanted[step->high]) {
      wanted[step->low] = wanted[step->high] = 1;
      *--kept = *step;
    }
  }
  steps.erase(steps.begin(), kept);
  return steps;
}

} // namespace fedmap
