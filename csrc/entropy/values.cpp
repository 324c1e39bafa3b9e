// Floating-point values without loss: exponents under rANS, signs and mantissas as they are.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "core/cpu.h"
#include "core/kernels.h"
#include "core/pool.h"
#include "entropy/entropy.h"
#include "entropy/rans.h"

namespace fedmap {
namespace {

constexpr int64_t kChunk = 1 << 15; // values; each chunk has a table and states of its own
constexpr int kEscape = kSymbols - 1;

// One entry of the directory. A symbol is `top` less the exponent; those of no symbol escape.
struct Entry {
  uint16_t words, escapes;
  uint8_t top, zero[3];
  uint16_t frequency[kSymbols];
};
static_assert(sizeof(Entry) == 40, "as docs/format.md has it");

int64_t padded(int64_t bytes) {
  return (bytes + 3) / 4 * 4;
}

// How a dtype splits into an exponent, a low plane and a high plane.
struct Float32 {
  using Bits = uint32_t;
  using Low = uint16_t;
  static constexpr int kMaxExponent = 255;
  static constexpr bool kPacked = false; // the high plane: 8 bits a value, else 3
  static uint8_t exponent(Bits v) { return static_cast<uint8_t>(v >> 23); }
  static Low low(Bits v) { return static_cast<Low>(v); }
  static uint8_t high(Bits v) { return static_cast<uint8_t>((v >> 24 & 0x80) | (v >> 16 & 0x7f)); }
  static Bits join(uint8_t e, Low low, uint8_t high) {
    return (high & 0x80u) << 24 | uint32_t{e} << 23 | (high & 0x7fu) << 16 | low;
  }
  static int64_t low_bytes(int64_t n) { return padded(2 * n); }
  static int64_t high_bytes(int64_t n) { return padded(n); }
};

struct Bfloat16 {
  using Bits = uint16_t;
  using Low = uint8_t; // unused
  static constexpr int kMaxExponent = 255;
  static constexpr bool kPacked = false;
  static uint8_t exponent(Bits v) { return static_cast<uint8_t>(v >> 7); }
  static Low low(Bits) { return 0; }
  static uint8_t high(Bits v) { return static_cast<uint8_t>((v >> 8 & 0x80) | (v & 0x7f)); }
  static Bits join(uint8_t e, Low, uint8_t high) {
    return static_cast<Bits>((high & 0x80) << 8 | e << 7 | (high & 0x7f));
  }
  static int64_t low_bytes(int64_t) { return 0; }
  static int64_t high_bytes(int64_t n) { return padded(n); }
};

struct Float16 {
  using Bits = uint16_t;
  using Low = uint8_t;
  static constexpr int kMaxExponent = 31;
  static constexpr bool kPacked = true;
  static uint8_t exponent(Bits v) { return v >> 10 & 31; }
  static Low low(Bits v) { return static_cast<Low>(v); }
  static uint8_t high(Bits v) { return static_cast<uint8_t>((v >> 13 & 4) | (v >> 8 & 3)); }
  static Bits join(uint8_t e, Low low, uint8_t high) {
    return static_cast<Bits>((high & 4) << 13 | e << 10 | (high & 3) << 8 | low);
  }
  static int64_t low_bytes(int64_t n) { return padded(n); }
  static int64_t high_bytes(int64_t n) { return padded((3 * n + 7) / 8); }
};

template <class T>
constexpr bool kHasLow = !std::is_same_v<T, Bfloat16>;

// Where the parts of a payload lie: directory, states, low plane, high plane, words, escapes.
struct Parts {
  int64_t states, low, high, words;
  template <class T>
  static Parts of(int64_t n) {
    const int64_t chunks = (n + kChunk - 1) / kChunk;
    Parts p;
    p.states = static_cast<int64_t>(sizeof(Entry)) * chunks;
    p.low = p.states + 4 * kLanes * chunks;
    p.high = p.low + T::low_bytes(n);
    p.words = p.high + T::high_bytes(n);
    return p;
  }
};

// Plain loops, inlined into a function for each ISA level.
template <class T>
[[gnu::always_inline]] inline void split_loop(const typename T::Bits* values, int64_t n,
                                              uint8_t* exponents, typename T::Low* low,
                                              uint8_t* high) {
  for (int64_t i = 0; i < n; ++i)
    exponents[i] = T::exponent(values[i]);
  if constexpr (kHasLow<T>)
    for (int64_t i = 0; i < n; ++i)
      low[i] = T::low(values[i]);
  for (int64_t i = 0; i < n; ++i)
    high[i] = T::high(values[i]);
}

template <class T>
[[gnu::always_inline]] inline void join_loop(const uint8_t* exponents, const typename T::Low* low,
                                             const uint8_t* high, int64_t n,
                                             typename T::Bits* values) {
  for (int64_t i = 0; i < n; ++i)
    values[i] = T::join(exponents[i], kHasLow<T> ? low[i] : 0, high[i]);
}

// The escape for exponents outside of (top - 15, top]. `top - e` alone would wrap: with a top of 6,
// an exponent of 255 (infinity) looked like symbol 7.
[[gnu::always_inline]] inline uint8_t symbol_of(uint8_t top, uint8_t e) {
  return e > top ? kEscape : std::min<uint8_t>(static_cast<uint8_t>(top - e), kEscape);
}

// Two symbols a byte.
[[gnu::always_inline]] inline void nibbles_loop(const uint8_t* exponents, int64_t n, uint8_t top,
                                                uint8_t* nibbles) {
  for (int64_t i = 0; i < n / 2; ++i)
    nibbles[i] = static_cast<uint8_t>(symbol_of(top, exponents[2 * i]) |
                                      symbol_of(top, exponents[2 * i + 1]) << 4);
}

[[gnu::always_inline]] inline void exponents_loop(const uint8_t* nibbles, int64_t n, uint8_t top,
                                                  uint8_t* exponents) {
  for (int64_t i = 0; i < n / 2; ++i) {
    exponents[2 * i] = static_cast<uint8_t>(top - (nibbles[i] & 15));
    exponents[2 * i + 1] = static_cast<uint8_t>(top - (nibbles[i] >> 4));
  }
}

#define FEDMAP_LOOPS                                                                               \
  template <class T>                                                                               \
  static void split(const typename T::Bits* values, int64_t n, uint8_t* exponents,                 \
                    typename T::Low* low, uint8_t* high) {                                         \
    split_loop<T>(values, n, exponents, low, high);                                                \
  }                                                                                                \
  template <class T>                                                                               \
  static void join(const uint8_t* exponents, const typename T::Low* low, const uint8_t* high,      \
                   int64_t n, typename T::Bits* values) {                                          \
    join_loop<T>(exponents, low, high, n, values);                                                 \
  }                                                                                                \
  static void to_nibbles(const uint8_t* exponents, int64_t n, uint8_t top, uint8_t* nibbles) {     \
    nibbles_loop(exponents, n, top, nibbles);                                                      \
  }                                                                                                \
  static void to_exponents(const uint8_t* nibbles, int64_t n, uint8_t top, uint8_t* exponents) {   \
    exponents_loop(nibbles, n, top, exponents);                                                    \
  }

namespace scalar {
FEDMAP_LOOPS
} // namespace scalar
#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {
FEDMAP_LOOPS
} // namespace avx2
FEDMAP_TARGET_END
FEDMAP_TARGET_AVX512
namespace avx512 {
FEDMAP_LOOPS
} // namespace avx512
FEDMAP_TARGET_END
#endif
#undef FEDMAP_LOOPS

// Buffers of one chunk, a few L1 caches in size; a thread keeps its own.
struct Workspace {
  uint8_t nibbles[kMaxStreams][kChunk / 2 + 64], exponents[kChunk + 64], high[kChunk + 64];
  uint32_t values[kChunk];
  uint16_t words[kChunk];
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
void set_frequencies(const int64_t counts[256], int64_t n, Entry* entry) {
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

RansTable table_of(const Entry& entry) {
  RansTable t;
  for (int s = 0; s < kSymbols; ++s)
    t.frequency[s] = entry.frequency[s];
  finish_table(&t);
  return t;
}

// The 3-bit plane, 8 values to 24 bits at a time; `high` holds a value a byte and is padded to 8.
void pack_threes(const uint8_t* high, int64_t n, uint8_t* out) {
  const int64_t bytes = (3 * n + 7) / 8;
  for (int64_t i = 0, at = 0; i < n; i += 8, at += 3) {
    uint64_t x;
    std::memcpy(&x, high + i, 8);
    x = (x | x >> 5) & 0x003f003f003f003f;
    x = (x | x >> 10) & 0x00000fff00000fff;
    x |= x >> 20;
    if (at + 8 <= bytes)
      std::memcpy(out + at, &x, 8); // the groups that follow overwrite what is too much
    else
      std::memcpy(out + at, &x, std::min<int64_t>(3, bytes - at));
  }
}

void unpack_threes(const uint8_t* in, int64_t n, uint8_t* high) {
  const int64_t bytes = (3 * n + 7) / 8;
  for (int64_t i = 0, at = 0; i < n; i += 8, at += 3) {
    uint64_t x = 0;
    if (at + 8 <= bytes)
      std::memcpy(&x, in + at, 8);
    else
      std::memcpy(&x, in + at, std::min<int64_t>(3, bytes - at));
    x &= 0xffffff;
    x = (x | x << 20) & 0x00000fff00000fff;
    x = (x | x << 10) & 0x003f003f003f003f;
    x = (x | x << 5) & 0x0707070707070707;
    std::memcpy(high + i, &x, 8);
  }
}

// Calls found(i) for each nibble below n that is the escape. 16 are looked at at once: it is rare.
template <class F>
void for_each_escape(const uint8_t* nibbles, int64_t n, F&& found) {
  static_assert(kEscape == 15);
  for (int64_t i = 0; i < n; i += 16) {
    uint64_t v;
    std::memcpy(&v, nibbles + i / 2, 8);
    uint64_t hits = v & v >> 1 & v >> 2 & v >> 3 & 0x1111111111111111;
    for (; hits; hits &= hits - 1)
      if (const int64_t at = i + __builtin_ctzll(hits) / 4; at < n)
        found(at);
  }
}

// Words and escapes of a chunk until their place in the payload is known.
struct Coded {
  std::unique_ptr<uint16_t[]> words;
  std::unique_ptr<uint8_t[]> escapes;
};

template <class T>
Coded encode_chunk(const typename T::Bits* values, int64_t n, uint8_t* low, uint8_t* high,
                   Entry* entry, uint8_t* states) {
  Workspace& w = Workspace::mine();
  FEDMAP_DISPATCH(split<T>)
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
  Coded coded;
  if (entry->escapes) {
    coded.escapes.reset(new uint8_t[entry->escapes]);
    uint8_t* next = coded.escapes.get();
    for_each_escape(nibbles, n, [&](int64_t i) { *next++ = w.exponents[i]; });
  }
  const RansTable table = table_of(*entry);
  RansWriter writer(w.words + kChunk);
  if (n % kLanes)
    rans_encode_part(nibbles + n / kLanes * kStepBytes, n % kLanes, table, &writer);
  rans_encode(nibbles, n / kLanes, table, &writer);
  const int64_t words = w.words + kChunk - writer.next;
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
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const Parts parts = Parts::of<T>(n);
  if (parts.words > capacity)
    return -1;
  std::vector<Entry> entries(chunks);
  std::vector<Coded> coded(chunks);
  std::memset(out + parts.high - 3, 0, 3); // the padding of both planes, before they are written
  std::memset(out + parts.words - 3, 0, 3);
  parallel_for(chunks, threads_for(n * sizeof(Bits), threads), [&](int64_t c) {
    const int64_t i = c * kChunk;
    coded[c] = encode_chunk<T>(values + i, std::min(kChunk, n - i),
                               out + parts.low + (kHasLow<T> ? i * sizeof(typename T::Low) : 0),
                               out + parts.high + (T::kPacked ? 3 * i / 8 : i), &entries[c],
                               out + parts.states + 4 * kLanes * c);
  });
  std::memcpy(out, entries.data(), parts.states);
  int64_t words = 0, escapes = 0;
  for (const Entry& e : entries) {
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

// A payload whose sizes were found consistent.
struct Payload {
  const uint8_t* data;
  int64_t size, n, chunks;
  Parts parts;
  std::vector<Entry> entries;
  std::vector<int64_t> words, escapes; // where those of each chunk begin
};

Fault zeros(const uint8_t* data, int64_t begin, int64_t end) {
  for (; begin < end; ++begin)
    if (data[begin])
      return {"expected padding to be zero", begin};
  return {};
}

template <class T>
Fault open(const uint8_t* data, int64_t size, int64_t n, Payload* p) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  *p = {data, size, n, chunks, Parts::of<T>(n), {}, {}, {}};
  const Parts& parts = p->parts;
  if (size < parts.words)
    return {"expected directory, states and planes, got the end of the payload", size};
  p->entries.resize(chunks);
  std::memcpy(p->entries.data(), data, parts.states);
  int64_t words = 0, escapes = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const Entry& e = p->entries[c];
    const int64_t at = c * static_cast<int64_t>(sizeof(Entry));
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
       {zeros(data, parts.low + low, parts.high),
        zeros(data, parts.high + (high_bits + 7) / 8, parts.words),
        zeros(data, p->words[chunks], escaped), zeros(data, escaped + escapes, size)})
    if (fault.reason)
      return fault;
  return {};
}

int64_t size_of(const Payload& p, int64_t c) {
  return std::min(kChunk, p.n - c * kChunk);
}

// Symbols of chunks [first, last) into w->nibbles[0, 1, ..]; false when those of one do not decode.
bool decode_symbols(const Payload& p, int64_t first, int64_t last, Workspace* w) {
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

// Exponents of chunk c, from its symbols, into `w`; false when they are none.
template <class T>
bool to_exponents_of(const Payload& p, int64_t c, const uint8_t* nibbles, Workspace* w) {
  const Entry& entry = p.entries[c];
  const int64_t n = size_of(p, c);
  FEDMAP_DISPATCH(to_exponents)(nibbles, (n + 1) / 2 * 2, entry.top, w->exponents);
  // Symbols above `top` would wrap; none of them may occur.
  if (entry.top < kEscape - 1)
    for (int64_t i = 0; i < n; ++i) {
      const int s = nibbles[i / 2] >> i % 2 * 4 & 15;
      if (s > entry.top && s != kEscape)
        return false;
    }
  const uint8_t* escape = p.data + p.escapes[c];
  const uint8_t* end = escape + entry.escapes;
  bool sound = true;
  if (entry.frequency[kEscape])
    for_each_escape(nibbles, n, [&](int64_t i) {
      sound = sound && escape != end && *escape <= T::kMaxExponent;
      if (sound)
        w->exponents[i] = *escape++;
    });
  return sound && escape == end;
}

template <class T>
void join_chunk(const Payload& p, int64_t c, Workspace* w, typename T::Bits* values) {
  const int64_t i = c * kChunk, n = size_of(p, c);
  const uint8_t* high = p.data + p.parts.high + (T::kPacked ? 3 * i / 8 : i);
  if constexpr (T::kPacked) {
    unpack_threes(high, n, w->high);
    high = w->high;
  }
  const auto* low = reinterpret_cast<const typename T::Low*>(p.data + p.parts.low);
  FEDMAP_DISPATCH(join<T>)(w->exponents, kHasLow<T> ? low + i : low, high, n, values);
}

// Calls use(chunk, workspace) for every chunk once its exponents are decoded.
template <class T, class F>
Fault for_each_chunk(const uint8_t* data, int64_t size, int64_t n, int threads, F&& use) {
  Payload p;
  if (const Fault fault = open<T>(data, size, n, &p); fault.reason)
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
      return {"words or escapes that do not decode", c * static_cast<int64_t>(sizeof(Entry))};
  return {};
}

template <class F>
auto for_dtype(int dtype, F&& f) {
  return dtype == kFloat32 ? f(Float32{}) : dtype == kFloat16 ? f(Float16{}) : f(Bfloat16{});
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
                             [&](const Payload& p, int64_t c, Workspace* w) {
                               join_chunk<T>(p, c, w, values + c * kChunk);
                             });
  });
}

Fault check_values(const uint8_t* payload, int64_t size, int dtype, int64_t n, bool* finite,
                   int threads) {
  return for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    std::vector<uint8_t> odd((n + kChunk - 1) / kChunk, 0);
    const Fault fault = for_each_chunk<T>(payload, size, n, threads,
                                          [&](const Payload& p, int64_t c, Workspace* w) {
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
        payload, size, n, threads, [&](const Payload& p, int64_t c, Workspace* w) {
          auto* values = reinterpret_cast<typename T::Bits*>(w->values);
          join_chunk<T>(p, c, w, values);
          accumulate_add(acc + c * kChunk, values, dtype, weight, size_of(p, c), 1);
        });
  });
}

} // namespace fedmap
