// How float values are cut into exponents, which are coded, and planes of signs and mantissas,
// which are stored as they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/cpu.h"
#include "entropy/rans.h"

namespace fedmap {

constexpr int kEscape = kSymbols - 1;

inline int64_t padded(int64_t bytes) {
  return (bytes + 3) / 4 * 4;
}

// How a dtype splits into an exponent, a low plane and a high plane.
struct Float32Planes {
  using Bits = uint32_t;
  using Low = uint16_t;
  static constexpr int kMaxExponent = 255;
  static constexpr bool kPacked = false; // the high plane: 8 bits per value, else 3
  static uint8_t exponent(Bits v) { return static_cast<uint8_t>(v >> 23); }
  static Low low(Bits v) { return static_cast<Low>(v); }
  static uint8_t high(Bits v) { return static_cast<uint8_t>((v >> 24 & 0x80) | (v >> 16 & 0x7f)); }
  static Bits join(uint8_t e, Low low, uint8_t high) {
    return (high & 0x80u) << 24 | uint32_t{e} << 23 | (high & 0x7fu) << 16 | low;
  }
  static int64_t low_bytes(int64_t n) { return padded(2 * n); }
  static int64_t high_bytes(int64_t n) { return padded(n); }
};

struct Bfloat16Planes {
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

struct Float16Planes {
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
constexpr bool kHasLow = !std::is_same_v<T, Bfloat16Planes>;

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
  inline void split_planes(const typename T::Bits* values, int64_t n, uint8_t* exponents,          \
                           typename T::Low* low, uint8_t* high) {                                  \
    split_loop<T>(values, n, exponents, low, high);                                                \
  }                                                                                                \
  template <class T>                                                                               \
  inline void join_planes(const uint8_t* exponents, const typename T::Low* low,                    \
                          const uint8_t* high, int64_t n, typename T::Bits* values) {              \
    join_loop<T>(exponents, low, high, n, values);                                                 \
  }                                                                                                \
  inline void to_nibbles(const uint8_t* exponents, int64_t n, uint8_t top, uint8_t* nibbles) {     \
    nibbles_loop(exponents, n, top, nibbles);                                                      \
  }                                                                                                \
  inline void to_exponents(const uint8_t* nibbles, int64_t n, uint8_t top, uint8_t* exponents) {   \
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
FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {
FEDMAP_LOOPS
} // namespace avx512_core
FEDMAP_TARGET_END
#elif FEDMAP_ARM64
namespace neon {
FEDMAP_LOOPS
} // namespace neon
#endif
#undef FEDMAP_LOOPS

// The 3-bit plane, 8 values to 24 bits at a time; `high` holds a value a byte and is padded to 8.
inline void pack_threes(const uint8_t* high, int64_t n, uint8_t* out) {
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

inline void unpack_threes(const uint8_t* in, int64_t n, uint8_t* high) {
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

} // namespace fedmap
