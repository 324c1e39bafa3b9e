// A payload of values: where its parts lie, and the checks that come before anything is decoded.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "entropy/entropy.h"
#include "entropy/planes.h"
#include "entropy/rans.h"

namespace fedmap {

constexpr int64_t kValueChunk = 1 << 15; // values; each chunk has a table and states of its own

// One entry of the directory. A symbol is `top` less the exponent; those of no symbol escape.
struct ValueEntry {
  uint16_t words, escapes;
  uint8_t top, zero[3];
  uint16_t frequency[kSymbols];
};
static_assert(sizeof(ValueEntry) == 40, "as docs/format.md has it");

// Where the parts of a payload lie: directory, states, low plane, high plane, words, escapes.
struct ValueParts {
  int64_t states, low, high, words;
  template <class T>
  static ValueParts of(int64_t n) {
    const int64_t chunks = (n + kValueChunk - 1) / kValueChunk;
    ValueParts p;
    p.states = static_cast<int64_t>(sizeof(ValueEntry)) * chunks;
    p.low = p.states + 4 * kLanes * chunks;
    p.high = p.low + T::low_bytes(n);
    p.words = p.high + T::high_bytes(n);
    return p;
  }
};

inline RansTable table_of(const ValueEntry& entry) {
  RansTable t;
  for (int s = 0; s < kSymbols; ++s)
    t.frequency[s] = entry.frequency[s];
  finish_table(&t);
  return t;
}

// A payload whose sizes were found consistent.
struct ValuePayload {
  const uint8_t* data;
  int64_t size, n, chunks;
  ValueParts parts;
  std::vector<ValueEntry> entries;
  std::vector<int64_t> words, escapes; // where those of each chunk begin
};

inline Fault expect_zeros(const uint8_t* data, int64_t begin, int64_t end) {
  for (; begin < end; ++begin)
    if (data[begin])
      return {"expected padding to be zero", begin};
  return {};
}

template <class T>
Fault open_values(const uint8_t* data, int64_t size, int64_t n, ValuePayload* p) {
  const int64_t chunks = (n + kValueChunk - 1) / kValueChunk;
  *p = {data, size, n, chunks, ValueParts::of<T>(n), {}, {}, {}};
  const ValueParts& parts = p->parts;
  if (size < parts.words)
    return {"expected directory, states and planes, got the end of the payload", size};
  p->entries.resize(chunks);
  std::memcpy(p->entries.data(), data, parts.states);
  int64_t words = 0, escapes = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const ValueEntry& e = p->entries[c];
    const int64_t at = c * static_cast<int64_t>(sizeof(ValueEntry));
    p->words.push_back(parts.words + 2 * words);
    p->escapes.push_back(escapes);
    words += e.words;
    escapes += e.escapes;
    uint32_t sum = 0;
    for (uint16_t f : e.frequency)
      sum += f;
    if (sum != kFrequencySum)
      return {"expected frequencies that sum to 2^15", at + 8};
    if (e.top > T::kMaxExponent)
      return {"an exponent beyond the dtype's", at + 4};
    if (e.zero[0] | e.zero[1] | e.zero[2])
      return {"expected reserved bytes to be zero", at + 5};
  }
  p->words.push_back(parts.words + 2 * words);
  const int64_t escaped = parts.words + padded(2 * words);
  if (size != escaped + padded(escapes))
    return {"the directory disagrees with the size of the payload", 0};
  for (int64_t& at : p->escapes)
    at += escaped;
  for (int64_t i = 0; i < kLanes * chunks; ++i) {
    uint32_t x;
    std::memcpy(&x, data + parts.states + 4 * i, 4);
    if (x < kStateLow || x >= kStateHigh)
      return {"a state that rANS cannot have", parts.states + 4 * i};
  }
  const int64_t low = kHasLow<T> ? n * static_cast<int64_t>(sizeof(typename T::Low)) : 0;
  const int64_t high_bits = (T::kPacked ? 3 : 8) * n;
  if (high_bits % 8 && data[parts.high + high_bits / 8] >> high_bits % 8)
    return {"expected padding to be zero", parts.high + high_bits / 8};
  for (const Fault& fault :
       {expect_zeros(data, parts.low + low, parts.high),
        expect_zeros(data, parts.high + (high_bits + 7) / 8, parts.words),
        expect_zeros(data, p->words[chunks], escaped), expect_zeros(data, escaped + escapes, size)})
    if (fault.reason)
      return fault;
  return {};
}

// Values of chunk c.
inline int64_t size_of(const ValuePayload& p, int64_t c) {
  return std::min(kValueChunk, p.n - c * kValueChunk);
}

} // namespace fedmap
