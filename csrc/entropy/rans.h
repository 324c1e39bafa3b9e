// Interleaved rANS over an alphabet of 16 symbols: 32 lanes of 32-bit states in [2^15, 2^31),
// renormalised by 16-bit words, frequencies of 15 bits (J. Duda, arXiv 1311.2540; F. Giesen,
// arXiv 1402.3392, for interleaving and for division by reciprocals). docs/format.md, 5, defines
// the streams. With L = 2^16 the 32-bit reciprocal would not be exact.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/pool.h"

namespace fedmap {

constexpr int kLanes = 32;
constexpr int kSymbols = 16;
constexpr int kFrequencyBits = 15;
constexpr uint32_t kFrequencySum = 1u << kFrequencyBits;
constexpr uint32_t kStateLow = 1u << 15;
constexpr uint32_t kStateHigh = 1u << 31;

struct RansTable {
  uint32_t frequency[kSymbols], start[kSymbols];
  uint32_t reciprocal[kSymbols], shift[kSymbols], bias[kSymbols]; // to encode
};

// Completes a table from its frequencies, which sum to 2^15.
void finish_table(RansTable* table);

struct RansWriter {
  uint32_t x[kLanes];
  uint16_t* next; // words are written downwards from here
  explicit RansWriter(uint16_t* end) : next(end) {
    for (uint32_t& lane : x)
      lane = kStateLow;
  }
};

struct RansReader {
  uint32_t x[kLanes];
  const uint16_t* next;
  const uint16_t* end;   // of this stream's words
  const uint16_t* limit; // of memory that may be read, at or after `end`
  bool finished() const;
};

// Symbols are nibbles, two a byte, the low one first: a step is 16 bytes, and symbol i of it
// belongs to lane i. Steps are encoded from the last to the first.
constexpr int kStepBytes = kLanes / 2;
void rans_encode(const uint8_t* nibbles, int64_t steps, const RansTable& table, RansWriter* out);
// One step in which only the first `lanes` take part.
void rans_encode_part(const uint8_t* nibbles, int lanes, const RansTable& table, RansWriter* out);

// Some streams at once, at most kMaxStreams: one alone is bound by the latency of its dependent
// steps. False when the words of one run out. A reader may run past its `end` within `limit` before
// that is noticed; `finished` tells in the end.
constexpr int kMaxStreams = 4;
bool rans_decode(int streams, uint8_t* const nibbles[], int64_t steps,
                 const RansTable* const table[], RansReader* const in[]);
// Calls f(first, last) in parallel for groups of at most kMaxStreams chunks: as many groups for
// each thread.
template <class F>
void for_each_group(int64_t chunks, int threads, F&& f) {
  const int64_t at_once = int64_t{kMaxStreams} * threads;
  const int64_t groups = std::min(chunks, (chunks + at_once - 1) / at_once * threads);
  parallel_for(groups, threads,
               [&](int64_t g) { f(chunks * g / groups, chunks * (g + 1) / groups); });
}

// One step of one stream; nibbles of lanes that take no part become 0.
bool rans_decode_part(uint8_t* nibbles, int lanes, const RansTable& table, RansReader* in);

} // namespace fedmap
