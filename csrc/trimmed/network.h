// Sorting networks over rows: which ones to compare, in which order.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace fedmap {

struct Step {
  int low, high; // rows; the lesser value goes to `low`, the greater to `high`
};

// Batcher's odd-even merge sort (1968).
struct Sorting {
  template <class F>
  static constexpr void each_step(int count, F&& f) {
    for (int p = 1; p < count; p *= 2)
      for (int k = p; k >= 1; k /= 2)
        for (int j = k % p; j + k < count; j += 2 * k)
          for (int i = j; i < std::min(j + k, count - k); ++i)
            if (i / (2 * p) == (i + k) / (2 * p))
              f(Step{i, i + k});
  }
};

// The end of Batcher's bitonic merge, by strides: of rows that are in order but for each other.
struct Cleaning {
  template <class F>
  static constexpr void each_step(int count, F&& f) {
    int stride = 1;
    while (2 * stride < count)
      stride *= 2;
    for (; stride >= 1; stride /= 2)
      for (int i = 0; i + stride < count; ++i)
        if (i / stride % 2 == 0)
          f(Step{i, i + stride});
  }
};

template <class Network>
constexpr int steps_of(int count) {
  int steps = 0;
  Network::each_step(count, [&](Step) { ++steps; });
  return steps;
}

template <class Network, int kCount>
constexpr auto steps_for() {
  std::array<Step, steps_of<Network>(kCount)> steps{};
  int at = 0;
  Network::each_step(kCount, [&](Step step) { steps[at++] = step; });
  return steps;
}

// For code that is compiled for that number of rows.
template <class Network, int kCount>
constexpr auto kSteps = steps_for<Network, kCount>();

// Rows that code compiled for their number holds in registers, at most.
constexpr int kHeldRows = 32;

// A part of a merge. Two rows: they are compared. Four, a to d: a and d, b and c, then a and b, c
// and d. A block: rows [a, a + block) are cleaned.
struct Merge {
  enum Kind { kPair, kFour, kBlock } kind;
  int a, b = 0, c = 0, d = 0, block = 0;

  template <class F>
  bool any_row(F&& f) const {
    if (kind == kPair)
      return f(a) | f(b);
    if (kind == kFour)
      return f(a) | f(b) | f(c) | f(d);
    bool found = false;
    for (int row = a; row < a + block; ++row)
      found |= f(row);
    return found;
  }
};

// What merges runs of kHeldRows rows that are in order, each twice as long as those before: the
// bitonic merge whose first step compares row i of a pair of runs with row i from its end. Rows
// past `count` would be greater than any other and stay where they are, so nothing is done there.
template <class F>
void each_merge(int count, F&& f) {
  const auto pair = [&](int low, int high) {
    if (high < count)
      f(Merge{Merge::kPair, low, high});
  };
  for (int run = kHeldRows; run < count; run *= 2)
    for (int first = 0; first + run < count; first += 2 * run) {
      const int last = first + 2 * run - 1, end = std::min(count, first + 2 * run);
      for (int i = 0; i < run / 2; ++i) {
        const int a = first + i, b = a + run / 2, d = last - i, c = d - run / 2;
        if (d < count) {
          f(Merge{Merge::kFour, a, b, c, d});
        } else {
          pair(b, c);
          pair(a, b);
        }
      }
      int stride = run / 4;
      for (; stride >= kHeldRows; stride /= 2)
        for (int i = first; i < end; ++i)
          if ((i - first) / stride % 2 == 0)
            pair(i, i + stride);
      for (int i = first; i < end; i += 2 * stride)
        f(Merge{Merge::kBlock, i, 0, 0, 0, std::min(2 * stride, end - i)});
    }
}

// Without those that no rank from `first` to before `stop` depends on.
inline std::vector<Merge> merges_for(int count, int first, int stop) {
  std::vector<Merge> merges;
  each_merge(count, [&](const Merge& merge) { merges.push_back(merge); });
  std::vector<char> wanted(static_cast<size_t>(count), 0);
  std::fill(wanted.begin() + first, wanted.begin() + stop, 1);
  auto kept = merges.end();
  for (auto merge = merges.end(); merge != merges.begin();) {
    --merge;
    if (merge->any_row([&](int row) { return wanted[static_cast<size_t>(row)]; })) {
      merge->any_row([&](int row) { return wanted[static_cast<size_t>(row)] = 1; });
      *--kept = *merge;
    }
  }
  merges.erase(merges.begin(), kept);
  return merges;
}

} // namespace fedmap
