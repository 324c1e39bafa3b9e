#include "clip/clip.h"

#include <cmath>

#include "bindings/args.h"

namespace fedmap {
namespace {

const Binding binding([](py::module_& m) {
  m.def(
      "clip_difference",
      [](const Flat& values, const Flat& start, double max_norm, int threads,
         bool attempt) -> std::optional<double> {
        if ((attempt && !ordinary(values, start)) || !values.is(kFloat32, values.numel) ||
            !start.is(kFloat32, values.numel) || !(max_norm > 0 && std::isfinite(max_norm))) {
          unfit(attempt);
          return std::nullopt;
        }
        return clip_difference(values.as<float>(), start.as<float>(), values.numel, max_norm,
                               threads);
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
