// Casts between the float dtypes, and int8 by blocks. Contract: fedmap_sparse/ops/quantize.py.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/ahead.h"
#include "core/dtype.h"
#include "core/half.h"
#include "core/pool.h"
#include "core/streaming.h"
#include "quantize/quantize.h"

namespace fedmap {

constexpr int64_t kCastPiece = 1 << 18;

namespace scalar {

// Returns how many finite values became infinite.
template <class From, class To>
static int64_t cast_from(int64_t i, const From* src, To* dst, int64_t n) {
  int64_t count = 0;
  for (; i < n; ++i) {
    const float x = widen(src[i]);
    count += overflows<To>(x);
    dst[i] = narrow<To>(x);
  }
  return count;
}

// kStream: past the cache, where there are such stores.
template <class From, class To, bool kStream>
static int64_t cast(const From* src, To* dst, int64_t n) {
  return cast_from(0, src, dst, n);
}

template <class T>
static bool finite_from(int64_t i, const T* src, int64_t n) {
  int bad = 0;
  for (; i < n; ++i)
    bad |= not_finite<float>(widen(src[i]));
  return !bad;
}

template <class T>
static bool finite(const T* src, int64_t n) {
  return finite_from(0, src, n);
}

// max |x| over a block, x = src + residual, which is left in `residual`.
static float largest_from(int64_t i, float largest, const float* src, float* residual, int64_t n) {
  for (; i < n; ++i) {
    float x = src[i];
    if (residual)
      residual[i] = x = x + residual[i];
    largest = std::max(largest, std::fabs(x));
  }
  return largest;
}

static float largest(const float* src, float* residual, int64_t n) {
  return largest_from(0, 0, src, residual, n);
}

static void codes_from(int64_t i, const float* x, float scale, int8_t* q, float* residual,
                       int64_t n) {
  for (; i < n; ++i) {
    const float code = std::min(std::max(std::nearbyint(x[i] / scale), -127.0f), 127.0f);
    q[i] = static_cast<int8_t>(code);
    if (residual)
      residual[i] = x[i] - code * scale;
  }
}

static void codes(const float* x, float scale, int8_t* q, float* residual, int64_t n) {
  codes_from(0, x, scale, q, residual, n);
}

static void dequantize_from(int64_t i, const int8_t* q, float scale, int64_t n, float* dst) {
  for (; i < n; ++i)
    dst[i] = static_cast<float>(q[i]) * scale;
}

template <bool kStream>
static void dequantize(const int8_t* q, float scale, int64_t n, float* dst) {
  dequantize_from(0, q, scale, n, dst);
}

} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

template <class From, class To, bool kStream>
static int64_t cast(const From* src, To* dst, int64_t n) {
  const int64_t reads = read_ahead(), writes = write_ahead();
  int64_t i = 0, count = 0;
  for (; i + 8 <= n; i += 8) {
    ask(src + i, reads);
    ask(dst + i, writes);
    const __m256 x = load(src + i);
    if constexpr (sizeof(To) < sizeof(float))
      count += overflows<To>(x);
    if constexpr (kStream)
      stream(dst + i, x);
    else
      store(dst + i, x);
  }
  return count + scalar::cast_from(i, src, dst, n);
}

template <class T>
static bool finite(const T* src, int64_t n) {
  const int64_t ahead = read_ahead();
  int64_t i = 0;
  int bad = 0;
  for (; i + 8 <= n; i += 8) {
    ask(src + i, ahead);
    bad |= not_finite<float>(load(src + i));
  }
  return !bad && scalar::finite_from(i, src, n);
}

static float largest(const float* src, float* residual, int64_t n) {
  const int64_t ahead = read_ahead();
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    ask(src + i, ahead);
    __m256 x = load(src + i);
    if (residual)
      store(residual + i, x += load(residual + i));
    most = _mm256_max_ps(most, _mm256_andnot_ps(sign, x));
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, most);
  float largest = 0;
  for (float lane : lanes)
    largest = lane > largest ? lane : largest;
  return scalar::largest_from(i, largest, src, residual, n);
}

static void codes(const float* x, float scale, int8_t* q, float* residual, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 value = load(x + i);
    const __m256 rounded =
        _mm256_round_ps(value / scale, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 code =
        _mm256_min_ps(_mm256_max_ps(rounded, _mm256_set1_ps(-127)), _mm256_set1_ps(127));
    const __m256i wide = _mm256_cvtps_epi32(code);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), _mm_packs_epi16(words, words));
    if (residual)
      store(residual + i, value - code * scale);
  }
  scalar::codes_from(i, x, scale, q, residual, n);
}

template <bool kStream>
static void dequantize(const int8_t* q, float scale, int64_t n, float* dst) {
  const int64_t ahead = write_ahead();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    ask(dst + i, ahead);
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + i));
    const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)) * scale;
    if constexpr (kStream)
      stream(dst + i, x);
    else
      store(dst + i, x);
  }
  scalar::dequantize_from(i, q, scale, n, dst);
}

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

template <class From, class To, bool kStream>
static int64_t cast(const From* src, To* dst, int64_t n) {
  const int64_t reads = read_ahead(), writes = write_ahead();
  int64_t i = 0, count = 0;
  for (; i + 16 <= n; i += 16) {
    ask(src + i, reads);
    ask(dst + i, writes);
    const __m512 x = load(src + i);
    if constexpr (sizeof(To) < sizeof(float))
      count += overflows<To>(x);
    if constexpr (kStream)
      stream(dst + i, x);
    else
      store(dst + i, x);
  }
  return count + scalar::cast_from(i, src, dst, n);
}

template <class T>
static bool finite(const T* src, int64_t n) {
  const int64_t ahead = read_ahead();
  int64_t i = 0;
  int bad = 0;
  for (; i + 16 <= n; i += 16) {
    ask(src + i, ahead);
    bad |= not_finite<float>(load(src + i));
  }
  return !bad && scalar::finite_from(i, src, n);
}

static float largest(const float* src, float* residual, int64_t n) {
  const int64_t ahead = read_ahead();
  __m512 most = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    ask(src + i, ahead);
    __m512 x = load(src + i);
    if (residual)
      store(residual + i, x += load(residual + i));
    most = _mm512_max_ps(most, _mm512_abs_ps(x));
  }
  return scalar::largest_from(i, _mm512_reduce_max_ps(most), src, residual, n);
}

static void codes(const float* x, float scale, int8_t* q, float* residual, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 value = load(x + i);
    const __m512 rounded =
        _mm512_roundscale_ps(value / scale, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 code =
        _mm512_min_ps(_mm512_max_ps(rounded, _mm512_set1_ps(-127)), _mm512_set1_ps(127));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i),
                     _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code)));
    if (residual)
      store(residual + i, value - code * scale);
  }
  scalar::codes_from(i, x, scale, q, residual, n);
}

template <bool kStream>
static void dequantize(const int8_t* q, float scale, int64_t n, float* dst) {
  const int64_t ahead = write_ahead();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    ask(dst + i, ahead);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i));
    const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)) * scale;
    if constexpr (kStream)
      stream(dst + i, x);
    else
      store(dst + i, x);
  }
  scalar::dequantize_from(i, q, scale, n, dst);
}

} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
#include "quantize/quantize_neon.h"
#endif

namespace {

// As dequantize, for a scale below the least normal number. Its products with integers are integers
// of 2^-149: where they stay below 2^23 their bits are that integer, else those of a float, 149
// lower in the exponent. Floating-point units of Intel take 150 cycles for a subnormal result,
// which made a message of such scales cost three honest ones.
void dequantize_subnormal(const int8_t* q, float scale, int64_t n, float* dst) {
  int32_t unit;
  std::memcpy(&unit, &scale, sizeof unit);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t product = q[i] < 0 ? -q[i] * unit : q[i] * unit;
    const float whole = static_cast<float>(product);
    int32_t bits;
    std::memcpy(&bits, &whole, sizeof bits);
    bits = product < 1 << 23 ? product : bits - (149 << 23);
    bits |= q[i] < 0 ? INT32_MIN : 0;
    std::memcpy(dst + i, &bits, sizeof bits);
  }
}

// Calls f(begin, end) in parallel for pieces of n elements, multiples of `unit`, of `bytes` each
// that are read or written.
template <class F>
void for_pieces(int64_t n, int64_t unit, int64_t bytes, int threads, F&& f) {
  const int used = threads_for(n * bytes, threads);
  parallel_ranges(n, piece_of(n, kCastPiece, unit, used), used, f);
}

template <class From, class To>
int64_t cast_all(const void* src, void* dst, int64_t n, int threads) {
  const bool stream = goes_past_cache(dst, n * static_cast<int64_t>(sizeof(To)));
  const auto cast =
      stream ? FEDMAP_DISPATCH(cast<From, To, true>) : FEDMAP_DISPATCH(cast<From, To, false>);
  std::atomic<int64_t> count{0};
  for_pieces(n, 64, sizeof(From) + sizeof(To), threads, [&](int64_t begin, int64_t end) {
    const From* from = static_cast<const From*>(src) + begin;
    To* to = static_cast<To*>(dst) + begin;
    if constexpr (std::is_same_v<From, To>)
      std::memcpy(to, from, (end - begin) * sizeof(To));
    else
      count += cast(from, to, end - begin);
    if (stream)
      end_of_stream();
  });
  return count;
}

template <class T>
bool all_finite_of(const void* src, int64_t n, int threads) {
  const auto finite = FEDMAP_DISPATCH(finite<T>);
  std::atomic<bool> all{true};
  for_pieces(n, 64, sizeof(T), threads, [&](int64_t begin, int64_t end) {
    if (!finite(static_cast<const T*>(src) + begin, end - begin))
      all = false;
  });
  return all;
}

} // namespace

int64_t cast(const void* src, int src_dtype, void* dst, int dst_dtype, int64_t n, int threads) {
  using Cast = int64_t (*)(const void*, void*, int64_t, int);
  static constexpr Cast kCasts[3][3] = {
      {cast_all<float, float>, cast_all<float, Float16>, cast_all<float, Bfloat16>},
      {cast_all<Float16, float>, cast_all<Float16, Float16>, cast_all<Float16, Bfloat16>},
      {cast_all<Bfloat16, float>, cast_all<Bfloat16, Float16>, cast_all<Bfloat16, Bfloat16>}};
  return kCasts[src_dtype][dst_dtype](src, dst, n, threads);
}

bool all_finite(const void* src, int dtype, int64_t n, int threads) {
  return dtype == kFloat32   ? all_finite_of<float>(src, n, threads)
         : dtype == kFloat16 ? all_finite_of<Float16>(src, n, threads)
                             : all_finite_of<Bfloat16>(src, n, threads);
}

void quantize_int8(const float* src, int64_t n, int64_t block, int8_t* q, float* scales,
                   float* residual, int threads) {
  const auto largest = FEDMAP_DISPATCH(largest);
  const auto codes = FEDMAP_DISPATCH(codes);
  for_pieces(n, block, 5, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += block) {
      const int64_t size = std::min(block, end - begin);
      float* rest = residual ? residual + begin : nullptr;
      const float scale = largest(src + begin, rest, size) / 127.0f;
      scales[begin / block] = scale;
      if (scale > 0)
        codes(rest ? rest : src + begin, scale, q + begin, rest, size);
      else
        std::fill_n(q + begin, size, static_cast<int8_t>(0));
    }
  });
}

void dequantize_int8(const int8_t* q, const float* scales, int64_t block, int64_t n, float* dst,
                     int threads) {
  const bool stream = block % 16 == 0 && goes_past_cache(dst, 4 * n);
  const auto dequantize =
      stream ? FEDMAP_DISPATCH(dequantize<true>) : FEDMAP_DISPATCH(dequantize<false>);
  for_pieces(n, block, 5, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += block) {
      const float scale = scales[begin / block];
      const bool subnormal = scale > 0 && scale < std::numeric_limits<float>::min();
      (subnormal ? dequantize_subnormal : dequantize)(q + begin, scale,
                                                      std::min(block, end - begin), dst + begin);
    }
    if (stream)
      end_of_stream();
  });
}

} // namespace fedmap
