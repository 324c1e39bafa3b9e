// Unpacking of whole buffers in the levels with AVX-512: pack.cpp includes this once in each one's
// target region, where `unpack_vector` differs.
template <class T, bool kStream>
void expand_block(const T* packed, const uint32_t* words, int64_t n, T* dst) {
  constexpr int kLanes = 64 / sizeof(T);
  const __m512i zero = opaque_zero();
  const int64_t whole = n / 32 * 32, ahead = write_ahead();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const uint32_t bits = kLanes == 32 ? words[i / 32] : words[i / 32] >> (i & 31) & 0xffff;
    if constexpr (kStream) {
      alignas(64) T line[kLanes];
      packed = unpack_vector(packed, bits, line, zero);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), _mm512_load_si512(line));
    } else {
      ask(dst + i, ahead);
      packed = unpack_vector(packed, bits, dst + i, zero);
    }
  }
  scalar::expand_block<T, false>(packed, words + whole / 32, n - whole, dst + whole);
}
