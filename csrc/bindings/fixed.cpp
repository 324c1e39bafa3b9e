#include "fixed/fixed.h"

#include <cmath>

#include "bindings/args.h"

namespace fedmap {
namespace {

bool is_positive(double x) {
  return x > 0 && std::isfinite(x);
}

const Binding binding([](py::module_& m) {
  m.def(
      "to_fixed",
      [](const Flat& values, double clip, double scale, int64_t weight, const Flat& out,
         int threads, bool attempt) -> Answer {
        const int64_t n = values.numel;
        if ((attempt && !ordinary(values, out)) || !values.is(kFloat32, n) || !out.is(kInt32, n) ||
            !is_positive(clip) || !is_positive(scale) || weight < 1 || weight > INT32_MAX ||
            !(clip * scale * static_cast<double>(weight) < INT32_MAX))
          return unfit(attempt);
        return to_fixed(values.as<float>(), n, clip, scale, static_cast<int32_t>(weight),
                        out.as<int32_t>(), threads);
      },
      Unlocked());
  m.def(
      "from_fixed",
      [](const Flat& sums, double divisor, const Flat& out, int threads, bool attempt) -> Answer {
        const int64_t n = sums.numel;
        if ((attempt && !ordinary(sums, out)) || !sums.is(kInt32, n) || !out.is(kFloat32, n) ||
            !is_positive(divisor))
          return unfit(attempt);
        from_fixed(sums.as<int32_t>(), n, divisor, out.as<float>(), threads);
        return 0;
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
