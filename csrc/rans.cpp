#include "rans.h"

#include <cstring>

#include "cpu.h"

namespace fedmap {

void finish_table(RansTable* t) {
  uint32_t start = 0;
  for (int s = 0; s < kSymbols; ++s) {
    const uint32_t f = t->frequency[s];
    t->start[s] = start;
    start += f;
    // x / f as mulhi(x, reciprocal) >> shift, exact for x < 2^31; for f = 1, mulhi gives x - 1, and
    // the bias makes up for it.
    t->shift[s] = 0;
    t->reciprocal[s] = ~0u;
    t->bias[s] = t->start[s];
    if (f >= 2) {
      while (f > 1u << t->shift[s])
        ++t->shift[s];
      t->reciprocal[s] = static_cast<uint32_t>(((uint64_t{1} << (t->shift[s] + 31)) + f - 1) / f);
      --t->shift[s];
    } else {
      t->bias[s] += kFrequencySum - 1;
    }
  }
}

bool RansReader::finished() const {
  for (uint32_t lane : x)
    if (lane != kStateLow)
      return false;
  return next == end;
}

void rans_encode_part(const uint8_t* nibbles, int lanes, const RansTable& t, RansWriter* out) {
  for (int lane = lanes - 1; lane >= 0; --lane) {
    const int s = nibbles[lane / 2] >> lane % 2 * 4 & 15;
    uint32_t x = out->x[lane];
    if (x >= t.frequency[s] << 16) {
      *--out->next = static_cast<uint16_t>(x);
      x >>= 16;
    }
    const uint32_t q = static_cast<uint32_t>(uint64_t{x} * t.reciprocal[s] >> 32) >> t.shift[s];
    out->x[lane] = x + t.bias[s] + q * (kFrequencySum - t.frequency[s]);
  }
}

bool rans_decode_part(uint8_t* nibbles, int lanes, const RansTable& t, RansReader* in) {
  std::memset(nibbles, 0, kStepBytes);
  for (int lane = 0; lane < lanes; ++lane) {
    uint32_t x = in->x[lane];
    const uint32_t slot = x & (kFrequencySum - 1);
    // The last symbol that starts at or before the slot: one of frequency 0 never is.
    int s = 0;
    for (int half = 8; half; half /= 2)
      if (slot >= t.start[s + half])
        s += half;
    x = t.frequency[s] * (x >> kFrequencyBits) + slot - t.start[s];
    if (x < kStateLow) {
      if (in->next >= in->end)
        return false;
      x = x << 16 | *in->next++;
    }
    in->x[lane] = x;
    nibbles[lane / 2] |= static_cast<uint8_t>(s << lane % 2 * 4);
  }
  return true;
}

namespace scalar {

static void encode(const uint8_t* nibbles, int64_t steps, const RansTable& t, RansWriter* out) {
  while (steps--)
    rans_encode_part(nibbles + kStepBytes * steps, kLanes, t, out);
}

static bool decode_from(int64_t i, uint8_t* nibbles, int64_t steps, const RansTable& t,
                        RansReader* in) {
  for (; i < steps; ++i)
    if (!rans_decode_part(nibbles + kStepBytes * i, kLanes, t, in))
      return false;
  return true;
}

static bool decode(uint8_t* nibbles, int64_t steps, const RansTable& t, RansReader* in) {
  return decode_from(0, nibbles, steps, t, in);
}

static bool decode_two(uint8_t* const nibbles[2], int64_t steps, const RansTable* const t[2],
                       RansReader* const in[2]) {
  return decode(nibbles[0], steps, *t[0], in[0]) && decode(nibbles[1], steps, *t[1], in[1]);
}

} // namespace scalar

#if FEDMAP_X86
// AVX2 has no look-up of 32-bit entries in a table of 16: the scalar form serves it.
namespace avx2 = scalar;

FEDMAP_TARGET_AVX512
namespace avx512 {

static void encode(const uint8_t* nibbles, int64_t steps, const RansTable& t, RansWriter* out) {
  const __m512i frequency = _mm512_loadu_si512(t.frequency), bias = _mm512_loadu_si512(t.bias);
  const __m512i reciprocal = _mm512_loadu_si512(t.reciprocal), shift = _mm512_loadu_si512(t.shift);
  const __m512i rest = _mm512_sub_epi32(_mm512_set1_epi32(kFrequencySum), frequency);
  __m512i x[2] = {_mm512_loadu_si512(out->x), _mm512_loadu_si512(out->x + 16)};
  uint16_t* next = out->next;
  for (int64_t i = steps; i--;) {
    const __m128i bytes =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles + kStepBytes * i));
    const __m128i even_lanes = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i odd_lanes = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    const __m128i symbols[2] = {_mm_unpacklo_epi8(even_lanes, odd_lanes),
                                _mm_unpackhi_epi8(even_lanes, odd_lanes)};
#pragma GCC unroll 2
    for (int z = 1; z >= 0; --z) {
      const __m512i s = _mm512_cvtepu8_epi32(symbols[z]);
      const __m512i f = _mm512_permutexvar_epi32(s, frequency);
      const __mmask16 full = _mm512_cmpge_epu32_mask(x[z], _mm512_slli_epi32(f, 16));
      const int words = __builtin_popcount(full);
      next -= words;
      _mm256_mask_storeu_epi16(next, static_cast<__mmask16>((1u << words) - 1),
                               _mm512_cvtepi32_epi16(_mm512_mask_compress_epi32(x[z], full, x[z])));
      x[z] = _mm512_mask_srli_epi32(x[z], full, x[z], 16);
      const __m512i r = _mm512_permutexvar_epi32(s, reciprocal);
      const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(x[z], r), 32);
      const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x[z], 32), _mm512_srli_epi64(r, 32));
      const __m512i q = _mm512_srlv_epi32(_mm512_mask_blend_epi32(0xAAAA, even, odd),
                                          _mm512_permutexvar_epi32(s, shift));
      x[z] = _mm512_add_epi32(_mm512_add_epi32(x[z], _mm512_permutexvar_epi32(s, bias)),
                              _mm512_mullo_epi32(q, _mm512_permutexvar_epi32(s, rest)));
    }
  }
  _mm512_storeu_si512(out->x, x[0]);
  _mm512_storeu_si512(out->x + 16, x[1]);
  out->next = next;
}

// kStreams streams in lockstep. Memory is read up to 32 words past `next`, so the fast loop keeps
// that far from `limit` and the scalar form ends the stream.
template <int kStreams>
static bool decode_streams(uint8_t* const nibbles[], int64_t steps, const RansTable* const t[],
                           RansReader* const in[]) {
  constexpr int kVectors = 2 * kStreams;
  // The search over starts takes four halvings; the first two need no permutation.
  __m512i frequency[kStreams], start[kStreams], next2[kStreams], next1[kStreams];
  __m512i at4[kStreams], at8[kStreams], at12[kStreams];
  __m512i x[kVectors];
  const uint16_t* next[kStreams];
  const uint16_t* limit[kStreams];
#pragma GCC unroll 2
  for (int k = 0; k < kStreams; ++k) {
    frequency[k] = _mm512_loadu_si512(t[k]->frequency);
    start[k] = _mm512_loadu_si512(t[k]->start);
    next1[k] = _mm512_alignr_epi32(start[k], start[k], 1);
    next2[k] = _mm512_alignr_epi32(start[k], start[k], 2);
    at4[k] = _mm512_set1_epi32(t[k]->start[4]);
    at8[k] = _mm512_set1_epi32(t[k]->start[8]);
    at12[k] = _mm512_set1_epi32(t[k]->start[12]);
    x[2 * k] = _mm512_loadu_si512(in[k]->x);
    x[2 * k + 1] = _mm512_loadu_si512(in[k]->x + 16);
    next[k] = in[k]->next;
    limit[k] = in[k]->limit;
  }
  const __m512i slots = _mm512_set1_epi32(kFrequencySum - 1);
  const __m512i low = _mm512_set1_epi32(kStateLow);
  int64_t i = 0;
  for (; i < steps; ++i) {
    bool near = false;
#pragma GCC unroll 2
    for (int k = 0; k < kStreams; ++k)
      near |= limit[k] - next[k] < kLanes;
    if (near)
      break;
    __m128i symbols[kVectors];
#pragma GCC unroll 4
    for (int z = 0; z < kVectors; ++z) {
      const int k = z / 2;
      const __m512i slot = _mm512_and_si512(x[z], slots);
      const __mmask16 m8 = _mm512_cmpge_epu32_mask(slot, at8[k]);
      __m512i s = _mm512_maskz_set1_epi32(m8, 8);
      const __mmask16 m4 =
          _mm512_cmpge_epu32_mask(slot, _mm512_mask_mov_epi32(at4[k], m8, at12[k]));
      s = _mm512_mask_add_epi32(s, m4, s, _mm512_set1_epi32(4));
      const __mmask16 m2 = _mm512_cmpge_epu32_mask(slot, _mm512_permutexvar_epi32(s, next2[k]));
      s = _mm512_mask_add_epi32(s, m2, s, _mm512_set1_epi32(2));
      const __mmask16 m1 = _mm512_cmpge_epu32_mask(slot, _mm512_permutexvar_epi32(s, next1[k]));
      s = _mm512_mask_add_epi32(s, m1, s, _mm512_set1_epi32(1));
      const __m512i f = _mm512_permutexvar_epi32(s, frequency[k]);
      const __m512i offset = _mm512_sub_epi32(slot, _mm512_permutexvar_epi32(s, start[k]));
      x[z] =
          _mm512_add_epi32(_mm512_mullo_epi32(f, _mm512_srli_epi32(x[z], kFrequencyBits)), offset);
      const __mmask16 empty = _mm512_cmplt_epu32_mask(x[z], low);
      const __m512i words =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(next[k])));
      x[z] = _mm512_mask_or_epi32(x[z], empty, _mm512_slli_epi32(x[z], 16),
                                  _mm512_mask_expand_epi32(words, empty, words));
      next[k] += __builtin_popcount(empty);
      symbols[z] = _mm512_cvtepi32_epi8(s);
    }
#pragma GCC unroll 2
    for (int k = 0; k < kStreams; ++k) {
      const __m256i both = _mm256_set_m128i(symbols[2 * k + 1], symbols[2 * k]);
      const __m256i pairs = _mm256_maddubs_epi16(both, _mm256_set1_epi16(0x1001));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(nibbles[k] + kStepBytes * i),
                       _mm256_cvtepi16_epi8(pairs));
    }
  }
  bool sound = true;
  for (int k = 0; k < kStreams; ++k) {
    _mm512_storeu_si512(in[k]->x, x[2 * k]);
    _mm512_storeu_si512(in[k]->x + 16, x[2 * k + 1]);
    in[k]->next = next[k];
    sound = sound && scalar::decode_from(i, nibbles[k], steps, *t[k], in[k]);
  }
  return sound;
}

static bool decode(uint8_t* nibbles, int64_t steps, const RansTable& t, RansReader* in) {
  const RansTable* table = &t;
  return decode_streams<1>(&nibbles, steps, &table, &in);
}

static bool decode_two(uint8_t* const nibbles[2], int64_t steps, const RansTable* const t[2],
                       RansReader* const in[2]) {
  return decode_streams<2>(nibbles, steps, t, in);
}

} // namespace avx512
FEDMAP_TARGET_END
#endif

void rans_encode(const uint8_t* nibbles, int64_t steps, const RansTable& table, RansWriter* out) {
  FEDMAP_DISPATCH(encode)(nibbles, steps, table, out);
}

bool rans_decode(uint8_t* nibbles, int64_t steps, const RansTable& table, RansReader* in) {
  return FEDMAP_DISPATCH(decode)(nibbles, steps, table, in);
}

bool rans_decode_two(uint8_t* const nibbles[2], int64_t steps, const RansTable* const table[2],
                     RansReader* const in[2]) {
  return FEDMAP_DISPATCH(decode_two)(nibbles, steps, table, in);
}

} // namespace fedmap
