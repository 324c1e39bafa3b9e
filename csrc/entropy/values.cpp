// Floating-point values without loss: exponents under rANS, signs and mantissas as they are.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "accumulate/accumulate.h"
#include "core/cpu.h"
#include "core/dtype.h"
#include "core/pool.h"
#include "entropy/entropy.h"
#include "entropy/planes.h"
#include "entropy/rans.h"
#include "entropy/value_payload.h"

namespace fedmap {
namespace {

// Buffers of one chunk, a few L1 caches in size; a thread keeps its own.
struct Workspace {
  uint8_t nibbles[kMaxStreams][kValueChunk / 2 + 64], exponents[kValueChunk + 64],
      high[kValueChunk + 64];
  uint32_t values[kValueChunk];
  uint16_t words[kValueChunk];
  static Workspace& mine() {
    static thread_local std::unique_ptr<Workspace> workspace(new Workspace);
    return *workspace;
  }
};

void count_exponents(const uint8_t* exponents, int64_t n, int64_t counts[256]) {
  uint32_t four[4][256] = {}; // equal neighbours would wait for each other's store
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k)
      ++four[k][exponents[i + k]];
  for (; i < n; ++i)
    ++four[0][exponents[i]];
  for (int e = 0; e < 256; ++e)
    counts[e] = int64_t{four[0][e]} + four[1][e] + four[2][e] + four[3][e];
}

// The smallest top whose 15 exponents cover the most values.
uint8_t best_top(const int64_t counts[256], int max_exponent) {
  int64_t covered = 0, best = -1;
  int top = 0;
  for (int e = 0; e <= max_exponent; ++e) {
    covered += counts[e] - (e >= kEscape ? counts[e - kEscape] : 0);
    if (covered > best) {
      best = covered;
      top = e;
    }
  }
  return static_cast<uint8_t>(top);
}

// Frequencies nearest to the counts that sum to 2^15, at least 1 for what occurs.
void set_frequencies(const int64_t counts[256], int64_t n, ValueEntry* entry) {
  int64_t left = kFrequencySum, rest = n;
  int most = 0;
  for (int s = 0; s < kSymbols; ++s) {
    const int64_t c = s == kEscape ? rest : entry->top >= s ? counts[entry->top - s] : 0;
    rest -= c;
    const int64_t f = c ? std::max<int64_t>(1, (2 * c * kFrequencySum + n) / (2 * n)) : 0;
    entry->frequency[s] = static_cast<uint16_t>(f);
    left -= f;
    if (f > entry->frequency[most])
      most = s;
    if (s == kEscape)
      entry->escapes = static_cast<uint16_t>(c);
  }
  entry->frequency[most] = static_cast<uint16_t>(entry->frequency[most] + left);
}

// Calls found(i, k) where the k nibbles from i on, below n, are the escape: k is 16 where all of 16
// are, else 1. 16 are looked at at once: an escape is rare but in a message meant to cost time.
template <class F>
void for_each_escape(const uint8_t* nibbles, int64_t n, F&& found) {
  static_assert(kEscape == 15);
  for (int64_t i = 0; i < n; i += 16) {
    uint64_t v;
    std::memcpy(&v, nibbles + i / 2, 8);
    uint64_t hits = v & v >> 1 & v >> 2 & v >> 3 & 0x1111111111111111;
    if (hits == 0x1111111111111111 && i + 16 <= n) {
      found(i, 16);
      continue;
    }
    for (; hits; hits &= hits - 1)
      if (const int64_t at = i + __builtin_ctzll(hits) / 4; at < n)
        found(at, 1);
  }
}

// Words and escapes of a chunk until their place in the payload is known.
struct CodedChunk {
  std::unique_ptr<uint16_t[]> words;
  std::unique_ptr<uint8_t[]> escapes;
};

template <class T>
CodedChunk encode_chunk(const typename T::Bits* values, int64_t n, uint8_t* low, uint8_t* high,
                        ValueEntry* entry, uint8_t* states) {
  Workspace& w = Workspace::mine();
  FEDMAP_DISPATCH(split_planes<T>)
  (values, n, w.exponents, reinterpret_cast<typename T::Low*>(low), T::kPacked ? w.high : high);
  if constexpr (T::kPacked) {
    std::memset(w.high + n, 0, 8);
    pack_threes(w.high, n, high);
  }
  int64_t counts[256];
  count_exponents(w.exponents, n, counts);
  *entry = {};
  entry->top = best_top(counts, T::kMaxExponent);
  set_frequencies(counts, n, entry);
  std::memset(w.exponents + n, 0, 64);
  uint8_t* const nibbles = w.nibbles[0];
  FEDMAP_DISPATCH(to_nibbles)(w.exponents, (n + 63) / 64 * 64, entry->top, nibbles);
  CodedChunk coded;
  if (entry->escapes) {
    coded.escapes.reset(new uint8_t[entry->escapes]);
    uint8_t* next = coded.escapes.get();
    for_each_escape(nibbles, n,
                    [&](int64_t i, int64_t k) { next = std::copy_n(w.exponents + i, k, next); });
  }
  const RansTable table = table_of(*entry);
  RansWriter writer(w.words + kValueChunk);
  if (n % kLanes)
    rans_encode_part(nibbles + n / kLanes * kStepBytes, n % kLanes, table, &writer);
  rans_encode(nibbles, n / kLanes, table, &writer);
  const int64_t words = w.words + kValueChunk - writer.next;
  entry->words = static_cast<uint16_t>(words);
  coded.words.reset(new uint16_t[words]);
  std::memcpy(coded.words.get(), writer.next, 2 * words);
  std::memcpy(states, writer.x, sizeof writer.x);
  return coded;
}

template <class T>
int64_t encode_as(const void* data, int64_t n, uint8_t* out, int64_t capacity, int threads) {
  using Bits = typename T::Bits;
  const Bits* values = static_cast<const Bits*>(data);
  const int64_t chunks = (n + kValueChunk - 1) / kValueChunk;
  const ValueParts parts = ValueParts::of<T>(n);
  if (parts.words > capacity)
    return -1;
  std::vector<ValueEntry> entries(chunks);
  std::vector<CodedChunk> coded(chunks);
  std::memset(out + parts.high - 3, 0, 3); // the padding of both planes, before they are written
  std::memset(out + parts.words - 3, 0, 3);
  parallel_for(chunks, threads_for(n * sizeof(Bits), threads), [&](int64_t c) {
    const int64_t i = c * kValueChunk;
    coded[c] = encode_chunk<T>(values + i, std::min(kValueChunk, n - i),
                               out + parts.low + (kHasLow<T> ? i * sizeof(typename T::Low) : 0),
                               out + parts.high + (T::kPacked ? 3 * i / 8 : i), &entries[c],
                               out + parts.states + 4 * kLanes * c);
  });
  std::memcpy(out, entries.data(), parts.states);
  int64_t words = 0, escapes = 0;
  for (const ValueEntry& e : entries) {
    words += e.words;
    escapes += e.escapes;
  }
  uint8_t* word = out + parts.words;
  uint8_t* escape = word + padded(2 * words);
  const int64_t size = escape + padded(escapes) - out;
  if (size > capacity)
    return -1;
  if (words % 2)
    std::memset(escape - 2, 0, 2);
  for (int64_t c = 0; c < chunks; ++c) {
    std::memcpy(word, coded[c].words.get(), 2 * entries[c].words);
    word += 2 * entries[c].words;
    if (entries[c].escapes)
      std::memcpy(escape, coded[c].escapes.get(), entries[c].escapes);
    escape += entries[c].escapes;
  }
  std::memset(escape, 0, out + size - escape);
  return size;
}

// Symbols of chunks [first, last) into w->nibbles[0, 1, ..]; false when those of one do not decode.
bool decode_symbols(const ValuePayload& p, int64_t first, int64_t last, Workspace* w) {
  uint8_t* nibbles[kMaxStreams] = {};
  RansTable table[kMaxStreams];
  RansReader reader[kMaxStreams];
  const RansTable* tables[kMaxStreams] = {};
  RansReader* readers[kMaxStreams] = {};
  const int streams = static_cast<int>(last - first);
  for (int k = 0; k < streams; ++k) {
    const int64_t c = first + k;
    table[k] = table_of(p.entries[c]);
    std::memcpy(reader[k].x, p.data + p.parts.states + 4 * kLanes * c, sizeof reader[k].x);
    reader[k].next = reinterpret_cast<const uint16_t*>(p.data + p.words[c]);
    reader[k].end = reinterpret_cast<const uint16_t*>(p.data + p.words[c + 1]);
    reader[k].limit = reinterpret_cast<const uint16_t*>(p.data + p.size / 2 * 2);
    nibbles[k] = w->nibbles[k];
    tables[k] = &table[k];
    readers[k] = &reader[k];
  }
  // The last chunk of all may be shorter than the others.
  const int64_t steps = size_of(p, first) / kLanes, common = size_of(p, last - 1) / kLanes;
  if (!rans_decode(streams, nibbles, common, tables, readers))
    return false;
  for (int k = 0; k < streams; ++k)
    nibbles[k] += common * kStepBytes;
  if (common < steps && !rans_decode(streams - 1, nibbles, steps - common, tables, readers))
    return false;
  const int lanes = static_cast<int>(size_of(p, last - 1) % kLanes);
  if (lanes &&
      !rans_decode_part(nibbles[streams - 1], lanes, table[streams - 1], &reader[streams - 1]))
    return false;
  return std::all_of(reader, reader + streams, [](const RansReader& r) { return r.finished(); });
}

// Whether one of n nibbles lies between `top` and the escape. 16 are looked at at once.
bool any_between(const uint8_t* nibbles, int64_t n, int top) {
  constexpr uint64_t kOnes = 0x0101010101010101;
  const uint64_t add = kOnes * (0x7f - top); // a nibble above `top` then has bit 7
  uint64_t found = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    uint64_t v;
    std::memcpy(&v, nibbles + i / 2, 8);
    for (const uint64_t x : {v & 0x0f * kOnes, v >> 4 & 0x0f * kOnes})
      found |= (x + add) & ~((x + kOnes) << 3) & 0x80 * kOnes; // 15 + 1 has bit 4
  }
  for (; i < n; ++i)
    if (const int s = nibbles[i / 2] >> i % 2 * 4 & 15; s > top && s != kEscape)
      return true;
  return found;
}

// Exponents of chunk c, from its symbols, into `w`; false when they are none.
template <class T>
bool to_exponents_of(const ValuePayload& p, int64_t c, const uint8_t* nibbles, Workspace* w) {
  const ValueEntry& entry = p.entries[c];
  const int64_t n = size_of(p, c);
  FEDMAP_DISPATCH(to_exponents)(nibbles, (n + 1) / 2 * 2, entry.top, w->exponents);
  // Symbols above `top` would wrap; none of them may occur.
  if (entry.top < kEscape - 1 && any_between(nibbles, n, entry.top))
    return false;
  const uint8_t* escape = p.data + p.escapes[c];
  const uint8_t* end = escape + entry.escapes;
  bool sound = true;
  if (entry.frequency[kEscape])
    for_each_escape(nibbles, n, [&](int64_t i, int64_t k) {
      sound = sound && end - escape >= k && std::all_of(escape, escape + k, [](uint8_t exponent) {
                return exponent <= T::kMaxExponent;
              });
      if (sound) {
        std::copy_n(escape, k, w->exponents + i);
        escape += k;
      }
    });
  return sound && escape == end;
}

template <class T>
void join_chunk(const ValuePayload& p, int64_t c, Workspace* w, typename T::Bits* values) {
  const int64_t i = c * kValueChunk, n = size_of(p, c);
  const uint8_t* high = p.data + p.parts.high + (T::kPacked ? 3 * i / 8 : i);
  if constexpr (T::kPacked) {
    unpack_threes(high, n, w->high);
    high = w->high;
  }
  const auto* low = reinterpret_cast<const typename T::Low*>(p.data + p.parts.low);
  FEDMAP_DISPATCH(join_planes<T>)(w->exponents, kHasLow<T> ? low + i : low, high, n, values);
}

// Calls use(chunk, workspace) for every chunk once its exponents are decoded.
template <class T, class F>
Fault for_each_chunk(const uint8_t* data, int64_t size, int64_t n, int threads, F&& use) {
  ValuePayload p;
  if (const Fault fault = open_values<T>(data, size, n, &p); fault.reason)
    return fault;
  std::vector<uint8_t> broken(p.chunks, 0);
  const int64_t bytes = n * static_cast<int64_t>(sizeof(typename T::Bits));
  for_each_group(p.chunks, threads_for(bytes, threads), [&](int64_t first, int64_t last) {
    Workspace& w = Workspace::mine();
    const bool all = decode_symbols(p, first, last, &w);
    for (int64_t c = first; c < last; ++c) {
      const uint8_t* nibbles = w.nibbles[all ? c - first : 0];
      broken[c] =
          !(all || decode_symbols(p, c, c + 1, &w)) || !to_exponents_of<T>(p, c, nibbles, &w);
      if (!broken[c])
        use(p, c, &w);
    }
  });
  for (int64_t c = 0; c < p.chunks; ++c)
    if (broken[c])
      return {"words or escapes that do not decode", c * static_cast<int64_t>(sizeof(ValueEntry))};
  return {};
}

template <class F>
auto for_dtype(int dtype, F&& f) {
  return dtype == kFloat32   ? f(Float32Planes{})
         : dtype == kFloat16 ? f(Float16Planes{})
                             : f(Bfloat16Planes{});
}

} // namespace

int64_t encode_values(const void* values, int dtype, int64_t n, uint8_t* out, int64_t capacity,
                      int threads) {
  return for_dtype(
      dtype, [&](auto t) { return encode_as<decltype(t)>(values, n, out, capacity, threads); });
}

Fault decode_values(const uint8_t* payload, int64_t size, int dtype, int64_t n, void* out,
                    int threads) {
  return for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    auto* values = static_cast<typename T::Bits*>(out);
    return for_each_chunk<T>(payload, size, n, threads,
                             [&](const ValuePayload& p, int64_t c, Workspace* w) {
                               join_chunk<T>(p, c, w, values + c * kValueChunk);
                             });
  });
}

Fault check_values(const uint8_t* payload, int64_t size, int dtype, int64_t n, bool* finite,
                   int threads) {
  return for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    std::vector<uint8_t> odd((n + kValueChunk - 1) / kValueChunk, 0);
    const Fault fault = for_each_chunk<T>(payload, size, n, threads,
                                          [&](const ValuePayload& p, int64_t c, Workspace* w) {
                                            const int64_t m = size_of(p, c);
                                            uint8_t most = 0;
                                            for (int64_t i = 0; i < m; ++i)
                                              most = std::max(most, w->exponents[i]);
                                            odd[c] = most == T::kMaxExponent; // NaN or infinity
                                          });
    *finite = std::find(odd.begin(), odd.end(), 1) == odd.end();
    return fault;
  });
}

Fault add_values(const uint8_t* payload, int64_t size, int dtype, int64_t n, double* acc,
                 double weight, int threads) {
  return for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    return for_each_chunk<T>(
        payload, size, n, threads, [&](const ValuePayload& p, int64_t c, Workspace* w) {
          auto* values = reinterpret_cast<typename T::Bits*>(w->values);
          join_chunk<T>(p, c, w, values);
          accumulate_add(acc + c * kValueChunk, values, dtype, weight, size_of(p, c), 1);
        });
  });
}

} // namespace fedmap
