// The mean of the middle values of each element: float64 sums by increasing rank, rounded once.
// Contract: fedmap_sparse/ops/trimmed.py.
//
// Values are compared as integers: the bits of a float32, those of negative ones turned round, are
// in the order of the values, with NaN at the ends. Integers have one minimum on every processor,
// where floats differ by zeros and NaN.
//
// Runs of up to 32 rows are sorted in registers by code compiled for their number. Merges of runs,
// less what the wanted ranks do not need, go over rows in L1, several steps to each load: Zen 4
// stores half a vector a cycle, and by single steps the mean of 40 of 50 rows took an eighth
// longer, of 160 of 200 half as long again.
#include "trimmed/trimmed.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "core/ahead.h"
#include "core/cpu.h"
#include "core/half.h"
#include "core/pool.h"
#include "trimmed/network.h"

namespace fedmap {

// Elements ahead of those being read, in each row. Fifty rows are more streams than a processor
// follows by itself: their median took three times as long without, and with 256 ahead a seventh
// longer (Zen 4).
constexpr int64_t kFetchAhead = 64;
constexpr int64_t kTrimTile = 1024;
constexpr int64_t kTrimPiece = 64 * kTrimTile;

struct Middle {
  const float* const* rows;
  int count, first, stop; // ranks first to before stop
  std::vector<Merge> merges;
};

namespace scalar {

constexpr int kLanes = 1, kAcross = 1;
using Ranked = int32_t;

static Ranked ranked(Ranked bits) {
  return bits ^ (bits >> 31 & 0x7fffffff);
}
static Ranked ranked(const float* at) {
  return ranked(static_cast<Ranked>(float_bits(*at)));
}

static void exchange(Ranked& low, Ranked& high) {
  const Ranked lesser = std::min(low, high);
  high = std::max(low, high);
  low = lesser;
}

static int64_t mean(const Ranked* room, int count, float* out) {
  double sum = 0;
  for (int r = 0; r < count; ++r)
    sum += static_cast<double>(bits_float(static_cast<uint32_t>(ranked(room[r]))));
  *out = static_cast<float>(sum / count);
  return not_finite<float>(*out);
}

#include "trimmed/trimmed_body.h"

} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

constexpr int kLanes = 8, kAcross = 2;
using Ranked = __m256i;

inline Ranked ranked(Ranked bits) {
  return _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
}
inline Ranked ranked(const float* at) {
  return ranked(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

inline void exchange(Ranked& low, Ranked& high) {
  const Ranked lesser = _mm256_min_epi32(low, high);
  high = _mm256_max_epi32(low, high);
  low = lesser;
}

static int64_t mean(const Ranked* room, int count, float* out) {
  __m256d sum[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
  for (int r = 0; r < count; ++r) {
    const __m256 x = _mm256_castsi256_ps(ranked(room[r * kAcross]));
    sum[0] += _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    sum[1] += _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
  }
  const double by = count;
  const __m256 found = _mm256_set_m128(_mm256_cvtpd_ps(sum[1] / by), _mm256_cvtpd_ps(sum[0] / by));
  store(out, found);
  return not_finite<float>(found);
}

#include "trimmed/trimmed_body.h"

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

constexpr int kLanes = 16, kAcross = 2;
using Ranked = __m512i;

// a ^ (b & c) is 0x78 of the ternary logic.
inline Ranked ranked(Ranked bits) {
  return _mm512_ternarylogic_epi32(bits, _mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff),
                                   0x78);
}
inline __m256 value_of(const void* at) {
  const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(at));
  return _mm256_castsi256_ps(_mm256_ternarylogic_epi32(bits, _mm256_srai_epi32(bits, 31),
                                                       _mm256_set1_epi32(0x7fffffff), 0x78));
}
inline Ranked ranked(const float* at) {
  return ranked(_mm512_loadu_si512(at));
}

inline void exchange(Ranked& low, Ranked& high) {
  const Ranked lesser = _mm512_min_epi32(low, high);
  high = _mm512_max_epi32(low, high);
  low = lesser;
}

static int64_t mean(const Ranked* room, int count, float* out) {
  __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  for (int r = 0; r < count; ++r) {
    const float* const row = reinterpret_cast<const float*>(room + r * kAcross);
    sum[0] += _mm512_cvtps_pd(value_of(row)); // by halves: to part a vector costs as much again
    sum[1] += _mm512_cvtps_pd(value_of(row + 8));
  }
  const double by = count;
  const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps(sum[0] / by));
  const __m512 found = _mm512_insertf32x8(low, _mm512_cvtpd_ps(sum[1] / by), 1);
  store(out, found);
  return not_finite<float>(found);
}

#include "trimmed/trimmed_body.h"

} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {

constexpr int kLanes = 4, kAcross = 4;
using Ranked = int32x4_t;

inline Ranked ranked(Ranked bits) {
  const uint32x4_t turned = vshrq_n_u32(vreinterpretq_u32_s32(vshrq_n_s32(bits, 31)), 1);
  return veorq_s32(bits, vreinterpretq_s32_u32(turned));
}
inline Ranked ranked(const float* at) {
  return ranked(vreinterpretq_s32_f32(vld1q_f32(at)));
}

inline void exchange(Ranked& low, Ranked& high) {
  const Ranked lesser = vminq_s32(low, high);
  high = vmaxq_s32(low, high);
  low = lesser;
}

static int64_t mean(const Ranked* room, int count, float* out) {
  float64x2_t sum[2] = {vdupq_n_f64(0), vdupq_n_f64(0)};
  for (int r = 0; r < count; ++r) {
    const float32x4_t x = vreinterpretq_f32_s32(ranked(room[r * kAcross]));
    sum[0] += vcvt_f64_f32(vget_low_f32(x));
    sum[1] += vcvt_high_f64_f32(x);
  }
  const double by = count;
  const float32x4_t found = vcombine_f32(vcvt_f32_f64(sum[0] / by), vcvt_f32_f64(sum[1] / by));
  vst1q_f32(out, found);
  return vaddvq_u32(vshrq_n_u32(not_finite<float>(found), 31));
}

#include "trimmed/trimmed_body.h"

} // namespace neon
#endif

int64_t trimmed_mean(const std::vector<const float*>& rows, int trim, int64_t n, float* out,
                     int threads) {
  struct alignas(64) Line {
    char bytes[64];
  };
  const int count = static_cast<int>(rows.size());
  const Middle middle{rows.data(), count, trim, count - trim,
                      merges_for(count, trim, count - trim)};
  const auto trimmed = FEDMAP_DISPATCH(trimmed);
  const int used = threads_for(n * count * int64_t(sizeof(float)), threads);
  std::atomic<int64_t> bad{0};
  parallel_ranges(
      n, piece_of(n, kTrimPiece, kTrimTile, used), used, [&](int64_t begin, int64_t end) {
        std::vector<Line> room(static_cast<size_t>(2 * count));
        bad.fetch_add(trimmed(middle, begin, end, out, room.data()), std::memory_order_relaxed);
      });
  return bad;
}

} // namespace fedmap
