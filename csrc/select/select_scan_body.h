// The scan of the vector levels: select_scan.cpp includes this once in each one's target
// region, after its `Keys`, since a template outside of the region would be compiled for no level.
//
// `within` is tested before the values are read, so that its empty words cost no memory.
template <class T, bool kTies, bool kAhead>
Tally scan_as(const void* bytes, const uint32_t* within, int64_t n, const Bracket& bracket,
              uint32_t* words, int64_t* counts, uint32_t* candidates) {
  const T* values = static_cast<const T*>(bytes);
  const Keys<T> keys(bracket);
  [[maybe_unused]] const int64_t ahead = read_ahead();
  const int64_t whole = n / 64 * 64;
  Tally tally;
  uint32_t* out = candidates;
  for (int64_t i = 0; i < n; i += kBlock) {
    uint16_t places[kBlock + 32]; // of the block's candidates
    uint16_t* next = places;
    int64_t kept_in_block = 0;
    for (int64_t j = i, end = std::min(whole, i + kBlock); j < end; j += 64) {
      const uint64_t eligible = within ? load_64(within + j / 32) : ~uint64_t{0};
      if (!eligible) {
        store_64(words + j / 32, 0);
        continue;
      }
      if constexpr (kAhead)
        fetch_lines(reinterpret_cast<const char*>(values + j) + ahead, 64 * sizeof(T));
      const uint64_t kept = keys.template take<kTies>(values + j, eligible, j - i, tally, next);
      store_64(words + j / 32, kept);
      kept_in_block += __builtin_popcountll(kept);
    }
    out = collect(values, i, places, next - places, bracket, out);
    counts[i / kBlock] = kept_in_block;
    tally.kept += kept_in_block;
  }
  tally.candidates = out - candidates;
  if (whole < n)
    tally += scalar::scan_from<T, kTies>(whole, values, within, n, bracket, words, counts, out);
  return Tally(tally); // a copy: the caller's would be kept in memory, as the words may alias it
}

template <class T, bool kTies>
Tally scan(const void* bytes, const uint32_t* within, int64_t n, const Bracket& bracket,
           uint32_t* words, int64_t* counts, uint32_t* candidates) {
  const auto form = read_ahead() ? &scan_as<T, kTies, true> : &scan_as<T, kTies, false>;
  return form(bytes, within, n, bracket, words, counts, candidates);
}

template <class T>
int64_t count_above(const void* bytes, const uint32_t* within, int64_t n, uint32_t limit) {
  const T* values = static_cast<const T*>(bytes);
  const int64_t whole = n / 64 * 64;
  int64_t count = 0;
  for (int64_t j = 0; j < whole; j += 64)
    count += __builtin_popcountll(Keys<T>::above(values + j, static_cast<int32_t>(limit)) &
                                  (within ? load_64(within + j / 32) : ~uint64_t{0}));
  return count + scalar::count_above_from(whole, values, within, n, limit);
}
