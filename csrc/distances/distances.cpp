// Squared distances between vectors: float32 differences, float64 squares and sums, in an order
// that depends on nothing but the size. Contract: fedmap_sparse/ops/distances.py.
//
// The square of a float32 is exact in float64, so that a fused multiply-add gives the bits of a
// product and a sum.
#include "distances/distances.h"

#include <algorithm>

#include "core/cpu.h"
#include "core/pool.h"

namespace fedmap {

// Elements whose sums go to the same lane lie kSumLanes apart; the lanes of a block are folded, the
// blocks of a part added up in order, and so are the parts.
constexpr int kSumLanes = 32;
constexpr int64_t kSumBlock = 2048;
constexpr int64_t kSumPart = 32 * kSumBlock;
// Vectors that are taken against as many others: blocks of both stay in L2.
constexpr int kPairTile = 32;

namespace scalar {

// The lanes' sums after element i, folded to one.
static double fold(int64_t i, const float* a, const float* b, int64_t n, double* lanes) {
  for (; i < n; ++i) {
    const double x = a[i] - b[i];
    lanes[i % kSumLanes] += x * x;
  }
  for (int half = kSumLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane)
      lanes[lane] += lanes[lane + half];
  return lanes[0];
}

static double block_distance(const float* a, const float* b, int64_t n) {
  double lanes[kSumLanes] = {};
  return fold(0, a, b, n, lanes);
}

} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

static double block_distance(const float* a, const float* b, int64_t n) {
  __m256d sum[8] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int k = 0; k < 8; k += 2) {
      const __m256 x = _mm256_loadu_ps(a + i + 4 * k) - _mm256_loadu_ps(b + i + 4 * k);
      const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
      const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
      sum[k] += low * low;
      sum[k + 1] += high * high;
    }
  alignas(32) double lanes[kSumLanes];
  for (int k = 0; k < 8; ++k)
    _mm256_store_pd(lanes + 4 * k, sum[k]);
  return scalar::fold(i, a, b, n, lanes);
}

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

static double block_distance(const float* a, const float* b, int64_t n) {
  __m512d sum[4] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int k = 0; k < 4; k += 2) {
      const __m512 x = _mm512_loadu_ps(a + i + 8 * k) - _mm512_loadu_ps(b + i + 8 * k);
      const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
      const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
      sum[k] = _mm512_fmadd_pd(low, low, sum[k]);
      sum[k + 1] = _mm512_fmadd_pd(high, high, sum[k + 1]);
    }
  alignas(64) double lanes[kSumLanes];
  for (int k = 0; k < 4; ++k)
    _mm512_store_pd(lanes + 8 * k, sum[k]);
  return scalar::fold(i, a, b, n, lanes);
}

} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {

static double block_distance(const float* a, const float* b, int64_t n) {
  float64x2_t sum[16];
  for (float64x2_t& each : sum)
    each = vdupq_n_f64(0);
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
#pragma GCC unroll 8
    for (int k = 0; k < 16; k += 2) {
      const float32x4_t x = vld1q_f32(a + i + 2 * k) - vld1q_f32(b + i + 2 * k);
      const float64x2_t low = vcvt_f64_f32(vget_low_f32(x)), high = vcvt_high_f64_f32(x);
      sum[k] = vfmaq_f64(sum[k], low, low);
      sum[k + 1] = vfmaq_f64(sum[k + 1], high, high);
    }
  double lanes[kSumLanes];
  for (int k = 0; k < 16; ++k)
    vst1q_f64(lanes + 2 * k, sum[k]);
  return scalar::fold(i, a, b, n, lanes);
}

} // namespace neon
#endif

void squared_distances(const std::vector<const float*>& vectors,
                       const std::vector<const float*>& others, int64_t n, double* out,
                       int threads) {
  const bool among = others.empty();
  const std::vector<const float*>& columns = among ? vectors : others;
  const int rows = static_cast<int>(vectors.size()), width = static_cast<int>(columns.size());
  const int64_t pairs = int64_t{rows} * width, parts = (n + kSumPart - 1) / kSumPart;
  const auto block_distance = FEDMAP_DISPATCH(block_distance);
  // One other vector stays in L2 by a whole part, and the others are read in long runs.
  const int64_t stretch = width == 1 ? kSumPart : kSumBlock;
  const auto add_part = [&](int64_t part, double* sums) {
    const int64_t begin = part * kSumPart, end = std::min(n, begin + kSumPart);
    for (int64_t at = begin; at < end; at += stretch)
      for (int first = 0; first < rows; first += kPairTile)
        for (int other = 0; other < (among ? first + 1 : width); other += kPairTile)
          for (int r = first; r < std::min(rows, first + kPairTile); ++r)
            for (int c = other; c < std::min(among ? r : width, other + kPairTile); ++c)
              for (int64_t i = at; i < std::min(end, at + stretch); i += kSumBlock)
                sums[int64_t{r} * width + c] +=
                    block_distance(vectors[r] + i, columns[c] + i, std::min(kSumBlock, end - i));
  };
  std::fill(out, out + pairs, 0.0);
  const int used = threads_for(n * pairs * int64_t(sizeof(float)), threads);
  // Sums of as many parts at once as fit into 8 MB, but one for each thread.
  const int64_t most = std::min(parts, std::max<int64_t>(used, (1 << 20) / pairs));
  std::vector<double> sums(static_cast<size_t>(most * pairs));
  for (int64_t part = 0; part < parts; part += most) {
    const int64_t together = std::min(most, parts - part);
    std::fill(sums.begin(), sums.end(), 0.0);
    parallel_for(together, used, [&](int64_t task) { add_part(part + task, &sums[task * pairs]); });
    for (int64_t task = 0; task < together; ++task)
      for (int64_t pair = 0; pair < pairs; ++pair)
        out[pair] += sums[task * pairs + pair];
  }
  for (int r = 0; among && r < rows; ++r)
    for (int c = 0; c < r; ++c)
      out[int64_t{c} * width + r] = out[int64_t{r} * width + c];
}

} // namespace fedmap
