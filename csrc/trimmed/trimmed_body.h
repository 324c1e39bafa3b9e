// The body of every level: trimmed.cpp includes it in each one's target region, after its `Ranked`
// and what loads, compares and averages them.
//
// `Ranked` are the values of kLanes elements of one row as integers in the order of the values.
// Row r of `room` has kAcross of them, from r * kAcross on.

template <class Network, int kCount, size_t... kStep>
[[gnu::always_inline]] inline void exchange_all(Ranked (&at)[kCount],
                                                std::index_sequence<kStep...>) {
  [[maybe_unused]] constexpr auto& steps = kSteps<Network, kCount>;
  (exchange(at[steps[kStep].low], at[steps[kStep].high]), ...);
}

template <int kCount, size_t... kRow>
[[gnu::always_inline]] inline void sort_rows(const float* const* rows, int64_t i, Ranked* room,
                                             std::index_sequence<kRow...>) {
  Ranked at[kCount] = {ranked(rows[kRow] + i)...};
  exchange_all<Sorting>(at, std::make_index_sequence<steps_of<Sorting>(kCount)>());
  ((room[kRow * kAcross] = at[kRow]), ...);
}

template <int kCount, size_t... kRow>
[[gnu::always_inline]] inline void clean_rows(Ranked* room, std::index_sequence<kRow...>) {
  Ranked at[kCount] = {room[kRow * kAcross]...};
  exchange_all<Cleaning>(at, std::make_index_sequence<steps_of<Cleaning>(kCount)>());
  ((room[kRow * kAcross] = at[kRow]), ...);
}

// kCount rows in order, from the least value up, in registers as far as there are any.
template <int kCount>
void sort_held(const float* const* rows, int64_t i, Ranked* room) {
  sort_rows<kCount>(rows, i, room, std::make_index_sequence<kCount>());
}

template <int kCount>
void clean_held(Ranked* room) {
  clean_rows<kCount>(room, std::make_index_sequence<kCount>());
}

using SortHeld = void (*)(const float* const* rows, int64_t i, Ranked* room);
using CleanHeld = void (*)(Ranked* room);

// By how many rows, less one.
template <size_t... kLess>
const SortHeld* sorts_held(std::index_sequence<kLess...>) {
  static constexpr SortHeld sorts[] = {&sort_held<kLess + 1>...};
  return sorts;
}

template <size_t... kLess>
const CleanHeld* cleans_held(std::index_sequence<kLess...>) {
  static constexpr CleanHeld cleans[] = {&clean_held<kLess + 1>...};
  return cleans;
}

static void merge_rows(const Merge& merge, const CleanHeld* cleans, Ranked* room) {
  Ranked *const a = room + merge.a * kAcross, *const b = room + merge.b * kAcross;
  if (merge.kind == Merge::kPair) {
    for (int k = 0; k < kAcross; ++k)
      exchange(a[k], b[k]);
  } else if (merge.kind == Merge::kFour) {
    Ranked *const c = room + merge.c * kAcross, *const d = room + merge.d * kAcross;
    for (int k = 0; k < kAcross; ++k) {
      Ranked at[] = {a[k], b[k], c[k], d[k]};
      exchange(at[0], at[3]);
      exchange(at[1], at[2]);
      exchange(at[0], at[1]);
      exchange(at[2], at[3]);
      a[k] = at[0], b[k] = at[1], c[k] = at[2], d[k] = at[3];
    }
  } else {
    for (int k = 0; k < kAcross; ++k)
      cleans[merge.block - 1](a + k);
  }
}

static int64_t trimmed(const Middle& middle, int64_t begin, int64_t end, float* out,
                       void* scratch) {
  constexpr int64_t kAtOnce = kAcross * kLanes;
  Ranked* const room = static_cast<Ranked*>(scratch);
  const auto sizes = std::make_index_sequence<kHeldRows>();
  const SortHeld* const sorts = sorts_held(sizes);
  const CleanHeld* const cleans = cleans_held(sizes);
  int64_t i = begin, bad = 0;
  for (; i + kAtOnce <= end; i += kAtOnce) {
    for (int row = 0; row < middle.count; ++row)
      fetch_lines(middle.rows[row] + i + kFetchAhead, kAtOnce * int64_t(sizeof(float)));
    for (int row = 0; row < middle.count; row += kHeldRows) {
      const SortHeld sort = sorts[std::min(kHeldRows, middle.count - row) - 1];
      for (int k = 0; k < kAcross; ++k)
        sort(middle.rows + row, i + k * kLanes, room + row * kAcross + k);
    }
    for (const Merge& merge : middle.merges)
      merge_rows(merge, cleans, room);
    for (int k = 0; k < kAcross; ++k)
      bad +=
          mean(room + middle.first * kAcross + k, middle.stop - middle.first, out + i + k * kLanes);
  }
  return i < end ? bad + scalar::trimmed(middle, i, end, out, scratch) : bad;
}
