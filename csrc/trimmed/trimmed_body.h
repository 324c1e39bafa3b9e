// The body of every level: trimmed.cpp includes it in each one's target region, after its `Ranked`
// and what loads, compares and averages them.
//
// `Ranked` are the values of kLanes elements of one row as integers in the order of the values.

template <int kCount, size_t... kRow, size_t... kStep>
[[gnu::always_inline]] inline void sort_rows(const float* const* rows, int64_t i, Ranked* room,
                                             std::index_sequence<kRow...>,
                                             std::index_sequence<kStep...>) {
  Ranked at[kCount] = {ranked(rows[kRow] + i)...};
  constexpr auto& steps = kSortingSteps<kCount>;
  (exchange(at[steps[kStep].low], at[steps[kStep].high]), ...);
  ((room[kRow * kAcross] = at[kRow]), ...);
}

// kCount rows in order, from the least value up, in registers as far as there are any.
template <int kCount>
void sort_run(const float* const* rows, int64_t i, Ranked* room) {
  sort_rows<kCount>(rows, i, room, std::make_index_sequence<kCount>(),
                    std::make_index_sequence<steps_of(kCount)>());
}

using SortRun = void (*)(const float* const* rows, int64_t i, Ranked* room);

template <size_t... kLess>
SortRun sort_run_of(int count, std::index_sequence<kLess...>) {
  static constexpr SortRun runs[] = {&sort_run<kLess + 1>...};
  return runs[count - 1];
}

static int64_t trimmed(const Middle& middle, int64_t begin, int64_t end, float* out,
                       void* scratch) {
  constexpr int64_t kAtOnce = kAcross * kLanes;
  Ranked* const room = static_cast<Ranked*>(scratch);
  const int count = middle.count, rest = count % kSortRun;
  const auto sizes = std::make_index_sequence<kSortRun>();
  const SortRun sort = sort_run_of(kSortRun, sizes), sort_rest = sort_run_of(rest + !rest, sizes);
  int64_t i = begin, bad = 0;
  for (; i + kAtOnce <= end; i += kAtOnce) {
    for (int k = 0; k < kAcross; ++k) {
      const int64_t at = i + k * kLanes;
      int row = 0;
      for (; row + kSortRun <= count; row += kSortRun)
        sort(middle.rows + row, at, room + row * kAcross + k);
      if (rest)
        sort_rest(middle.rows + row, at, room + row * kAcross + k);
    }
    for (const Step step : middle.merges)
      for (int k = 0; k < kAcross; ++k)
        exchange(room[step.low * kAcross + k], room[step.high * kAcross + k]);
    for (int k = 0; k < kAcross; ++k)
      bad +=
          mean(room + middle.first * kAcross + k, middle.stop - middle.first, out + i + k * kLanes);
  }
  return i < end ? bad + scalar::trimmed(middle, i, end, out, scratch) : bad;
}
