// The `neon` level of rANS: rans.cpp includes this beside its other levels. 8 lanes at once: what a
// table has of 16 bits for each of 16 symbols is one look-up in two registers.
namespace neon {

static uint8x16x2_t table_of(const uint32_t (&entries)[kSymbols]) {
  const auto narrowed = [&](int k) {
    return vreinterpretq_u8_u16(
        vcombine_u16(vmovn_u32(vld1q_u32(entries + k)), vmovn_u32(vld1q_u32(entries + k + 4))));
  };
  return {{narrowed(0), narrowed(8)}};
}

// Places of the two bytes of entry s + k.
static uint8x16_t places_of(uint16x8_t s, uint16_t k) {
  const uint16x8_t first = vdupq_n_u16(static_cast<uint16_t>(0x0202 * k + 0x0100));
  return vreinterpretq_u8_u16(vmlaq_n_u16(first, s, 0x0202));
}

static uint16x8_t look_up(uint8x16x2_t table, uint8x16_t places) {
  return vreinterpretq_u16_u8(vqtbl2q_u8(table, places));
}

// The low 8 bits say which of 8 lanes hold all ones, those above how many do.
static uint32_t lanes_of(uint16x8_t lanes) {
  static constexpr uint16_t kBits[8] = {0x101, 0x102, 0x104, 0x108, 0x110, 0x120, 0x140, 0x180};
  return vaddvq_u16(vandq_u16(lanes, vld1q_u16(kBits)));
}

static uint16x8_t high_halves(uint32x4_t a, uint32x4_t b) {
  return vuzp2q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
}
static uint16x8_t low_halves(uint32x4_t a, uint32x4_t b) {
  return vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
}

class Encoder {
 public:
  explicit Encoder(const RansTable& t)
      : frequency_(table_of(t.frequency)), shift_(table_of(t.shift)), bias_(table_of(t.bias)) {
    uint32_t rest[kSymbols];
    for (int s = 0; s < kSymbols; ++s)
      rest[s] = kFrequencySum - t.frequency[s];
    rest_ = table_of(rest);
    for (int k = 0; k < 4; ++k)
      reciprocal_.val[k] = vreinterpretq_u8_u32(vld1q_u32(t.reciprocal + 4 * k));
  }

  // Codes one symbol in each of 8 lanes; their words go to `out` in order. Returns how many.
  int64_t code(uint8x8_t symbols, uint32x4_t (&x)[2], uint16_t* out) const {
    const uint16x8_t s = vmovl_u8(symbols);
    const uint8x16_t at = places_of(s, 0);
    const uint16x8_t full = vcgeq_u16(high_halves(x[0], x[1]), look_up(frequency_, at));
    const uint32_t lanes = lanes_of(full);
    const uint8x16_t words = vreinterpretq_u8_u16(low_halves(x[0], x[1]));
    vst1q_u8(reinterpret_cast<uint8_t*>(out),
             vqtbl1q_u8(words, vld1q_u8(kShuffles<2>.pack[lanes & 0xff])));
    const uint16x8_t shift = look_up(shift_, at), bias = look_up(bias_, at);
    const uint16x8_t rest = look_up(rest_, at);
    const int16x8_t full_lanes = vreinterpretq_s16_u16(full);
    const int16x8_t down = vnegq_s16(vreinterpretq_s16_u16(shift));
    x[0] = code_4(vget_low_u16(s), vmovl_s16(vget_low_s16(full_lanes)),
                  vmovl_s16(vget_low_s16(down)), vget_low_u16(bias), vget_low_u16(rest), x[0]);
    x[1] = code_4(vget_high_u16(s), vmovl_high_s16(full_lanes), vmovl_high_s16(down),
                  vget_high_u16(bias), vget_high_u16(rest), x[1]);
    return lanes >> 8;
  }

 private:
  uint32x4_t code_4(uint16x4_t s, int32x4_t full, int32x4_t down, uint16x4_t bias, uint16x4_t rest,
                    uint32x4_t x) const {
    const uint32x4_t at = vmlaq_n_u32(vdupq_n_u32(0x03020100), vmovl_u16(s), 0x04040404);
    const uint32x4_t r = vreinterpretq_u32_u8(vqtbl4q_u8(reciprocal_, vreinterpretq_u8_u32(at)));
    x = vbslq_u32(vreinterpretq_u32_s32(full), vshrq_n_u32(x, 16), x);
    const uint64x2_t low = vmull_u32(vget_low_u32(x), vget_low_u32(r));
    const uint32x4_t q =
        vuzp2q_u32(vreinterpretq_u32_u64(low), vreinterpretq_u32_u64(vmull_high_u32(x, r)));
    return vmlaq_u32(vaddw_u16(x, bias), vshlq_u32(q, down), vmovl_u16(rest));
  }

  uint8x16x2_t frequency_, shift_, bias_, rest_; // `rest`: 2^15 less the frequency
  uint8x16x4_t reciprocal_;
};

static void encode(const uint8_t* nibbles, int64_t steps, const RansTable& t, RansWriter* out) {
  const Encoder encoder(t);
  uint32x4_t x[4][2];
  for (int g = 0; g < 4; ++g)
    for (int h = 0; h < 2; ++h)
      x[g][h] = vld1q_u32(out->x + 8 * g + 4 * h);
  uint16_t* next = out->next;
  for (int64_t i = steps; i--;) {
    const uint8x16_t bytes = vld1q_u8(nibbles + kStepBytes * i);
    const uint8x16_t even = vandq_u8(bytes, vdupq_n_u8(15)), odd = vshrq_n_u8(bytes, 4);
    const uint8x16_t first = vzip1q_u8(even, odd), second = vzip2q_u8(even, odd);
    uint16_t words[kLanes + 8];
    int64_t count = encoder.code(vget_low_u8(first), x[0], words);
    count += encoder.code(vget_high_u8(first), x[1], words + count);
    count += encoder.code(vget_low_u8(second), x[2], words + count);
    count += encoder.code(vget_high_u8(second), x[3], words + count);
    // Exactly these: below `next` may be another's memory, above it are the steps that follow.
    next -= count;
    int64_t k = 0;
    for (; k + 4 <= count; k += 4)
      vst1_u16(next + k, vld1_u16(words + k));
    for (; k < count; ++k)
      next[k] = words[k];
  }
  for (int g = 0; g < 4; ++g)
    for (int h = 0; h < 2; ++h)
      vst1q_u32(out->x + 8 * g + 4 * h, x[g][h]);
  out->next = next;
}

class Decoder {
 public:
  explicit Decoder(const RansTable& t)
      : frequency_(table_of(t.frequency)), start_(table_of(t.start)), start_4_(start_at(t, 4)),
        start_8_(start_at(t, 8)), start_12_(start_at(t, 12)) {}

  // Decodes one symbol in each of 8 lanes, with as many of the words as they want. Returns the
  // symbols, the even lanes' in bits 0 to 3 of 32-bit elements and the odd lanes' in bits 4 to 7.
  uint32x4_t decode(uint32x4_t (&x)[2], const uint16_t*& words) const {
    const uint16x8_t slot = vandq_u16(low_halves(x[0], x[1]), vdupq_n_u16(kFrequencySum - 1));
    // The last symbol that starts at or before the slot, by halves.
    uint16x8_t from = vcgeq_u16(slot, start_8_);
    uint16x8_t s = vandq_u16(from, vdupq_n_u16(8));
    from = vcgeq_u16(slot, vbslq_u16(from, start_12_, start_4_));
    s = vorrq_u16(s, vandq_u16(from, vdupq_n_u16(4)));
    from = vcgeq_u16(slot, look_up(start_, places_of(s, 2)));
    s = vorrq_u16(s, vandq_u16(from, vdupq_n_u16(2)));
    from = vcgeq_u16(slot, look_up(start_, places_of(s, 1)));
    s = vsubq_u16(s, from); // which adds 1
    const uint8x16_t at = places_of(s, 0);
    const uint16x8_t f = look_up(frequency_, at), rest = vsubq_u16(slot, look_up(start_, at));
    const uint16x8_t high =
        vshrn_high_n_u32(vshrn_n_u32(x[0], kFrequencyBits), x[1], kFrequencyBits);
    x[0] = vmlal_u16(vmovl_u16(vget_low_u16(rest)), vget_low_u16(f), vget_low_u16(high));
    x[1] = vmlal_high_u16(vmovl_high_u16(rest), f, high);
    const uint32x4_t empty[2] = {vcltq_u32(x[0], vdupq_n_u32(kStateLow)),
                                 vcltq_u32(x[1], vdupq_n_u32(kStateLow))};
    const uint32_t lanes = lanes_of(low_halves(empty[0], empty[1]));
    const uint8x16_t read = vld1q_u8(reinterpret_cast<const uint8_t*>(words));
    const uint16x8_t spread =
        vreinterpretq_u16_u8(vqtbl1q_u8(read, vld1q_u8(kShuffles<2>.unpack[lanes & 0xff])));
    words += lanes >> 8;
    x[0] = vbslq_u32(empty[0], vsliq_n_u32(vmovl_u16(vget_low_u16(spread)), x[0], 16), x[0]);
    x[1] = vbslq_u32(empty[1], vsliq_n_u32(vmovl_high_u16(spread), x[1], 16), x[1]);
    const uint32x4_t pairs = vreinterpretq_u32_u16(s);
    return vsraq_n_u32(pairs, pairs, 12);
  }

 private:
  static uint16x8_t start_at(const RansTable& t, int s) {
    return vdupq_n_u16(static_cast<uint16_t>(t.start[s]));
  }
  uint8x16x2_t frequency_, start_;
  uint16x8_t start_4_, start_8_, start_12_;
};

static bool decode_one(uint8_t* nibbles, int64_t steps, const RansTable& t, RansReader* in) {
  const Decoder decoder(t);
  uint32x4_t x[4][2];
  for (int g = 0; g < 4; ++g)
    for (int h = 0; h < 2; ++h)
      x[g][h] = vld1q_u32(in->x + 8 * g + 4 * h);
  Words words(*in);
  int64_t i = 0;
  for (; i < steps && (words.in_reach() || words.move()); ++i) {
    uint32x4_t s[4];
    for (int g = 0; g < 4; ++g)
      s[g] = decoder.decode(x[g], words.next);
    vst1q_u8(nibbles + kStepBytes * i, vuzp1q_u8(vreinterpretq_u8_u16(low_halves(s[0], s[1])),
                                                 vreinterpretq_u8_u16(low_halves(s[2], s[3]))));
  }
  for (int g = 0; g < 4; ++g)
    for (int h = 0; h < 2; ++h)
      vst1q_u32(in->x + 8 * g + 4 * h, x[g][h]);
  in->next = words.place();
  return i == steps && in->next <= in->end;
}

static bool decode(int streams, uint8_t* const nibbles[], int64_t steps, const RansTable* const t[],
                   RansReader* const in[]) {
  for (int k = 0; k < streams; ++k)
    if (!decode_one(nibbles[k], steps, *t[k], in[k]))
      return false;
  return true;
}

} // namespace neon
