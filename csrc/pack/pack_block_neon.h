// The `neon` level: pack_block.h includes this beside its other levels.
#pragma once

namespace neon {
using scalar::sparse_limit;

// Below one survivor in 5 they are moved one by one, by 5 instructions each; else 8 elements are
// shuffled at once, by 9.
constexpr int64_t kOneByOne = 5;

inline int64_t count_block(const uint32_t* words, int64_t n) {
  uint8x16_t counts = vdupq_n_u8(0); // of 16 vectors at most: a block has no more
  int64_t i = 0;
  const auto add = [&] {
    counts = vaddq_u8(counts, vcntq_u8(vreinterpretq_u8_u32(vld1q_u32(words + i / 32))));
    i += 128;
  };
  for (; i + 512 <= n;) {
    add();
    add();
    add();
    add();
  }
  while (i + 128 <= n)
    add();
  return vaddlvq_u8(counts) + (i < n ? scalar::count_block(words + i / 32, n - i) : 0);
}

// What a call costs is shared by 2048 elements instead of 512.
inline int64_t next_chunk(const uint32_t* words, int64_t n) {
  const int64_t more = n < kBlock ? n : kBlock;
  return more > kChunk && count_block(words, more) > kChunk ? kChunk : more;
}

inline int64_t find_block(const uint32_t* words, int64_t n, uint16_t* places) {
  uint16_t* next = places;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for_each_set(reversed(load_64(words + i / 32)),
                 [&](int place) { *next++ = static_cast<uint16_t>(i + place); });
  for (; i < n; i += 32)
    for (uint32_t word = words[i / 32] & low_bits(n - i); word; word &= word - 1)
      *next++ = static_cast<uint16_t>(i + __builtin_ctz(word));
  return next - places;
}

// 8 elements by a row of kShuffles. All 8 are stored: what follows packed survivors is of no use.
template <class T>
inline void shuffle_8(const T* src, const uint8_t* row, T* dst) {
  const auto* from = reinterpret_cast<const uint8_t*>(src);
  auto* to = reinterpret_cast<uint8_t*>(dst);
  if constexpr (sizeof(T) == 4) {
    const uint8x16x2_t values = vld1q_u8_x2(from), places = vld1q_u8_x2(row);
    vst1q_u8_x2(to, {{vqtbl2q_u8(values, places.val[0]), vqtbl2q_u8(values, places.val[1])}});
  } else {
    vst1q_u8(to, vqtbl1q_u8(vld1q_u8(from), vld1q_u8(row)));
  }
}

// Moves the survivors of 64 elements of kArrays arrays, two at once, which shares the store.
template <int kArrays, class T>
inline void pack_64(const T* const (&src)[kArrays], uint64_t word, T* (&out)[kArrays]) {
  constexpr uint64_t kFirst = uint64_t{1} << 63;
  uint64_t left = reversed(word);
  while (left) {
    const uint64_t first = static_cast<uint64_t>(__builtin_clzll(left));
    left &= ~(kFirst >> first);
    if (!left) {
      for (int k = 0; k < kArrays; ++k)
        *out[k]++ = src[k][first];
      return;
    }
    const uint64_t second = static_cast<uint64_t>(__builtin_clzll(left));
    left &= ~(kFirst >> second);
    for (int k = 0; k < kArrays; ++k) {
      const T one = src[k][first], other = src[k][second];
      out[k][0] = one;
      out[k][1] = other;
      out[k] += 2;
    }
  }
}

template <int kArrays, class T>
inline int64_t pack_arrays(const T* const (&arrays)[kArrays], const uint32_t* words, int64_t n,
                           T* const (&outs)[kArrays]) {
  const T* src[kArrays];
  T* out[kArrays];
  for (int k = 0; k < kArrays; ++k) {
    src[k] = arrays[k];
    out[k] = outs[k];
  }
  const T* end = src[0] + n / 64 * 64;
  // What next_chunk made longer was counted there.
  const bool dense = n <= kChunk && count_block(words, n) * kOneByOne >= n;
  while (src[0] != end) {
    const uint64_t word = load_64(words);
    if (dense) {
      const uint64_t counts = counts_before(word);
      for (int bit = 0; bit < 64; bit += 8)
        for (int k = 0; k < kArrays; ++k)
          shuffle_8(src[k] + bit, kShuffles<sizeof(T)>.pack[word >> bit & 0xff],
                    out[k] + (counts << 8 >> bit & 0xff));
      for (int k = 0; k < kArrays; ++k)
        out[k] += counts >> 56;
    } else {
      pack_64<kArrays>(src, word, out);
    }
    for (int k = 0; k < kArrays; ++k)
      src[k] += 64;
    words += 2;
  }
  const int64_t at = out[0] - outs[0];
  for (int k = 1; k < kArrays; ++k)
    scalar::pack_from(0, at, src[k], words, n % 64, outs[k]);
  return scalar::pack_from(0, at, src[0], words, n % 64, outs[0]);
}

template <class T>
int64_t pack_block(const T* src, const uint32_t* words, int64_t n, T* out) {
  return pack_arrays<1>({src}, words, n, {out});
}

template <class T>
int64_t pack_both(const T* a, const T* b, const uint32_t* words, int64_t n, T* a_out, T* b_out) {
  return pack_arrays<2>({a, b}, words, n, {a_out, b_out});
}

template <class T>
inline const T* spread_64(const T* packed, uint64_t word, T* dst) {
  for_each_set(reversed(word), [&](int place) { dst[place] = *packed++; });
  return packed;
}

template <class T>
void unpack_block(const T* packed, const uint32_t* words, int64_t n, T* dst) {
  int64_t i = 0;
  if (count_block(words, n) * kOneByOne < n) {
    for (; i + 64 <= n; i += 64) {
      std::memset(static_cast<void*>(dst + i), 0, 64 * sizeof(T));
      packed = spread_64(packed, load_64(words + i / 32), dst + i);
    }
  } else {
    for (; i + 64 <= n; i += 64) {
      const uint64_t word = load_64(words + i / 32), counts = counts_before(word);
      for (int bit = 0; bit < 64; bit += 8)
        shuffle_8(packed + (counts << 8 >> bit & 0xff),
                  kShuffles<sizeof(T)>.unpack[word >> bit & 0xff], dst + i + bit);
      packed += counts >> 56;
    }
  }
  scalar::unpack_block(packed, words + i / 32, n - i, dst + i);
}

} // namespace neon
