// Weighted mean of packed payloads: float64 products and sums in the order given, divided by the
// total weight, rounded once. Contract: fedmap_sparse/ops/accumulate.py.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "half.h"
#include "kernels.h"
#include "pool.h"

namespace fedmap {

// Sums of a tile stay in L1 while the payloads stream past, kGroup of them a pass.
constexpr int64_t kTile = 2048;
constexpr int64_t kTaskTiles = 8;
constexpr int kGroup = 4;

template <class T>
struct Group {
  const T* payload[kGroup];
  double weight[kGroup];
};

namespace scalar {

template <class T, int kCount>
static void add_from(int64_t i, double* sums, const Group<T>& group, int64_t n) {
  for (; i < n; ++i)
    for (int c = 0; c < kCount; ++c)
      sums[i] += group.weight[c] * static_cast<double>(widen(group.payload[c][i]));
}

template <class T, int kCount>
static void add(double* sums, const Group<T>& group, int64_t n) {
  add_from<T, kCount>(0, sums, group, n);
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

template <class T, int kCount>
static void add(double* sums, const Group<T>& group, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256d low = _mm256_loadu_pd(sums + i), high = _mm256_loadu_pd(sums + i + 4);
    for (int c = 0; c < kCount; ++c) {
      const __m256 x = load(group.payload[c] + i);
      const __m256d weight = _mm256_set1_pd(group.weight[c]);
      low += weight * _mm256_cvtps_pd(_mm256_castps256_ps128(x));
      high += weight * _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    }
    _mm256_storeu_pd(sums + i, low);
    _mm256_storeu_pd(sums + i + 4, high);
  }
  scalar::add_from<T, kCount>(i, sums, group, n);
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

template <class T, int kCount>
static void add(double* sums, const Group<T>& group, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512d low = _mm512_loadu_pd(sums + i), high = _mm512_loadu_pd(sums + i + 8);
    for (int c = 0; c < kCount; ++c) {
      const __m512 x = load(group.payload[c] + i);
      const __m512d weight = _mm512_set1_pd(group.weight[c]);
      low += weight * _mm512_cvtps_pd(_mm512_castps512_ps256(x));
      high += weight * _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    }
    _mm512_storeu_pd(sums + i, low);
    _mm512_storeu_pd(sums + i + 8, high);
  }
  scalar::add_from<T, kCount>(i, sums, group, n);
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

// For each tile: zeroed sums, add_all(sums, begin, n), the mean. Tiles are multiples of `step`.
template <class AddAll>
int64_t mean_by_tiles(int64_t n, int64_t step, double total, void* out, int out_dtype, int threads,
                      AddAll&& add_all) {
  std::atomic<int64_t> bad{0};
  const int64_t tile = kTile / step * step;
  with_float_type(out_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto mean = FEDMAP_DISPATCH(mean<T>);
    parallel_ranges(n, kTaskTiles * tile, threads, [&](int64_t begin, int64_t end) {
      alignas(64) double sums[kTile];
      int64_t task_bad = 0;
      for (; begin < end; begin += tile) {
        const int64_t size = std::min(tile, end - begin);
        std::memset(sums, 0, size * sizeof(double));
        add_all(sums, begin, size);
        task_bad += mean(sums, total, size, static_cast<T*>(out) + begin);
      }
      bad.fetch_add(task_bad, std::memory_order_relaxed);
    });
  });
  return bad;
}

} // namespace

int64_t weighted_mean(const std::vector<const void*>& payloads, int dtype,
                      const std::vector<double>& weights, int64_t n, void* out, int out_dtype,
                      int threads) {
  int64_t bad = 0;
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto add_group = FEDMAP_DISPATCH(add<T, kGroup>);
    const auto add_one = FEDMAP_DISPATCH(add<T, 1>);
    const size_t clients = payloads.size();
    const int64_t bytes = n * static_cast<int64_t>(clients * sizeof(T));
    bad = mean_by_tiles(n, 1, total(weights), out, out_dtype, threads_for(bytes, threads),
                        [&](double* sums, int64_t begin, int64_t size) {
                          for (size_t c = 0; c < clients;) {
                            const size_t count = clients - c >= kGroup ? kGroup : 1;
                            Group<T> group{};
                            for (size_t k = 0; k < count; ++k) {
                              group.payload[k] = static_cast<const T*>(payloads[c + k]) + begin;
                              group.weight[k] = weights[c + k];
                            }
                            (count == kGroup ? add_group : add_one)(sums, group, size);
                            c += count;
                          }
                        });
  });
  return bad;
}

int64_t weighted_mean_int8(const std::vector<const int8_t*>& payloads,
                           const std::vector<const float*>& scales, int64_t block,
                           const std::vector<double>& weights, int64_t n, void* out, int out_dtype,
                           int threads) {
  const auto add_one = FEDMAP_DISPATCH(add<float, 1>);
  const int64_t bytes = n * static_cast<int64_t>(payloads.size());
  return mean_by_tiles(n, block, total(weights), out, out_dtype, threads_for(bytes, threads),
                       [&](double* sums, int64_t begin, int64_t size) {
                         alignas(64) float values[kTile];
                         for (size_t c = 0; c < payloads.size(); ++c) {
                           dequantize_int8(payloads[c] + begin, scales[c] + begin / block, block,
                                           size, values, 1);
                           add_one(sums, {{values}, {weights[c]}}, size);
                         }
                       });
}

void accumulate_add(double* sums, const void* payload, int dtype, double weight, int64_t n,
                    int threads) {
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto add_one = FEDMAP_DISPATCH(add<T, 1>);
    const T* values = static_cast<const T*>(payload);
    parallel_ranges(n, kTaskTiles * kTile, threads_for(16 * n, threads),
                    [&](int64_t begin, int64_t end) {
                      add_one(sums + begin, {{values + begin}, {weight}}, end - begin);
                    });
  });
}

void accumulate_add_int8(double* sums, const int8_t* payload, const float* scales, int64_t block,
                         double weight, int64_t n, int threads) {
  const auto add_one = FEDMAP_DISPATCH(add<float, 1>);
  const int64_t tile = kTile / block * block;
  parallel_ranges(n, tile, threads_for(16 * n, threads), [&](int64_t begin, int64_t end) {
    alignas(64) float values[kTile];
    dequantize_int8(payload + begin, scales + begin / block, block, end - begin, values, 1);
    add_one(sums + begin, {{values}, {weight}}, end - begin);
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
