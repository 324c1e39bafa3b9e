// How mask bits are cut for the coder: densities, coded runs, pieces of steps, and the bits of a
// piece on their way to and from the bitmap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/bits.h"
#include "entropy/entropy.h"
#include "entropy/rans.h"

namespace fedmap {

constexpr int64_t kStepBits = 4 * kLanes;
constexpr int64_t kTileSteps = 64; // 1 KiB: a tile stays in L1
constexpr int64_t kTileBytes = kTileSteps * kStepBits / 8;
constexpr int64_t kMinChunk = 1 << 10, kMaxChunk = 1 << 17;

// Density codes: bit 7 says whether ones or zeros are the rarer bit, the rest its probability, 8
// steps an octave down to 2^-16; 127 means that the rarer bit does not occur at all.
constexpr int kOnesAreCommon = 0x80, kConstant = 0x7f, kDensities = 120;

inline bool is_constant(uint8_t code) {
  return (code & kConstant) == kConstant;
}

inline RansTable density_table(uint8_t code) {
  const int k = code & kConstant;
  const uint64_t rare = uint64_t(16 - k % 8) << (15 - k / 8), common = (1 << 20) - rare;
  const uint64_t rr = rare * rare >> 20, rc = rare * common >> 20, cc = common * common >> 20;
  const uint64_t by_count[5] = {cc * cc, cc * rc, rc * rc, rc * rr, rr * rr};
  const uint32_t flip = code & kOnesAreCommon ? 15 : 0;
  RansTable t;
  uint32_t sum = 0;
  for (uint32_t s = 1; s < kSymbols; ++s) {
    const uint64_t p = by_count[__builtin_popcount(s)] >> 20;
    const uint32_t f = std::max<uint32_t>(1, static_cast<uint32_t>((p + 16) >> 5));
    t.frequency[s ^ flip] = f;
    sum += f;
  }
  t.frequency[flip] = kFrequencySum - sum;
  finish_table(&t);
  return t;
}

// A run that is coded, and the number of steps before it. Each run begins a step of its own; in
// its last step only as many lanes take part as there are nibbles left.
struct CodedRun {
  int64_t start, numel, first;
  uint8_t code;
};

struct MaskPlan {
  std::vector<CodedRun> runs;
  int64_t steps = 0;
};

inline MaskPlan plan_of(MaskRuns runs, const uint8_t* codes) {
  MaskPlan plan;
  for (int64_t r = 0; r < runs.count; ++r)
    if (!is_constant(codes[r])) {
      plan.runs.push_back({runs.start[r], runs.numel[r], plan.steps, codes[r]});
      plan.steps += (runs.numel[r] + kStepBits - 1) / kStepBits;
    }
  return plan;
}

// A stretch of steps of one run: whole steps, or the one partial step that ends the run.
struct Piece {
  int64_t run, bit, steps;
  int lanes; // of a partial step, else 0
};

// The piece that begins with `step`, at most `limit` steps long.
inline Piece piece_at(const MaskPlan& plan, int64_t run, int64_t step, int64_t limit) {
  const CodedRun& r = plan.runs[run];
  const int64_t bit = (step - r.first) * kStepBits, left = r.numel - bit;
  if (left < kStepBits)
    return {run, r.start + bit, 1, static_cast<int>((left + 3) / 4)};
  return {run, r.start + bit, std::min(limit, left / kStepBits), 0};
}

// All pieces of the steps [begin, end), in order.
inline std::vector<Piece> pieces_of(const MaskPlan& plan, int64_t begin, int64_t end) {
  std::vector<Piece> pieces;
  auto after = std::upper_bound(plan.runs.begin(), plan.runs.end(), begin,
                                [](int64_t step, const CodedRun& r) { return step < r.first; });
  int64_t run = after - plan.runs.begin() - 1;
  const int64_t runs = static_cast<int64_t>(plan.runs.size());
  while (begin < end) {
    if (run + 1 < runs && plan.runs[run + 1].first <= begin)
      ++run;
    pieces.push_back(piece_at(plan, run, begin, end - begin));
    begin += pieces.back().steps;
  }
  return pieces;
}

// Bits [bit, bit + count) of a bitmap of `numel` bits, from bit 0 of `tile`, which has 8 bytes to
// spare.
inline void load_bits(const uint32_t* words, int64_t numel, int64_t bit, int64_t count,
                      uint8_t* tile) {
  const int64_t bytes = (count + 7) / 8, there = mask_words(numel) * 4 - bit / 8;
  const uint8_t* from = reinterpret_cast<const uint8_t*>(words) + bit / 8;
  const int shift = bit % 8;
  if (!shift) {
    std::memcpy(tile, from, std::min(bytes, there));
    return;
  }
  uint8_t raw[kTileBytes + 16] = {};
  std::memcpy(raw, from, std::min(bytes + 1, there));
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t low;
    std::memcpy(&low, raw + i, 8);
    low = low >> shift | uint64_t{raw[i + 8]} << (64 - shift);
    std::memcpy(tile + i, &low, 8);
  }
}

inline void or_into(uint32_t* word, uint32_t bits) {
  if (bits)
    __atomic_fetch_or(word, bits, __ATOMIC_RELAXED);
}

inline uint64_t bits_at(const uint8_t* tile, int64_t bit) {
  uint64_t window;
  std::memcpy(&window, tile + bit / 8, 8);
  return window >> bit % 8; // 57 bits at least
}

// The inverse: words that the piece covers are written, those at its edges are or-ed into, as
// another thread may own their other bits.
inline void store_bits(const uint8_t* tile, int64_t bit, int64_t count, uint32_t* words) {
  uint32_t* word = words + bit / 32;
  int64_t done = 0;
  if (const int64_t used = bit % 32) {
    done = std::min(count, 32 - used);
    or_into(word++,
            static_cast<uint32_t>((bits_at(tile, 0) & ((uint64_t{1} << done) - 1)) << used));
  }
  if (done % 8 == 0) {
    const int64_t whole = (count - done) / 32;
    std::memcpy(word, tile + done / 8, whole * 4);
    word += whole;
    done += whole * 32;
  }
  for (; done + 32 <= count; done += 32)
    *word++ = static_cast<uint32_t>(bits_at(tile, done));
  if (done < count)
    or_into(word,
            static_cast<uint32_t>(bits_at(tile, done) & ((uint64_t{1} << (count - done)) - 1)));
}

// Bits of the run in its last nibble. Those beyond are coded as the common bit: nearly free.
inline uint8_t used_bits(const CodedRun& run) {
  const int used = run.numel % 4;
  return static_cast<uint8_t>(used ? (1 << used) - 1 : 15);
}

inline uint8_t filling(const CodedRun& run) {
  return static_cast<uint8_t>(run.code & kOnesAreCommon ? 15 & ~used_bits(run) : 0);
}

// Where the parts of a payload lie: 8 bytes of header, codes, directory, states, words.
struct MaskParts {
  int64_t directory, states, words;
  MaskParts(int64_t runs, int64_t chunks)
      : directory(8 + (runs + 3) / 4 * 4), states(directory + 4 * chunks),
        words(states + 4 * kLanes * chunks) {}
};

} // namespace fedmap
