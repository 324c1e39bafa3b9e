// Weighted mean of packed payloads: float64 products and sums in the order given, divided by the
// total weight, rounded once. Contract: fedmap_sparse/ops/accumulate.py.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "kernels.h"
#include "pool.h"

namespace fedmap {

// Sums of a tile stay in L1 while the payloads stream past, kGroup of them a pass: the sums are
// loaded and stored once for so many, and the hardware prefetches so many streams. On Zen 4 one
// thread took as long as reading alone takes, for 10 to 500 payloads; 4 or 16 a pass took longer.
constexpr int64_t kTile = 1024;
constexpr int64_t kTaskTiles = 16;
constexpr int kGroup = 8;

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

namespace scalar {

template <class T>
static float value(const Group<T>& group, int c, int64_t i) {
  if constexpr (std::is_same_v<T, int8_t>)
    return static_cast<float>(group.payload[c][i]) * group.scale[c];
  else
    return widen(group.payload[c][i]);
}

template <class T>
static void add_from(int64_t i, double* sums, const Group<T>& group, int64_t n) {
  for (; i < n; ++i)
    for (int c = 0; c < group.count; ++c)
      sums[i] += group.weight[c] * static_cast<double>(value(group, c, i));
}

template <class T>
static void add(double* sums, const Group<T>& group, int64_t n) {
  add_from(0, sums, group, n);
}

// Returns how many results are NaN or infinite.
template <class T>
static int64_t mean_from(int64_t i, const double* sums, double total, int64_t n, T* out) {
  int64_t bad = 0;
  for (; i < n; ++i) {
    const float x = shorten<T>(sums[i] / total);
    bad += not_finite<T>(x);
    out[i] = narrow<T>(x);
  }
  return bad;
}

template <class T>
static int64_t mean(const double* sums, double total, int64_t n, T* out) {
  return mean_from(0, sums, total, n, out);
}

} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

template <class T>
inline __m256 value(const Group<T>& group, int c, int64_t i) {
  if constexpr (std::is_same_v<T, int8_t>) {
    const __m128i codes =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(group.payload[c] + i));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)) * group.scale[c];
  } else {
    return load(group.payload[c] + i);
  }
}

template <class T>
static void add(double* sums, const Group<T>& group, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m256d sum[4];
    for (int k = 0; k < 4; ++k)
      sum[k] = _mm256_loadu_pd(sums + i + 4 * k);
    for (int c = 0; c < group.count; ++c) {
      const __m256d weight = _mm256_set1_pd(group.weight[c]);
      for (int k = 0; k < 4; k += 2) {
        const __m256 x = value(group, c, i + 4 * k);
        sum[k] += weight * _mm256_cvtps_pd(_mm256_castps256_ps128(x));
        sum[k + 1] += weight * _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
      }
    }
    for (int k = 0; k < 4; ++k)
      _mm256_storeu_pd(sums + i + 4 * k, sum[k]);
  }
  scalar::add_from(i, sums, group, n);
}

template <class T>
static int64_t mean(const double* sums, double total, int64_t n, T* out) {
  int64_t i = 0, bad = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_set_m128(shorten<T>(_mm256_loadu_pd(sums + i + 4) / total),
                                     shorten<T>(_mm256_loadu_pd(sums + i) / total));
    bad += not_finite<T>(x);
    store(out + i, x);
  }
  return bad + scalar::mean_from(i, sums, total, n, out);
}

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512
namespace avx512 {

template <class T>
static void add(double* sums, const Group<T>& group, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m512d sum[4];
    for (int k = 0; k < 4; ++k)
      sum[k] = _mm512_loadu_pd(sums + i + 8 * k);
    for (int c = 0; c < group.count; ++c) {
      const __m512d weight = _mm512_set1_pd(group.weight[c]);
      for (int k = 0; k < 4; ++k)
        sum[k] += weight * _mm512_cvtps_pd(avx2::value(group, c, i + 8 * k));
    }
    for (int k = 0; k < 4; ++k)
      _mm512_storeu_pd(sums + i + 8 * k, sum[k]);
  }
  scalar::add_from(i, sums, group, n);
}

template <class T>
static int64_t mean(const double* sums, double total, int64_t n, T* out) {
  int64_t i = 0, bad = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 low = _mm512_castps256_ps512(shorten<T>(_mm512_loadu_pd(sums + i) / total));
    const __m512 x =
        _mm512_insertf32x8(low, shorten<T>(_mm512_loadu_pd(sums + i + 8) / total), 1);
    bad += not_finite<T>(x);
    store(out + i, x);
  }
  return bad + scalar::mean_from(i, sums, total, n, out);
}

} // namespace avx512
FEDMAP_TARGET_END
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

double total(const std::vector<double>& weights) {
  double sum = 0;
  for (double weight : weights)
    sum += weight;
  return sum;
}

// For each tile: zeroed sums, add_all(sums, begin, n), the mean.
template <class AddAll>
int64_t mean_by_tiles(int64_t n, double total, void* out, int out_dtype, int threads,
                      AddAll&& add_all) {
  std::atomic<int64_t> bad{0};
  with_float_type(out_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto mean = FEDMAP_DISPATCH(mean<T>);
    parallel_ranges(n, kTaskTiles * kTile, threads, [&](int64_t begin, int64_t end) {
      alignas(64) double sums[kTile];
      int64_t task_bad = 0;
      for (; begin < end; begin += kTile) {
        const int64_t size = std::min(kTile, end - begin);
        std::memset(sums, 0, size * sizeof(double));
        add_all(sums, begin, size);
        task_bad += mean(sums, total, size, static_cast<T*>(out) + begin);
      }
      bad.fetch_add(task_bad, std::memory_order_relaxed);
    });
  });
  return bad;
}

// Adds elements [begin, begin + n) of int8 payloads, block by block of one scale each.
void add_blocks(double* sums, const std::vector<const int8_t*>& payloads,
                const std::vector<const float*>& scales, int64_t block,
                const std::vector<double>& weights, int64_t begin, int64_t n) {
  const auto add = FEDMAP_DISPATCH(add<int8_t>);
  for (int64_t at = begin, size; at < begin + n; at += size) {
    size = std::min(begin + n, at / block * block + block) - at;
    for (size_t c = 0; c < payloads.size();) {
      Group<int8_t> group;
      for (; c < payloads.size() && group.count < kGroup; ++c)
        group.push(payloads[c] + at, weights[c], scales[c][at / block]);
      add(sums + (at - begin), group, size);
    }
  }
}

} // namespace

int64_t weighted_mean(const std::vector<const void*>& payloads, int dtype,
                      const std::vector<double>& weights, int64_t n, void* out, int out_dtype,
                      int threads) {
  int64_t bad = 0;
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto add = FEDMAP_DISPATCH(add<T>);
    const int64_t bytes = n * static_cast<int64_t>(payloads.size() * sizeof(T));
    bad = mean_by_tiles(n, total(weights), out, out_dtype, threads_for(bytes, threads),
                        [&](double* sums, int64_t begin, int64_t size) {
                          for (size_t c = 0; c < payloads.size();) {
                            Group<T> group;
                            for (; c < payloads.size() && group.count < kGroup; ++c)
                              group.push(static_cast<const T*>(payloads[c]) + begin, weights[c]);
                            add(sums, group, size);
                          }
                        });
  });
  return bad;
}

int64_t weighted_mean_int8(const std::vector<const int8_t*>& payloads,
                           const std::vector<const float*>& scales, int64_t block,
                           const std::vector<double>& weights, int64_t n, void* out, int out_dtype,
                           int threads) {
  const int64_t bytes = n * static_cast<int64_t>(payloads.size());
  return mean_by_tiles(n, total(weights), out, out_dtype, threads_for(bytes, threads),
                       [&](double* sums, int64_t begin, int64_t size) {
                         add_blocks(sums, payloads, scales, block, weights, begin, size);
                       });
}

void accumulate_add(double* sums, const void* payload, int dtype, double weight, int64_t n,
                    int threads) {
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto add = FEDMAP_DISPATCH(add<T>);
    parallel_ranges(n, kTaskTiles * kTile, threads_for(16 * n, threads),
                    [&](int64_t begin, int64_t end) {
                      Group<T> one;
                      one.push(static_cast<const T*>(payload) + begin, weight);
                      add(sums + begin, one, end - begin);
                    });
  });
}

void accumulate_add_int8(double* sums, const int8_t* payload, const float* scales, int64_t block,
                         double weight, int64_t n, int threads) {
  parallel_ranges(n, kTaskTiles * kTile, threads_for(16 * n, threads),
                  [&](int64_t begin, int64_t end) {
                    add_blocks(sums + begin, {payload}, {scales}, block, {weight}, begin,
                               end - begin);
                  });
}

int64_t accumulate_mean(const double* sums, double total_weight, int64_t n, void* out,
                        int out_dtype, int threads) {
  std::atomic<int64_t> bad{0};
  with_float_type(out_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto mean = FEDMAP_DISPATCH(mean<T>);
    parallel_ranges(n, kTaskTiles * kTile, threads_for(8 * n, threads),
                    [&](int64_t begin, int64_t end) {
                      bad += mean(sums + begin, total_weight, end - begin,
                                  static_cast<T*>(out) + begin);
                    });
  });
  return bad;
}

} // namespace fedmap
