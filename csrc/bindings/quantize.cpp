#include "quantize/quantize.h"

#include "bindings/args.h"

namespace fedmap {
namespace {

bool is_block(int64_t block) {
  return 64 <= block && block <= 1024 && block % 64 == 0;
}

int64_t blocks_of(int64_t numel, int64_t block) {
  return (numel + block - 1) / block;
}

const Binding binding([](py::module_& m) {
  m.def(
      "cast",
      [](const Flat& values, const Flat& out, int threads, bool attempt) -> Answer {
        if ((attempt && !ordinary(values, out)) || !values.is_values(values.numel) ||
            !out.is_values(values.numel))
          return unfit(attempt);
        return cast(values.data, values.dtype, out.data, out.dtype, values.numel, threads);
      },
      Unlocked());
  m.def(
      "all_finite",
      [](const Flat& values, int threads, bool attempt) -> Answer {
        if ((attempt && !values.ordinary) || !values.is_values(values.numel))
          return unfit(attempt);
        return all_finite(values.data, values.dtype, values.numel, threads);
      },
      Unlocked());
  m.def(
      "quantize_int8",
      [](const Flat& values, int64_t block, const Flat& q, const Flat& scales, const Flat& residual,
         int threads, bool attempt) -> Answer {
        const int64_t n = values.numel;
        if ((attempt && !ordinary(values, q, scales, residual)) || !values.is(kFloat32, n) ||
            !is_block(block) || !q.is(kInt8, n) || !scales.is(kFloat32, blocks_of(n, block)) ||
            !(residual.is_none() || residual.is(kFloat32, n)))
          return unfit(attempt);
        quantize_int8(values.as<float>(), n, block, q.as<int8_t>(), scales.as<float>(),
                      residual.as<float>(), threads);
        return 0;
      },
      Unlocked());
  m.def(
      "dequantize_int8",
      [](const Flat& q, const Flat& scales, int64_t block, const Flat& out, int threads,
         bool attempt) -> Answer {
        const int64_t n = q.numel;
        if ((attempt && !ordinary(q, scales, out)) || !q.is(kInt8, n) || !is_block(block) ||
            !scales.is(kFloat32, blocks_of(n, block)) || !out.is(kFloat32, n))
          return unfit(attempt);
        dequantize_int8(q.as<int8_t>(), scales.as<float>(), block, n, out.as<float>(), threads);
        return 0;
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
