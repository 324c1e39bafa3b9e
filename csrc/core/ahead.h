// Fetching memory ahead of the reads, where a processor does not do enough of it by itself.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/cpu.h"

namespace fedmap {

// How many bytes ahead of its reads a kernel that computes while it streams asks for each line;
// 0: it leaves that to the hardware.
//
// On Intel 8 KiB. A Xeon (family 6, model 207) adds memory time and compute time up: a pass over
// 26 M float32 that took 7.6 ms takes 5.2 with each line asked into L2. 4 to 16 KiB ahead are
// equal, every second line gains little, past L2 (NTA) takes twice as long. Zen 4 does better
// alone: there it made a step 25% slower.
extern std::atomic<int64_t> read_ahead_bytes; // by vendor, when the library is loaded
inline int64_t read_ahead() {
  return read_ahead_bytes.load(std::memory_order_relaxed);
}
inline void set_read_ahead(int64_t bytes) {
  read_ahead_bytes.store(bytes, std::memory_order_relaxed);
}

// Asks for `bytes` from `at` on, into L2: more lines can be under way there than into L1.
inline void fetch_lines(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(at) + i, 0, 2);
}

} // namespace fedmap
