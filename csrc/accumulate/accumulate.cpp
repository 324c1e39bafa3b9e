// Weighted mean of packed payloads: float64 products and sums in the order given, divided by the
// total weight, rounded once. Contract: fedmap_sparse/ops/accumulate.py.
#include <algorithm>
#include <atomic>
#include <type_traits>

#include "accumulate/accumulate.h"
#include "core/ahead.h"
#include "core/dtype.h"
#include "core/half.h"
#include "core/pool.h"

namespace fedmap {

// The sums of a tile stay in L1 while the payloads stream past, up to kGroup of them in a pass. On
// Zen 4 one thread takes as long as for reading alone, with 10 to 500 payloads; 16 a pass took 30%
// longer (more streams than the hardware prefetches), 8 a pass 8% (more passes).
constexpr int64_t kSumTile = 1024;
constexpr int64_t kSumPiece = 64 * kSumTile;
constexpr int kGroup = 12;

template <class T>
struct Group {
  int count = 0;
  const T* payload[kGroup];
  double weight[kGroup];
  float scale[kGroup]; // of int8 payloads

  void push(const T* values, double by, float scaled = 1) {
    payload[count] = values;
    scale[count] = scaled;
    weight[count++] = by;
  }
};

// One pass over n elements: the sums so far (null: zeros) and the group's products go, if Out is
// double, back to the sums; else, divided by the total, to the result: dividing in the last pass
// hides the divisions behind its loads. Returns how many results are NaN or infinite.
namespace scalar {

template <class T>
static float value(const Group<T>& group, int c, int64_t i) {
  if constexpr (std::is_same_v<T, int8_t>)
    return static_cast<float>(group.payload[c][i]) * group.scale[c];
  else
    return widen(group.payload[c][i]);
}

template <class T, class Out>
[[gnu::always_inline]] inline int64_t add_from(int64_t i, const double* sums, const Group<T>& group,
                                               double total, int64_t n, Out* out) {
  int64_t bad = 0;
  for (; i < n; ++i) {
    double sum = sums ? sums[i] : 0.0;
    for (int c = 0; c < group.count; ++c)
      sum += group.weight[c] * static_cast<double>(value(group, c, i));
    if constexpr (std::is_same_v<Out, double>) {
      out[i] = sum;
    } else {
      const float mean = shorten<Out>(sum / total);
      bad += not_finite<Out>(mean);
      out[i] = narrow<Out>(mean);
    }
  }
  return bad;
}

template <class T, class Out>
static int64_t add(const double* sums, const Group<T>& group, double total, int64_t n, Out* out) {
  return add_from(0, sums, group, total, n, out);
}

} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

template <class T>
inline __m256 value(const Group<T>& group, int c, int64_t i) {
  if constexpr (std::is_same_v<T, int8_t>) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(group.payload[c] + i));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)) * group.scale[c];
  } else {
    return load(group.payload[c] + i);
  }
}

template <class T, class Out>
static int64_t add(const double* sums, const Group<T>& group, double total, int64_t n, Out* out) {
  int64_t i = 0, bad = 0;
  for (; i + 16 <= n; i += 16) {
    __m256d sum[4];
    for (int k = 0; k < 4; ++k)
      sum[k] = sums ? _mm256_loadu_pd(sums + i + 4 * k) : _mm256_setzero_pd();
    for (int c = 0; c < group.count; ++c)
      for (int k = 0; k < 4; k += 2) {
        const __m256 x = value(group, c, i + 4 * k);
        sum[k] += group.weight[c] * _mm256_cvtps_pd(_mm256_castps256_ps128(x));
        sum[k + 1] += group.weight[c] * _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
      }
    for (int k = 0; k < 4; k += 2) {
      if constexpr (std::is_same_v<Out, double>) {
        _mm256_storeu_pd(out + i + 4 * k, sum[k]);
        _mm256_storeu_pd(out + i + 4 * k + 4, sum[k + 1]);
      } else {
        const __m256 mean =
            _mm256_set_m128(shorten<Out>(sum[k + 1] / total), shorten<Out>(sum[k] / total));
        bad += not_finite<Out>(mean);
        store(out + i + 4 * k, mean);
      }
    }
  }
  return bad + scalar::add_from(i, sums, group, total, n, out);
}

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

template <class T, class Out>
static int64_t add(const double* sums, const Group<T>& group, double total, int64_t n, Out* out) {
  const int64_t ahead = read_ahead();
  int64_t i = 0, bad = 0;
  for (; i + 32 <= n; i += 32) {
    __m512d sum[4];
    for (int k = 0; k < 4; ++k)
      sum[k] = sums ? _mm512_loadu_pd(sums + i + 8 * k) : _mm512_setzero_pd();
    for (int c = 0; c < group.count; ++c) {
      if (ahead)
        fetch_lines(reinterpret_cast<const char*>(group.payload[c] + i) + ahead, 32 * sizeof(T));
      for (int k = 0; k < 4; ++k)
        sum[k] += group.weight[c] * _mm512_cvtps_pd(avx2::value(group, c, i + 8 * k));
    }
    for (int k = 0; k < 4; k += 2) {
      if constexpr (std::is_same_v<Out, double>) {
        _mm512_storeu_pd(out + i + 8 * k, sum[k]);
        _mm512_storeu_pd(out + i + 8 * k + 8, sum[k + 1]);
      } else {
        const __m512 low = _mm512_castps256_ps512(shorten<Out>(sum[k] / total));
        const __m512 mean = _mm512_insertf32x8(low, shorten<Out>(sum[k + 1] / total), 1);
        bad += not_finite<Out>(mean);
        store(out + i + 8 * k, mean);
      }
    }
  }
  return bad + scalar::add_from(i, sums, group, total, n, out);
}

} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {

// Elements at once: their sums are half of the registers.
constexpr int kAtOnce = 32;

template <class T>
inline void values(const Group<T>& group, int c, int64_t i, float32x4_t (&x)[2]) {
  if constexpr (std::is_same_v<T, int8_t>) {
    const int16x8_t codes = vmovl_s8(vld1_s8(group.payload[c] + i));
    x[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(codes))) * group.scale[c];
    x[1] = vcvtq_f32_s32(vmovl_high_s16(codes)) * group.scale[c];
  } else {
    x[0] = load(group.payload[c] + i);
    x[1] = load(group.payload[c] + i + 4);
  }
}

template <class T, class Out>
static int64_t add(const double* sums, const Group<T>& group, double total, int64_t n, Out* out) {
  int64_t i = 0;
  uint32x4_t bad = vdupq_n_u32(0);
  for (; i + kAtOnce <= n; i += kAtOnce) {
    float64x2_t sum[kAtOnce / 2];
    for (int k = 0; k < kAtOnce / 2; ++k)
      sum[k] = sums ? vld1q_f64(sums + i + 2 * k) : vdupq_n_f64(0);
    for (int c = 0; c < group.count; ++c) {
      const double weight = group.weight[c];
#pragma GCC unroll 4
      for (int k = 0; k < kAtOnce / 2; k += 4) {
        float32x4_t x[2];
        values(group, c, i + 2 * k, x);
        sum[k] += weight * vcvt_f64_f32(vget_low_f32(x[0]));
        sum[k + 1] += weight * vcvt_high_f64_f32(x[0]);
        sum[k + 2] += weight * vcvt_f64_f32(vget_low_f32(x[1]));
        sum[k + 3] += weight * vcvt_high_f64_f32(x[1]);
      }
    }
    for (int k = 0; k < kAtOnce / 2; k += 2) {
      if constexpr (std::is_same_v<Out, double>) {
        vst1q_f64(out + i + 2 * k, sum[k]);
        vst1q_f64(out + i + 2 * k + 2, sum[k + 1]);
      } else {
        const float32x4_t mean =
            vcombine_f32(shorten<Out>(sum[k] / total), shorten<Out>(sum[k + 1] / total));
        bad = vsubq_u32(bad, not_finite<Out>(mean));
        store(out + i + 2 * k, mean);
      }
    }
  }
  return vaddvq_u32(bad) + scalar::add_from(i, sums, group, total, n, out);
}

} // namespace neon
#endif

namespace {

// Calls f with a null pointer of the type that `dtype` names.
template <class F>
void with_float_type(int dtype, F&& f) {
  if (dtype == kFloat32)
    f(static_cast<float*>(nullptr));
  else if (dtype == kFloat16)
    f(static_cast<Float16*>(nullptr));
  else
    f(static_cast<Bfloat16*>(nullptr));
}

// n elements of all payloads, n <= kSumTile; fill(group, c) pushes payload c.
template <class T, class Out, class Fill>
int64_t mean_of(int clients, double total, int64_t n, Out* out, Fill&& fill) {
  const auto add_pass = FEDMAP_DISPATCH(add<T, double>);
  const auto last_pass = FEDMAP_DISPATCH(add<T, Out>);
  alignas(64) double room[kSumTile];
  const double* sums = nullptr;
  const int passes = (clients + kGroup - 1) / kGroup;
  for (int pass = 0, c = 0;; ++pass) {
    Group<T> group;
    for (const int end = (pass + 1) * clients / passes; c < end; ++c)
      fill(group, c);
    if (c == clients)
      return last_pass(sums, group, total, n, out);
    add_pass(sums, group, total, n, room);
    sums = room;
  }
}

// Calls f(begin, end) for parts of at most kSumTile elements and adds up what it returns.
template <class F>
int64_t count_by_tiles(int64_t n, int threads, F&& f) {
  std::atomic<int64_t> count{0};
  parallel_ranges(n, piece_of(n, kSumPiece, kSumTile, threads), threads,
                  [&](int64_t begin, int64_t end) {
                    int64_t counted = 0;
                    for (; begin < end; begin += kSumTile)
                      counted += f(begin, std::min(begin + kSumTile, end));
                    count.fetch_add(counted, std::memory_order_relaxed);
                  });
  return count;
}

// Calls f(at, n) for the parts of [begin, end) that have one scale each.
template <class F>
void for_blocks(int64_t begin, int64_t end, int64_t block, F&& f) {
  for (int64_t at = begin, next; at < end; at = next) {
    next = std::min(end, at / block * block + block);
    f(at, next - at);
  }
}

double total(const std::vector<double>& weights) {
  double sum = 0;
  for (double weight : weights)
    sum += weight;
  return sum;
}

} // namespace

int64_t weighted_mean(const std::vector<const void*>& payloads, int dtype,
                      const std::vector<double>& weights, int64_t n, void* out, int out_dtype,
                      int threads) {
  const int clients = static_cast<int>(payloads.size());
  int64_t bad = 0;
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_float_type(out_dtype, [&](auto* out_type) {
      using Out = std::remove_pointer_t<decltype(out_type)>;
      const int64_t bytes = n * clients * static_cast<int64_t>(sizeof(T));
      bad = count_by_tiles(n, threads_for(bytes, threads), [&](int64_t begin, int64_t end) {
        return mean_of<T>(clients, total(weights), end - begin, static_cast<Out*>(out) + begin,
                          [&](Group<T>& group, int c) {
                            group.push(static_cast<const T*>(payloads[c]) + begin, weights[c]);
                          });
      });
    });
  });
  return bad;
}

void accumulate_add(double* sums, const void* payload, int dtype, double weight, int64_t n,
                    int threads) {
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto add = FEDMAP_DISPATCH(add<T, double>);
    count_by_tiles(n, threads_for(16 * n, threads), [&](int64_t begin, int64_t end) {
      Group<T> one;
      one.push(static_cast<const T*>(payload) + begin, weight);
      return add(sums + begin, one, 1, end - begin, sums + begin);
    });
  });
}

void accumulate_add_int8(double* sums, const int8_t* payload, const float* scales, int64_t block,
                         double weight, int64_t n, int threads) {
  const auto add = FEDMAP_DISPATCH(add<int8_t, double>);
  count_by_tiles(n, threads_for(16 * n, threads), [&](int64_t begin, int64_t end) {
    for_blocks(begin, end, block, [&](int64_t at, int64_t size) {
      Group<int8_t> one;
      one.push(payload + at, weight, scales[at / block]);
      add(sums + at, one, 1, size, sums + at);
    });
    return 0;
  });
}

int64_t accumulate_mean(const double* sums, double total_weight, int64_t n, void* out,
                        int out_dtype, int threads) {
  int64_t bad = 0;
  with_float_type(out_dtype, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    const auto add = FEDMAP_DISPATCH(add<float, Out>);
    bad = count_by_tiles(n, threads_for(8 * n, threads), [&](int64_t begin, int64_t end) {
      return add(sums + begin, Group<float>{}, total_weight, end - begin,
                 static_cast<Out*>(out) + begin);
    });
  });
  return bad;
}

} // namespace fedmap
