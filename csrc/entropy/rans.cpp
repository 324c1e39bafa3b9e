#include "entropy/rans.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "core/bits.h"
#include "core/compress.h"
#include "core/cpu.h"

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

static bool decode(int streams, uint8_t* const nibbles[], int64_t steps, const RansTable* const t[],
                   RansReader* const in[]) {
  for (int k = 0; k < streams; ++k)
    for (int64_t i = 0; i < steps; ++i)
      if (!rans_decode_part(nibbles[k] + kStepBytes * i, kLanes, *t[k], in[k]))
        return false;
  return true;
}

} // namespace scalar

// Where a stream reads its words, kLanes at a time. Where so many do not lie before the end of
// memory, it goes on in a copy of those that are left: the scalar form would take four times as
// long for a message whose words are few, of zero weights, say.
struct Words {
  const uint16_t *next, *end, *limit;
  const uint16_t* moved_from = nullptr;
  uint16_t copy[2 * kLanes];

  Words() = default;
  explicit Words(const RansReader& in) : next(in.next), end(in.end), limit(in.limit) {}
  bool in_reach() const { return limit - next >= kLanes; }
  // False where the words ran out.
  bool move() {
    const int64_t left = end - next;
    if (left < 0)
      return false;
    std::fill(std::copy(next, end, copy), std::end(copy), uint16_t{0});
    moved_from = next;
    next = copy;
    end = copy + left;
    limit = end + kLanes;
    return true;
  }
  const uint16_t* place() const { return moved_from ? moved_from + (next - copy) : next; }
};

#if FEDMAP_X86
// AVX2 has no look-up of 32-bit entries in a table of 16: the scalar form serves it.
namespace avx2 {
using scalar::decode;
using scalar::encode;
} // namespace avx2

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

// Bytes 0 and 2 of each 64 bits: first all of the former, then all of the latter.
static __m128i bytes_0_2(__m512i v) {
  return _mm_unpacklo_epi64(_mm512_cvtepi64_epi8(v),
                            _mm512_cvtepi64_epi8(_mm512_srli_epi64(v, 16)));
}

#include "entropy/rans_avx512.h"

} // namespace avx512_core
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512
namespace avx512 {

static __m128i bytes_0_2(__m512i v) {
  const __m128i places = _mm_setr_epi8(0, 8, 16, 24, 32, 40, 48, 56, 2, 10, 18, 26, 34, 42, 50, 58);
  return _mm512_castsi512_si128(_mm512_permutexvar_epi8(_mm512_castsi128_si512(places), v));
}

#include "entropy/rans_avx512.h"

} // namespace avx512
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
#include "entropy/rans_neon.h"
#endif

void rans_encode(const uint8_t* nibbles, int64_t steps, const RansTable& table, RansWriter* out) {
  FEDMAP_DISPATCH(encode)(nibbles, steps, table, out);
}

bool rans_decode(int streams, uint8_t* const nibbles[], int64_t steps,
                 const RansTable* const table[], RansReader* const in[]) {
  return FEDMAP_DISPATCH(decode)(streams, nibbles, steps, table, in);
}

} // namespace fedmap
