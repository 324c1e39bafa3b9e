// The coder of the levels with AVX-512: rans.cpp includes this once in each one's target region,
// where `compress_16`, `expand_16` and `bytes_0_2` differ.
static void encode(const uint8_t* nibbles, int64_t steps, const RansTable& t, RansWriter* out) {
  const __m512i frequency = _mm512_loadu_si512(t.frequency), bias = _mm512_loadu_si512(t.bias);
  const __m512i reciprocal = _mm512_loadu_si512(t.reciprocal), shift = _mm512_loadu_si512(t.shift);
  const __m512i sum = _mm512_set1_epi32(kFrequencySum);
  const __m512i low_words = _mm512_cvtepi8_epi16(
      _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38,
                       40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62));
  __m512i x[2] = {_mm512_loadu_si512(out->x), _mm512_loadu_si512(out->x + 16)};
  uint16_t* next = out->next;
  for (int64_t i = steps; i--;) {
    const __m128i bytes =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles + kStepBytes * i));
    const __m128i even_lanes = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i odd_lanes = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    const __m512i s[2] = {_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even_lanes, odd_lanes)),
                          _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even_lanes, odd_lanes))};
    const __m512i words = _mm512_permutex2var_epi16(x[0], low_words, x[1]);
    __m512i f[2];
    __mmask16 full[2];
#pragma GCC unroll 2
    for (int z = 0; z < 2; ++z) {
      f[z] = _mm512_permutexvar_epi32(s[z], frequency);
      const __m512i high = _mm512_srli_epi32(x[z], 16);
      full[z] = _mm512_cmpge_epu32_mask(high, f[z]);
      x[z] = _mm512_mask_mov_epi32(x[z], full[z], high);
    }
#pragma GCC unroll 2
    for (int z = 0; z < 2; ++z) {
      const __m512i r = _mm512_permutexvar_epi32(s[z], reciprocal);
      const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(x[z], r), 32);
      const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x[z], 32), _mm512_srli_epi64(r, 32));
      const __m512i q = _mm512_srlv_epi32(_mm512_mask_blend_epi32(0xAAAA, even, odd),
                                          _mm512_permutexvar_epi32(s[z], shift));
      x[z] = _mm512_add_epi32(_mm512_add_epi32(x[z], _mm512_permutexvar_epi32(s[z], bias)),
                              _mm512_mullo_epi32(q, _mm512_sub_epi32(sum, f[z])));
    }
    const __mmask32 both = _mm512_kunpackw(full[1], full[0]);
    const int count = __builtin_popcount(both);
    next -= count;
    _mm512_mask_storeu_epi16(next, static_cast<__mmask32>((uint64_t{1} << count) - 1),
                             compress_16(words, both));
  }
  _mm512_storeu_si512(out->x, x[0]);
  _mm512_storeu_si512(out->x + 16, x[1]);
  out->next = next;
}

// Slots, starts and frequencies fit 16 bits, so one vector serves both halves of a step: lane i
// lies in the low half of element i, lane 16 + i in the high half.
struct Stream {
  __m512i frequency, start, start_1, start_2, start_4, start_8, start_12; // start_k[s] = start[s+k]
  __m512i x[2];
  Words words;
};

static __m512i both_halves(__m512i table) {
  const __m256i half = _mm512_cvtepi32_epi16(table);
  return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}

static Stream open_stream(const RansTable& t, const RansReader& in) {
  const __m512i start = _mm512_loadu_si512(t.start);
  return {both_halves(_mm512_loadu_si512(t.frequency)),
          both_halves(start),
          both_halves(_mm512_alignr_epi32(start, start, 1)),
          both_halves(_mm512_alignr_epi32(start, start, 2)),
          _mm512_set1_epi16(static_cast<int16_t>(t.start[4])),
          _mm512_set1_epi16(static_cast<int16_t>(t.start[8])),
          _mm512_set1_epi16(static_cast<int16_t>(t.start[12])),
          {_mm512_loadu_si512(in.x), _mm512_loadu_si512(in.x + 16)},
          Words(in)};
}

// All ones where the slot is below. A sign instead of a mask: 2 cycles before it can be used, not
// 7. A start of 2^15, where only symbols of frequency 0 follow, turns negative and is above all.
static __m512i below(__m512i slot, __m512i start) {
  return _mm512_srai_epi16(_mm512_sub_epi16(slot, start), 15);
}

static __m512i add_unless(__m512i s, __m512i less, int16_t bit) { // s | (bit & ~less)
  return _mm512_ternarylogic_epi32(s, less, _mm512_set1_epi16(bit), 0xF2);
}

// kStreams streams in lockstep, stage by stage: one alone waits for its own results (19.5 ns a step
// on Zen 4; two take 12 ns a step each, four 8.6), and what comes a whole stream later in the code
// is beyond the window in which the core finds work. Only a stream that ran out of words ends the
// loop.
template <int kStreams>
static bool decode_streams(uint8_t* const nibbles[], int64_t steps, const RansTable* const t[],
                           RansReader* const in[]) {
#define FEDMAP_EACH_STREAM _Pragma("GCC unroll 4") for (int k = 0; k < kStreams; ++k)
  Stream stream[kStreams];
  FEDMAP_EACH_STREAM
  stream[k] = open_stream(*t[k], *in[k]);
  const __m512i slots = _mm512_set1_epi16(kFrequencySum - 1), half = _mm512_set1_epi32(0xffff);
  const __m512i low = _mm512_set1_epi32(kStateLow);
  int64_t i = 0;
  for (; i < steps; ++i) {
    bool sound = true;
    FEDMAP_EACH_STREAM
    sound = sound && (stream[k].words.in_reach() || stream[k].words.move());
    if (!sound)
      break;
    __m512i slot[kStreams], less[kStreams], s[kStreams], f[kStreams], words[kStreams];
    __mmask16 empty[kStreams][2];
    FEDMAP_EACH_STREAM {
      const Stream& a = stream[k];
      words[k] = _mm512_loadu_si512(a.words.next);
      slot[k] = _mm512_and_si512(
          _mm512_mask_blend_epi16(0xAAAAAAAA, a.x[0], _mm512_slli_epi32(a.x[1], 16)), slots);
    }
    FEDMAP_EACH_STREAM
    less[k] = below(slot[k], stream[k].start_8);
    FEDMAP_EACH_STREAM {
      s[k] = _mm512_andnot_si512(less[k], _mm512_set1_epi16(8));
      less[k] = below(
          slot[k], _mm512_ternarylogic_epi32(less[k], stream[k].start_4, stream[k].start_12, 0xCA));
    }
    FEDMAP_EACH_STREAM {
      s[k] = add_unless(s[k], less[k], 4);
      less[k] = below(slot[k], _mm512_permutexvar_epi16(s[k], stream[k].start_2));
    }
    FEDMAP_EACH_STREAM {
      s[k] = add_unless(s[k], less[k], 2);
      less[k] = below(slot[k], _mm512_permutexvar_epi16(s[k], stream[k].start_1));
    }
    FEDMAP_EACH_STREAM {
      s[k] = add_unless(s[k], less[k], 1);
      f[k] = _mm512_permutexvar_epi16(s[k], stream[k].frequency);
      slot[k] = _mm512_sub_epi16(slot[k], _mm512_permutexvar_epi16(s[k], stream[k].start));
    }
    FEDMAP_EACH_STREAM {
      __m512i* const x = stream[k].x;
      x[0] = _mm512_add_epi32(
          _mm512_mullo_epi32(_mm512_and_si512(f[k], half), _mm512_srli_epi32(x[0], kFrequencyBits)),
          _mm512_and_si512(slot[k], half));
      x[1] = _mm512_add_epi32(
          _mm512_mullo_epi32(_mm512_srli_epi32(f[k], 16), _mm512_srli_epi32(x[1], kFrequencyBits)),
          _mm512_srli_epi32(slot[k], 16));
    }
    FEDMAP_EACH_STREAM {
      empty[k][0] = _mm512_cmplt_epu32_mask(stream[k].x[0], low);
      empty[k][1] = _mm512_cmplt_epu32_mask(stream[k].x[1], low);
      const __mmask32 both = _mm512_kunpackw(empty[k][1], empty[k][0]);
      words[k] = expand_16(words[k], both, words[k]);
      stream[k].words.next += __builtin_popcount(both);
    }
    FEDMAP_EACH_STREAM {
      const __m512i pairs = _mm512_or_si512(s[k], _mm512_srli_epi64(s[k], 28));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(nibbles[k] + kStepBytes * i), bytes_0_2(pairs));
    }
    FEDMAP_EACH_STREAM {
      __m512i* const x = stream[k].x;
      const __m256i parts[2] = {_mm512_castsi512_si256(words[k]),
                                _mm512_extracti64x4_epi64(words[k], 1)};
#pragma GCC unroll 2
      for (int z = 0; z < 2; ++z)
        x[z] = _mm512_mask_or_epi32(x[z], empty[k][z], _mm512_slli_epi32(x[z], 16),
                                    _mm512_cvtepu16_epi32(parts[z]));
    }
  }
  bool sound = true;
  FEDMAP_EACH_STREAM {
    _mm512_storeu_si512(in[k]->x, stream[k].x[0]);
    _mm512_storeu_si512(in[k]->x + 16, stream[k].x[1]);
    in[k]->next = stream[k].words.place();
    sound = sound && in[k]->next <= in[k]->end;
  }
  return sound && i == steps;
#undef FEDMAP_EACH_STREAM
}

static bool decode(int streams, uint8_t* const nibbles[], int64_t steps, const RansTable* const t[],
                   RansReader* const in[]) {
  static_assert(kMaxStreams == 4, "one form for each number of streams");
  constexpr decltype(&decode_streams<1>) forms[] = {&decode_streams<1>, &decode_streams<2>,
                                                    &decode_streams<3>, &decode_streams<4>};
  return forms[streams - 1](nibbles, steps, t, in);
}
