#include "noise/noise.h"

#include <cmath>

#include "bindings/args.h"

namespace fedmap {
namespace {

const Binding binding([](py::module_& m) {
  m.def(
      "add_gaussian",
      [](const Flat& values, double std, int64_t seed, int64_t stream, int threads,
         bool attempt) -> Answer {
        if ((attempt && !values.ordinary) || !values.is(kFloat32, values.numel) || !(std >= 0) ||
            !std::isfinite(std) || seed < 0 || stream < 0)
          return unfit(attempt);
        add_gaussian(values.as<float>(), values.numel, std, static_cast<uint64_t>(seed),
                     static_cast<uint64_t>(stream), threads);
        return 0;
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
