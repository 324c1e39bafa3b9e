// Weighted means, casts, and int8 by blocks.
#include "accumulate/accumulate.h"
#include "check.h"
#include "core/dtype.h"
#include "core/half.h"
#include "quantize/quantize.h"

namespace selfcheck {
namespace {

constexpr int kDtypes[] = {fedmap::kFloat32, fedmap::kFloat16, fedmap::kBfloat16};

void check_mean(int64_t n, int clients, int dtype, int out_dtype, Kind kind,
                const std::vector<int>& threads) {
  std::vector<Buffer<uint8_t>> payloads;
  std::vector<const void*> pointers;
  std::vector<double> weights;
  const int64_t width = fedmap::dtype_bytes(dtype);
  for (int c = 0; c < clients; ++c) {
    payloads.emplace_back(n * width, c % 3 * width);
    fill(payloads.back().data(), dtype, n, 61 + static_cast<uint64_t>(c), kind);
    pointers.push_back(payloads.back().data());
    weights.push_back(1.0 + c * 0.37);
  }
  const std::string name = label("mean", n) + " of " + std::to_string(clients) + " " +
                           name_of_dtype(dtype) + " to " + name_of_dtype(out_dtype) + " " +
                           name_of(kind);
  compare(
      name,
      [&](int t, Outcome& out) {
        Buffer<uint8_t> mean(n * fedmap::dtype_bytes(out_dtype));
        out.add_value(
            fedmap::weighted_mean(pointers, dtype, weights, n, mean.data(), out_dtype, t));
        out.add_results(mean, out_dtype);
        Buffer<double> sums(n, 1);
        for (int64_t i = 0; i < n; ++i)
          sums[i] = 0;
        for (int c = 0; c < clients && c < 3; ++c)
          fedmap::accumulate_add(sums.data(), pointers[static_cast<size_t>(c)], dtype,
                                 weights[static_cast<size_t>(c)], n, t);
        out.add_results(sums);
        Buffer<uint8_t> again(n * fedmap::dtype_bytes(out_dtype));
        out.add_value(fedmap::accumulate_mean(sums.data(), 2.37, n, again.data(), out_dtype, t));
        out.add_results(again, out_dtype);
      },
      threads);
}

// Sums that lie between two values of the result's dtype, where a rounding in two steps goes wrong.
void check_double_rounding(int out_dtype) {
  constexpr int64_t kCount = 4096;
  Buffer<double> sums(kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    const float at = float_at(71, static_cast<uint64_t>(i), Kind::normal);
    const float half = out_dtype == fedmap::kFloat16
                           ? fedmap::bits_float(fedmap::float_bits(at) & ~0xfffu)
                           : fedmap::bits_float(fedmap::float_bits(at) & ~0x7fffu);
    sums[i] = static_cast<double>(half) * (1 + (i % 3 - 1) * 0x1p-40);
  }
  compare("mean of sums near ties", [&](int t, Outcome& out) {
    Buffer<uint8_t> mean(kCount * fedmap::dtype_bytes(out_dtype));
    out.add_value(fedmap::accumulate_mean(sums.data(), 1.0, kCount, mean.data(), out_dtype, t));
    out.add(mean);
  });
}

void check_cast(int64_t n, int from, int to, Kind kind, const std::vector<int>& threads) {
  const int64_t width = fedmap::dtype_bytes(from), to_width = fedmap::dtype_bytes(to);
  Buffer<uint8_t> src(n * width, n % 3 * width);
  fill(src.data(), from, n, 81, kind);
  compare(
      label("cast", n) + " " + name_of_dtype(from) + " to " + name_of_dtype(to),
      [&](int t, Outcome& out) {
        Buffer<uint8_t> dst(n * to_width, n % 2 * to_width);
        out.add_value(fedmap::cast(src.data(), from, dst.data(), to, n, t));
        out.add(dst);
        out.add_value(fedmap::all_finite(src.data(), from, n, t));
      },
      threads);
}

// All 16-bit patterns widened, NaN payloads too; and each one's neighbours and ties narrowed.
void check_every_half(int dtype) {
  Buffer<uint16_t> all(65536);
  for (int64_t i = 0; i < 65536; ++i)
    all[i] = static_cast<uint16_t>(i);
  Buffer<float> wide(65536);
  compare("every 16-bit pattern widened", [&](int t, Outcome& out) {
    fedmap::cast(all.data(), dtype, wide.data(), fedmap::kFloat32, 65536, t);
    out.add(wide);
  });
  Buffer<float> near(5 * 65536);
  const uint32_t tie = dtype == fedmap::kFloat16 ? 0x1000 : 0x8000;
  for (int64_t i = 0; i < 65536; ++i) {
    const uint32_t bits = fedmap::float_bits(wide[i]);
    const uint32_t around[5] = {bits - 1, bits + 1, bits + tie - 1, bits + tie, bits + tie + 1};
    for (int k = 0; k < 5; ++k)
      near[5 * i + k] = fedmap::bits_float(around[k]);
  }
  compare("what lies around each 16-bit value narrowed", [&](int t, Outcome& out) {
    Buffer<uint16_t> narrowed(near.size());
    out.add_value(
        fedmap::cast(near.data(), fedmap::kFloat32, narrowed.data(), dtype, near.size(), t));
    out.add(narrowed);
  });
}

void check_int8(int64_t n, int64_t block, Kind kind, const std::vector<int>& threads) {
  Buffer<float> src(n, n % 3);
  fill(src.data(), fedmap::kFloat32, n, 91, kind);
  if (kind == Kind::special) // infinities and NaN have no int8 form: callers refuse them
    for (int64_t i = 0; i < n; ++i)
      if ((fedmap::float_bits(src[i]) & 0x7fffffff) > 0x7e000000)
        src[i] = 1;
  const int64_t blocks = (n + block - 1) / block;
  for (bool feedback : {false, true})
    compare(
        label("int8", n) + " blocks of " + std::to_string(block) +
            (feedback ? " with residual" : ""),
        [&](int t, Outcome& out) {
          Buffer<int8_t> codes(n, n % 2);
          Buffer<float> scales(blocks), residual(n, 1), back(n, n % 2);
          fill(residual.data(), fedmap::kFloat32, n, 92, Kind::ties);
          fedmap::quantize_int8(src.data(), n, block, codes.data(), scales.data(),
                                feedback ? residual.data() : nullptr, t);
          fedmap::dequantize_int8(codes.data(), scales.data(), block, n, back.data(), t);
          Buffer<double> sums(n);
          for (int64_t i = 0; i < n; ++i)
            sums[i] = 0.25;
          fedmap::accumulate_add_int8(sums.data(), codes.data(), scales.data(), block, 1.7, n, t);
          out.add(codes);
          out.add(scales);
          out.add(residual);
          out.add(back);
          out.add(sums);
        },
        threads);
}

} // namespace

void check_accumulate() {
  for (int64_t n : edges())
    for (int dtype : kDtypes)
      for (int out_dtype : kDtypes)
        if (n < 3000 && (dtype == out_dtype || n % 8 == 1))
          for (Kind kind : {Kind::normal, Kind::special})
            check_mean(n, n % 5 == 0 ? 13 : 3, dtype, out_dtype, kind, {});
  for (int clients : {1, 12, 13, 25, 40})
    check_mean(1500, clients, fedmap::kFloat32, fedmap::kFloat32, Kind::normal, {});
  check_mean(kLarge / 4, 5, fedmap::kFloat32, fedmap::kFloat32, Kind::normal, thread_counts());
  check_mean(kLarge / 4, 5, fedmap::kBfloat16, fedmap::kBfloat16, Kind::normal, thread_counts());
  for (int dtype : kDtypes)
    check_double_rounding(dtype);
}

void check_quantize() {
  for (int64_t n : edges()) {
    for (int from : kDtypes)
      for (int to : kDtypes)
        for (Kind kind : {Kind::normal, Kind::special})
          check_cast(n, from, to, kind, {});
    if (n < 3000)
      for (int64_t block : {1, 7, 64, 128, 1024})
        for (Kind kind : kKinds)
          check_int8(n, block, kind, {});
  }
  check_every_half(fedmap::kFloat16);
  check_every_half(fedmap::kBfloat16);
  check_cast(kLarge, fedmap::kFloat32, fedmap::kBfloat16, Kind::special, thread_counts());
  check_cast(kLarge, fedmap::kFloat16, fedmap::kFloat32, Kind::special, thread_counts());
  check_int8(kLarge, 256, Kind::normal, thread_counts());
  check_cast(4'200'001, fedmap::kBfloat16, fedmap::kFloat32, Kind::normal, {2}); // past the cache
}

} // namespace selfcheck
