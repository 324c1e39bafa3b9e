#include "extract/extract.h"

#include "bindings/args.h"

namespace fedmap {
namespace {

const Binding binding([](py::module_& m) {
  m.def(
      "extract",
      [](const Flat& child, const Flat& parent, const Flat& parent_rank, int64_t numel,
         const Flat& out, const Flat& rank, int threads, bool attempt) -> Answer {
        const Bits whole{parent, parent_rank, numel};
        if ((attempt && !ordinary(child, parent, parent_rank)) || !whole.fit() ||
            !child.is(kInt32, mask_words(numel)))
          return unfit(attempt);
        const Bits part{out, rank, whole.nnz()};
        if (!part.fit())
          return unfit(attempt);
        extract(child.as<uint32_t>(), whole.bits(), whole.ranks(), numel, part.bits(), part.ranks(),
                threads);
        return part.nnz();
      },
      Unlocked());
  m.def(
      "deposit",
      [](const Flat& kept, const Flat& parent, const Flat& parent_rank, int64_t numel,
         const Flat& out, const Flat& rank, int threads, bool attempt) -> Answer {
        const Bits whole{parent, parent_rank, numel}, deposited{out, rank, numel};
        if ((attempt && !ordinary(kept, parent, parent_rank)) || !whole.fit() || !deposited.fit() ||
            !kept.is(kInt32, mask_words(whole.nnz())))
          return unfit(attempt);
        deposit(kept.as<uint32_t>(), whole.bits(), whole.ranks(), numel, deposited.bits(),
                deposited.ranks(), threads);
        return deposited.nnz();
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
