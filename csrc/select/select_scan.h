// The vector part of selection: one read of a tile of values.
#pragma once

#include <cstdint>

namespace fedmap {

// Elements that one scan takes at most: a candidate holds a 15-bit position in its tile beside 17
// bits of its key.
constexpr int kTileBits = 15;
constexpr int64_t kTile = 1 << kTileBits;

// Cuts magnitude keys in three: pruned <= below < candidate <= top < kept. Each lies in
// [-1, INT32_MAX] (INT16_MAX for 16-bit values): -1 leaves nothing below, the maximum nothing
// above.
struct Bracket {
  int32_t below, top;
  int shift;      // a candidate's key, less below + 1 and shifted right by this, fits 17 bits
  int bins_shift; // and by this again, 11
};

struct Tally {
  int64_t kept = 0, candidates = 0;
  int64_t at_below = 0,
          above_top = 0; // keys equal to `below` and to `top` + 1: if ties are counted

  Tally& operator+=(const Tally& other) {
    kept += other.kept;
    candidates += other.candidates;
    at_below += other.at_below;
    above_top += other.above_top;
    return *this;
  }
};

// Reads n <= kTile values of which the bits of `within` (null: all) are eligible; writes the bitmap
// of the kept ones, their counts per block, and the candidates in order, each
// (key - below - 1) >> shift << kTileBits | position. `candidates` has room for n and kScanSlack.
using Scan = Tally (*)(const void* values, const uint32_t* within, int64_t n,
                       const Bracket& bracket, uint32_t* words, int64_t* counts,
                       uint32_t* candidates);
constexpr int64_t kScanSlack = 16;

Scan scan_for(int dtype, bool count_ties);

// How many of n values whose bits in `within` (null: all) are set have a key above the limit.
int64_t count_above(const void* values, int dtype, const uint32_t* within, int64_t n,
                    uint32_t limit);

// Positions of the set bits of the given ranks (ascending), within `words`.
void locate(const uint32_t* words, int64_t count, const int64_t* ranks, int64_t n,
            int64_t* positions);

inline uint32_t magnitude_key(const void* values, int dtype_bytes, int64_t i) {
  return dtype_bytes == 4 ? static_cast<const uint32_t*>(values)[i] & 0x7fffffff
                          : static_cast<const uint16_t*>(values)[i] & 0x7fff;
}

} // namespace fedmap
