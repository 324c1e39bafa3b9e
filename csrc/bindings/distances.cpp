#include "distances/distances.h"

#include "bindings/args.h"

namespace fedmap {
namespace {

const Binding binding([](py::module_& m) {
  m.def(
      "squared_distances",
      [](const Flats& vectors, const Flats& others, const Flat& out, int threads,
         bool attempt) -> Answer {
        const auto rows = static_cast<int64_t>(vectors.size());
        const auto width = static_cast<int64_t>((others.empty() ? vectors : others).size());
        if ((attempt && !(ordinary(vectors) && ordinary(others))) || !rows ||
            !vectors_of(vectors, vectors[0].numel) || !vectors_of(others, vectors[0].numel) ||
            !out.is(kFloat64, rows * width))
          return unfit(attempt);
        squared_distances(addresses(vectors), addresses(others), vectors[0].numel, out.as<double>(),
                          threads);
        return 0;
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
