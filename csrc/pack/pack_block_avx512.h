// Packing and unpacking of the levels with AVX-512: pack_block.h includes this once in each one's
// target region, where `compress_16`, `expand_16` and `pack_64` of 16 bits differ.

// Zen 4 and 5: the zero-masked forms of compress and expand wait for their destination's old
// value, and the forms that go to or from memory are microcoded. Merging into a register runs at
// full speed; the empty asm keeps the compiler from seeing that this one is zero.
inline __m512i opaque_zero() {
  __m512i zero = _mm512_setzero_si512();
  __asm__("" : "+v"(zero));
  return zero;
}

// A vector's survivors from lane 0 on; what follows them is of no use.
template <class T>
inline __m512i compress(const T* src, uint32_t bits) {
  const __m512i v = _mm512_loadu_si512(src);
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_compress_epi32(v, static_cast<__mmask16>(bits), v);
  else
    return compress_16(v, bits);
}

// `first` up to lane `count`, then `second` from its lane 0 on.
template <class T>
inline __m512i join(__m512i first, int64_t count, __m512i second) {
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_expand_epi32(first, static_cast<__mmask16>(~uint64_t{0} << count), second);
  else
    return join_16(first, count, second);
}

template <class T>
inline const T* unpack_vector(const T* packed, uint32_t bits, T* dst, __m512i zero) {
  const __m512i v = _mm512_loadu_si512(packed);
  if constexpr (sizeof(T) == 4)
    _mm512_storeu_si512(dst, _mm512_mask_expand_epi32(zero, static_cast<__mmask16>(bits), v));
  else
    _mm512_storeu_si512(dst, expand_16(zero, bits, v));
  return packed + _mm_popcnt_u32(bits);
}

// The survivors of 64 elements, from out[0] on. They are joined where one vector holds them: stores
// that overlap cost more. For 16 float32 within L1 of Zen 4, at densities .05, .1,
// .2: 4.0, 3.7, 3.7 cycles, not 7.6, 5.9, 4.4.
template <class T>
inline void pack_64(const T* src, uint64_t word, T* out) {
  constexpr int64_t kLanes = 64 / sizeof(T);
  constexpr uint64_t kMask = (uint64_t{1} << kLanes) - 1;
  const bool joins = _mm_popcnt_u64(word) <= kLanes;
  __m512i joined = compress(src, word & kMask);
  int64_t held = _mm_popcnt_u64(word & kMask);
  if (!joins)
    _mm512_storeu_si512(out, joined);
  for (int64_t lane = kLanes; lane < 64; lane += kLanes) {
    const uint32_t bits = word >> lane & kMask;
    const __m512i next = compress(src + lane, bits);
    if (joins)
      joined = join<T>(joined, held, next);
    else
      _mm512_storeu_si512(out + held, next);
    held += _mm_popcnt_u32(bits);
  }
  if (joins)
    _mm512_storeu_si512(out, joined);
}

template <class T, bool kAhead>
int64_t pack_block_as(const T* src, const uint32_t* words, int64_t n, T* out, int64_t ahead) {
  int64_t i = 0, at = 0;
  for (; i + 64 <= n; i += 64) {
    if constexpr (kAhead)
      fetch_lines(reinterpret_cast<const char*>(src + i) + ahead, 64 * sizeof(T));
    uint64_t word;
    std::memcpy(&word, words + i / 32, sizeof word);
    pack_64(src + i, word, out + at);
    at += _mm_popcnt_u64(word);
  }
  return scalar::pack_from(i, at, src, words, n, out);
}

template <class T>
int64_t pack_block(const T* src, const uint32_t* words, int64_t n, T* out) {
  const int64_t ahead = read_ahead();
  return ahead ? pack_block_as<T, true>(src, words, n, out, ahead)
               : pack_block_as<T, false>(src, words, n, out, 0);
}

template <class T>
int64_t pack_both(const T* a, const T* b, const uint32_t* words, int64_t n, T* a_out, T* b_out) {
  pack_block(a, words, n, a_out);
  return pack_block(b, words, n, b_out);
}

template <class T>
void unpack_block(const T* packed, const uint32_t* words, int64_t n, T* dst) {
  constexpr int kLanes = 64 / sizeof(T);
  const __m512i zero = opaque_zero();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const uint32_t word = words[i / 32];
    for (int lane = 0; lane < 32; lane += kLanes)
      packed =
          unpack_vector(packed, kLanes == 32 ? word : word >> lane & 0xffff, dst + i + lane, zero);
  }
  scalar::unpack_block(packed, words + i / 32, n - i, dst + i);
}
