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

// How many bytes ahead of its writes a kernel that writes whole lines asks for each, to write it
// through the cache; 0: large results go past the cache instead (core/streaming.h).
//
// On the Xeons of family 6, model 85 (Skylake to Cooper Lake) 4 KiB: two threads of a Cascade Lake
// write 105 MB past the cache or plainly in 8.0 ms, with the lines asked for in 5.2, 1 to 16 KiB
// ahead alike, and copy 52 MB in 4.8 instead of 5.4. Other processors have not been tried.
extern std::atomic<int64_t> write_ahead_bytes; // by model, when the library is loaded
inline int64_t write_ahead() {
  return write_ahead_bytes.load(std::memory_order_relaxed);
}
inline void set_write_ahead(int64_t bytes) {
  write_ahead_bytes.store(bytes, std::memory_order_relaxed);
}

// Asks for the line `ahead` bytes after `at`, into L2, unless that is 0.
inline void ask(const void* at, int64_t ahead) {
  if (ahead)
    __builtin_prefetch(static_cast<const char*>(at) + ahead, 0, 2);
}

// Asks for `bytes` from `at` on, into L2: more lines can be under way there than into L1.
inline void fetch_lines(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(at) + i, 0, 2);
}

} // namespace fedmap
