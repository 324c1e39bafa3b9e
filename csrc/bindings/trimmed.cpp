#include "trimmed/trimmed.h"

#include "bindings/args.h"

namespace fedmap {
namespace {

const Binding binding([](py::module_& m) {
  m.def(
      "trimmed_mean",
      [](const Flats& vectors, int64_t trim, const Flat& out, int threads, bool attempt) -> Answer {
        const auto count = static_cast<int64_t>(vectors.size());
        if ((attempt && !(ordinary(vectors) && out.ordinary)) || !out.is(kFloat32, out.numel) ||
            !vectors_of(vectors, out.numel) || !count || trim < 0 || trim > (count - 1) / 2)
          return unfit(attempt);
        return trimmed_mean(addresses(vectors), static_cast<int>(trim), out.numel, out.as<float>(),
                            threads);
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
