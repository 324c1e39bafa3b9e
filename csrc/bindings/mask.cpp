#include "mask/mask.h"

#include "bindings/args.h"

namespace fedmap {
namespace {

const Binding binding([](py::module_& m) {
  m.def(
      "rank_index",
      [](const Flat& words, int64_t numel, const Flat& rank, int threads) {
        const Bits mask{words, rank, numel};
        require(mask.fit());
        return rank_index(mask.bits(), numel, mask.ranks(), threads);
      },
      Unlocked());
  m.def(
      "mask_from_bools",
      [](const Flat& bools, const Flat& words, int threads) {
        require(bools.dtype == kBool && words.is(kInt32, mask_words(bools.numel)));
        mask_from_bools(bools.as<uint8_t>(), bools.numel, words.as<uint32_t>(), threads);
      },
      Unlocked());
  m.def(
      "mask_to_bools",
      [](const Flat& words, const Flat& bools, int threads) {
        require(bools.dtype == kBool && words.is(kInt32, mask_words(bools.numel)));
        mask_to_bools(words.as<uint32_t>(), bools.numel, bools.as<uint8_t>(), threads);
      },
      Unlocked());
  m.def(
      "mask_subset",
      [](const Flat& a, const Flat& b, int threads) {
        require(a.dtype == kInt32 && b.is(kInt32, a.numel));
        return mask_subset(a.as<uint32_t>(), b.as<uint32_t>(), 32 * a.numel, threads);
      },
      Unlocked());
  m.def("mask_digest", [](const Flat& words, int64_t numel, int threads) {
    require(numel >= 0 && words.is(kInt32, mask_words(numel)));
    std::array<uint64_t, 2> sums;
    {
      Unlock unlocked;
      sums = mask_digest(words.as<uint32_t>(), numel, threads);
    }
    char bytes[16];
    for (int i = 0; i < 16; ++i)
      bytes[i] = static_cast<char>(sums[i / 8] >> (8 * (i % 8)));
    return py::bytes(bytes, sizeof bytes);
  });
  m.def(
      "ranks_at",
      [](const Flat& words, const Flat& rank, const Flat& positions, const Flat& out) {
        require(words.dtype == kInt32 && rank.dtype == kInt64 && positions.dtype == kInt64 &&
                rank.numel == (words.numel + kBlockWords - 1) / kBlockWords + 1 &&
                out.is(kInt64, positions.numel));
        const int64_t* at = positions.as<int64_t>();
        require(std::all_of(at, at + positions.numel,
                            [&](int64_t p) { return 0 <= p && p <= 32 * words.numel; }));
        ranks_at(words.as<uint32_t>(), rank.as<int64_t>(), at, positions.numel, out.as<int64_t>());
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
