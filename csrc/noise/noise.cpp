// Gaussian noise from a counter. Contract and method: fedmap_sparse/ops/noise.py.
#include "noise/noise.h"

#include <cmath>
#include <cstring>

#include "core/cpu.h"
#include "core/pool.h"

namespace fedmap {
namespace {

constexpr int64_t kPairs = 128;
constexpr uint64_t kLow = 0xffffffff, kMantissa = (uint64_t{1} << 52) - 1,
                   kSign = uint64_t{1} << 63;
constexpr uint64_t kOne = uint64_t{0x3ff} << 52;   // the exponent of 1.0
constexpr uint64_t kMagic = uint64_t{0x433} << 52; // 2^52, whose mantissa counts ones
constexpr uint64_t kSqrt2 = 0x6A09E667F3BCD;       // its mantissa
constexpr double kLn4 = 1.3862943611198906, kQuarter = 1.5707963267948966;
constexpr double kAtanh[] = {1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11,
                             1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3,  1.0};
constexpr double kSin[] = {-1.0 / 1307674368000, 1.0 / 6227020800, -1.0 / 39916800, 1.0 / 362880,
                           -1.0 / 5040,          1.0 / 120,        -1.0 / 6,        1.0};
constexpr double kCos[] = {1.0 / 20922789888000,
                           -1.0 / 87178291200,
                           1.0 / 479001600,
                           -1.0 / 3628800,
                           1.0 / 40320,
                           -1.0 / 720,
                           1.0 / 24,
                           -1.0 / 2,
                           1.0};

inline uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
inline double double_of(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

} // namespace

// By hand are products of 32 bits, which compilers take for those of 64, and roots: std::sqrt has
// to set errno, so they do not vectorise it.
namespace scalar {
using Words = uint64_t;
inline Words times(Words a, Words b) {
  return a * b;
}
static void roots(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    x[i] = std::sqrt(x[i]);
}
#include "noise/noise_body.h"
} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {
using Words = uint64_t __attribute__((vector_size(32)));
inline Words times(Words a, Words b) {
  return reinterpret_cast<Words>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
static void roots(double* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 4)
    _mm256_storeu_pd(x + i, _mm256_sqrt_pd(_mm256_loadu_pd(x + i)));
}
#include "noise/noise_body.h"
} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {
using Words = uint64_t __attribute__((vector_size(64)));
inline Words times(Words a, Words b) {
  return reinterpret_cast<Words>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
static void roots(double* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 8)
    _mm512_storeu_pd(x + i, _mm512_sqrt_pd(_mm512_loadu_pd(x + i)));
}
#include "noise/noise_body.h"
} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {
using Words = uint64x2_t;
inline Words times(Words a, Words b) {
  return vmull_u32(vmovn_u64(a), vmovn_u64(b));
}
static void roots(double* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 2)
    vst1q_f64(x + i, vsqrtq_f64(vld1q_f64(x + i)));
}
#include "noise/noise_body.h"
} // namespace neon
#endif

void add_gaussian(float* values, int64_t n, double std, uint64_t seed, uint64_t stream,
                  int threads) {
  const auto add_noise = FEDMAP_DISPATCH(add_noise);
  constexpr int64_t kGroup = 2 * kPairs;
  // The work of an element is that of some 64 bytes read.
  const int used = threads_for(n * 64, threads);
  parallel_ranges(n, piece_of(n, 1 << 16, kGroup, used), used, [&](int64_t begin, int64_t end) {
    add_noise(values + begin, end - begin, std, static_cast<uint64_t>(begin / kGroup), seed,
              stream);
  });
}

} // namespace fedmap
