// Survivors side by side and back, in each pair of dtypes.
#include "check.h"
#include "core/bits.h"
#include "core/dtype.h"
#include "pack/pack.h"

namespace selfcheck {
namespace {

void check_one(int64_t n, int dtype, int other, double density, const std::vector<int>& threads) {
  const Bitmap mask = random_bitmap(n, density, static_cast<uint64_t>(n) + 41);
  const int64_t width = fedmap::dtype_bytes(dtype), other_width = fedmap::dtype_bytes(other);
  Buffer<uint8_t> values(n * width, n % 2 * width);
  fill(values.data(), dtype, n, static_cast<uint64_t>(n) + 42, Kind::special);
  const std::string name = label("pack", n) + " " + name_of_dtype(dtype) + " to " +
                           name_of_dtype(other) + " density " + std::to_string(density);
  compare(
      name,
      [&](int t, Outcome& out) {
        Buffer<uint8_t> packed(mask.nnz * other_width, n % 3 * other_width);
        out.add_value(fedmap::pack(values.data(), dtype, mask.words.data(), mask.rank.data(), n,
                                   packed.data(), other, t));
        out.add(packed);
        Buffer<uint8_t> back(n * width, n % 3 * width);
        fedmap::unpack(packed.data(), other, mask.words.data(), mask.rank.data(), n, back.data(),
                       dtype, t);
        out.add(back);
      },
      threads);
}

} // namespace

void check_pack() {
  constexpr int kDtypes[] = {fedmap::kFloat32, fedmap::kFloat16, fedmap::kBfloat16};
  for (int64_t n : edges())
    for (double density : {0.0, 0.02, 0.1, 0.6, 1.0})
      for (int dtype : kDtypes)
        for (int other : kDtypes)
          if (dtype == other || n % 16 == 1)
            check_one(n, dtype, other, density, {});
  for (double density : {0.02, 0.3})
    for (int dtype : kDtypes)
      check_one(kLarge, dtype, dtype, density, thread_counts());
  check_one(kLarge, fedmap::kFloat32, fedmap::kBfloat16, 0.3, thread_counts());
  // Above 16 MiB results go past the cache on processors that have such stores.
  check_one(4'200'001, fedmap::kFloat32, fedmap::kFloat32, 1.0, {2});
}

} // namespace selfcheck
