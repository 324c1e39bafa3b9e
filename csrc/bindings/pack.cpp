#include "pack/pack.h"

#include "bindings/args.h"

namespace fedmap {
namespace {

const Binding binding([](py::module_& m) {
  m.def(
      "pack",
      [](const Flat& values, const Flat& words, const Flat& rank, const Flat& out, int threads,
         bool attempt) -> Answer {
        const Bits mask{words, rank, values.numel};
        if ((attempt && !ordinary(values, words, rank, out)) || !values.is_values(values.numel) ||
            !mask.fit() || !out.is_values(mask.nnz()))
          return unfit(attempt);
        return pack(values.data, values.dtype, mask.bits(), mask.ranks(), mask.numel, out.data,
                    out.dtype, threads);
      },
      Unlocked());
  m.def(
      "unpack",
      [](const Flat& packed, const Flat& words, const Flat& rank, const Flat& out, int threads,
         bool attempt) -> Answer {
        const Bits mask{words, rank, out.numel};
        if ((attempt && !ordinary(packed, words, rank, out)) || !out.is_values(out.numel) ||
            !mask.fit() || !packed.is_values(mask.nnz()))
          return unfit(attempt);
        unpack(packed.data, packed.dtype, mask.bits(), mask.ranks(), mask.numel, out.data,
               out.dtype, threads);
        return 0;
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
