// The `neon` level of the scan: select_scan.cpp includes this beside its other levels.
namespace neon {
namespace {

template <class T>
class Keys {
 public:
  explicit Keys(const Bracket& b)
      : below_(b.below), top_(b.top),
        after_(static_cast<int32_t>(static_cast<uint32_t>(b.top) + 1)) {}

  template <bool kTies>
  uint64_t take(const T* values, uint64_t eligible, int64_t at, Tally& tally,
                uint16_t*& next) const {
    if (kTies) {
      tally.at_below += __builtin_popcountll(equal(values, below_) & eligible);
      tally.above_top += __builtin_popcountll(equal(values, after_) & eligible);
    }
    uint8x16_t high[4], low[4]; // one read serves both comparisons
    for (int k = 0; k < 4; ++k) {
      high[k] = bytes(values + 16 * k, [this](auto keys) { return greater(keys, top_); });
      low[k] = bytes(values + 16 * k, [this](auto keys) { return greater(keys, below_); });
    }
    const uint64_t kept = bits_of(high[0], high[1], high[2], high[3]) & eligible;
    // One element in a hundred is a candidate.
    const uint64_t between = bits_of(low[0], low[1], low[2], low[3]) & eligible & ~kept;
    if (between)
      for_each_set(reversed(between),
                   [&](int place) { *next++ = static_cast<uint16_t>(at + place); });
    return kept;
  }

  static uint64_t above(const T* values, int32_t limit) {
    return bits(values, [limit](auto keys) { return greater(keys, limit); });
  }

 private:
  static uint64_t equal(const T* values, int32_t key) {
    return bits(values, [key](auto keys) { return same(keys, key); });
  }

  static uint32x4_t greater(int32x4_t keys, int32_t limit) {
    return vcgtq_s32(keys, vdupq_n_s32(limit));
  }
  static uint16x8_t greater(int16x8_t keys, int32_t limit) {
    return vcgtq_s16(keys, vdupq_n_s16(static_cast<int16_t>(limit)));
  }
  static uint32x4_t same(int32x4_t keys, int32_t key) { return vceqq_s32(keys, vdupq_n_s32(key)); }
  static uint16x8_t same(int16x8_t keys, int32_t key) {
    return vceqq_s16(keys, vdupq_n_s16(static_cast<int16_t>(key)));
  }

  static int32x4_t load(const uint32_t* values) {
    return vreinterpretq_s32_u32(vbicq_u32(vld1q_u32(values), vdupq_n_u32(0x80000000)));
  }
  static int16x8_t load(const uint16_t* values) {
    return vreinterpretq_s16_u16(vbicq_u16(vld1q_u16(values), vdupq_n_u16(0x8000)));
  }

  // 16 comparisons as bytes.
  template <class Compare>
  static uint8x16_t bytes(const uint32_t* values, Compare compare) {
    const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(compare(load(values))),
                                      vreinterpretq_u16_u32(compare(load(values + 4))));
    const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(compare(load(values + 8))),
                                       vreinterpretq_u16_u32(compare(load(values + 12))));
    return vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
  }
  template <class Compare>
  static uint8x16_t bytes(const uint16_t* values, Compare compare) {
    return vuzp1q_u8(vreinterpretq_u8_u16(compare(load(values))),
                     vreinterpretq_u8_u16(compare(load(values + 8))));
  }

  // One bit of each of the 64 comparisons.
  template <class Compare>
  static uint64_t bits(const T* values, Compare compare) {
    return bits_of(bytes(values, compare), bytes(values + 16, compare), bytes(values + 32, compare),
                   bytes(values + 48, compare));
  }

  const int32_t below_, top_, after_;
};

// The candidates at n places, counted from `begin`.
template <class T>
uint32_t* collect(const T* values, int64_t begin, const uint16_t* places, int64_t n,
                  const Bracket& bracket, uint32_t* out) {
  for (int64_t k = 0; k < n; ++k)
    *out++ = scalar::candidate(values, begin + places[k], bracket);
  return out;
}

#include "select/select_scan_body.h"

using scalar::locate;

} // namespace
} // namespace neon
