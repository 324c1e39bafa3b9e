// Selection of the largest magnitudes, and zeroing what was pruned.
#include "check.h"
#include "core/bits.h"
#include "core/dtype.h"
#include "select/select.h"

namespace selfcheck {
namespace {

int64_t width(int dtype) {
  return fedmap::dtype_bytes(dtype);
}

void check_one(int64_t n, int dtype, Kind kind, double share, const Bitmap* within,
               const std::vector<int>& threads) {
  Buffer<uint8_t> values(n * width(dtype));
  fill(values.data(), dtype, n, static_cast<uint64_t>(n) + 11, kind);
  const int64_t eligible = within ? within->nnz : n;
  const int64_t keep = static_cast<int64_t>(share * static_cast<double>(eligible));
  if (keep < 1)
    return;
  const std::string name = label("select", n) + " " + name_of_dtype(dtype) + " " + name_of(kind) +
                           " keep=" + std::to_string(keep) + (within ? " within" : "");
  compare(
      name,
      [&](int t, Outcome& out) {
        Buffer<uint32_t> words(fedmap::mask_words(n));
        Buffer<int64_t> rank(fedmap::mask_blocks(n) + 1);
        const uint32_t* among = within ? within->words.data() : nullptr;
        out.add_value(fedmap::select({{values.data(), n, among, words.data(), rank.data()}}, dtype,
                                     eligible, keep, t));
        out.add(words);
        out.add(rank);
        if (rank[rank.size() - 1] != keep)
          fail(name + ": kept " + std::to_string(rank[rank.size() - 1]));
        out.add_value(fedmap::select({{values.data(), n, among, nullptr, nullptr}}, dtype, eligible,
                                     keep, t)); // the threshold alone
      },
      threads);
}

void check_two_tensors(int dtype) {
  constexpr int64_t kFirst = 40'001, kSecond = 9'000;
  Buffer<uint8_t> a(kFirst * width(dtype)), b(kSecond * width(dtype));
  fill(a.data(), dtype, kFirst, 21, Kind::normal);
  fill(b.data(), dtype, kSecond, 22, Kind::normal);
  compare("select from two tensors", [&](int t, Outcome& out) {
    Buffer<uint32_t> aw(fedmap::mask_words(kFirst)), bw(fedmap::mask_words(kSecond));
    Buffer<int64_t> ar(fedmap::mask_blocks(kFirst) + 1), br(fedmap::mask_blocks(kSecond) + 1);
    out.add_value(fedmap::select({{a.data(), kFirst, nullptr, aw.data(), ar.data()},
                                  {b.data(), kSecond, nullptr, bw.data(), br.data()}},
                                 dtype, kFirst + kSecond, 7'777, t));
    out.add(aw);
    out.add(ar);
    out.add(bw);
    out.add(br);
  });
}

void check_prune(int64_t n, int dtype, const std::vector<int>& threads) {
  const Bitmap before = random_bitmap(n, 0.7, 31), after = random_bitmap(n, 0.4, 32);
  for (const uint32_t* first : {before.words.data(), static_cast<const uint32_t*>(nullptr)})
    compare(
        label("zero_pruned", n) + " " + name_of_dtype(dtype),
        [&](int t, Outcome& out) {
          Buffer<uint8_t> values(n * width(dtype));
          fill(values.data(), dtype, n, 33, Kind::special);
          fedmap::zero_pruned(values.data(), first, after.words.data(), n, dtype, t);
          out.add(values);
        },
        threads);
}

} // namespace

void check_select() {
  for (int dtype : {fedmap::kFloat32, fedmap::kFloat16, fedmap::kBfloat16}) {
    for (int64_t n : edges()) {
      const Bitmap within = random_bitmap(n, 0.5, static_cast<uint64_t>(n) + 12);
      for (Kind kind : kKinds)
        for (const Bitmap* among : {&within, static_cast<const Bitmap*>(nullptr)})
          for (double share : {0.1, 0.5, 1.0})
            if (n < 3000 || share != 0.5)
              check_one(n, dtype, kind, share, among, {});
      check_prune(n, dtype, {});
    }
    const Bitmap within = random_bitmap(kLarge, 0.1, 13);
    for (Kind kind : kKinds)
      check_one(kLarge, dtype, kind, 0.1, nullptr, thread_counts());
    check_one(kLarge, dtype, Kind::normal, 0.5, &within, thread_counts());
    check_two_tensors(dtype);
    check_prune(kLarge, dtype, {2, 3});
  }
}

} // namespace selfcheck
