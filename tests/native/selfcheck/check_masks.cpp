// Bitmaps: ranks, conversions, digests, subsets; extract and deposit.
#include <array>

#include "check.h"
#include "core/bits.h"
#include "extract/extract.h"
#include "mask/mask.h"

namespace selfcheck {
namespace {

void check_one(int64_t n, double density, const std::vector<int>& threads) {
  const Bitmap mask = random_bitmap(n, density, static_cast<uint64_t>(n) + 1);
  const uint32_t* words = mask.words.data();
  const int64_t shift = n % 3; // off alignment
  compare(
      label("rank_index", n),
      [&](int t, Outcome& out) {
        Buffer<int64_t> rank(fedmap::mask_blocks(n) + 1);
        out.add_value(fedmap::rank_index(words, n, rank.data(), t));
        out.add(rank);
      },
      threads);
  compare(
      label("bools", n),
      [&](int t, Outcome& out) {
        Buffer<uint8_t> bools(n, shift);
        fedmap::mask_to_bools(words, n, bools.data(), t);
        out.add(bools);
        for (int64_t i = 0; i < n; ++i) // any byte but 0 is true
          bools[i] = static_cast<uint8_t>(bools[i] * (1 + i % 255));
        Buffer<uint32_t> back(fedmap::mask_words(n), shift);
        fedmap::mask_from_bools(bools.data(), n, back.data(), t);
        out.add(back);
        for (int64_t w = 0; w < back.size(); ++w)
          if (back[w] != words[w])
            fail(label("bools there and back", n));
      },
      threads);
  compare(
      label("digest", n),
      [&](int t, Outcome& out) {
        const std::array<uint64_t, 2> digest = fedmap::mask_digest(words, n, t);
        out.add_value(digest[0]);
        out.add_value(digest[1]);
      },
      threads);
  compare(
      label("subset", n),
      [&](int t, Outcome& out) {
        Buffer<uint32_t> more(mask.words.size(), shift);
        for (int64_t w = 0; w < more.size(); ++w)
          more[w] = words[w] | 0x10010u;
        out.add_value(fedmap::mask_subset(words, more.data(), n, t));
        for (int64_t w : {int64_t{0}, more.size() / 2, more.size() - 1}) // one bit outside
          if (n && words[w]) {
            const uint32_t whole = more[w];
            more[w] &= ~(words[w] & (0 - words[w]));
            if (fedmap::mask_subset(words, more.data(), n, t))
              fail(label("a bit outside was not seen", n));
            more[w] = whole;
          }
      },
      threads);
}

void check_nested(int64_t n, double density, double of_parent, const std::vector<int>& threads) {
  const Bitmap parent = random_bitmap(n, density, static_cast<uint64_t>(n) + 2);
  const Bitmap child = random_bitmap(n, of_parent, static_cast<uint64_t>(n) + 3);
  compare(
      label("extract", n),
      [&](int t, Outcome& out) {
        Buffer<uint32_t> kept(fedmap::mask_words(parent.nnz));
        Buffer<int64_t> rank(fedmap::mask_blocks(parent.nnz) + 1);
        fedmap::extract(child.words.data(), parent.words.data(), parent.rank.data(), n, kept.data(),
                        rank.data(), t);
        out.add(kept);
        out.add(rank);
        Buffer<uint32_t> back(fedmap::mask_words(n));
        Buffer<int64_t> back_rank(fedmap::mask_blocks(n) + 1);
        fedmap::deposit(kept.data(), parent.words.data(), parent.rank.data(), n, back.data(),
                        back_rank.data(), t);
        out.add(back);
        out.add(back_rank);
        for (int64_t w = 0; w < back.size(); ++w)
          if (back[w] != (child.words[w] & parent.words[w])) {
            fail(label("extracted bits came back to other places", n));
            break;
          }
      },
      threads);
}

} // namespace

void check_masks() {
  for (int64_t n : edges())
    for (double density : {0.0, 0.3, 1.0})
      check_one(n, density, {});
  check_one(4 * kLarge, 0.2, thread_counts());
}

void check_extract() {
  for (int64_t n : edges())
    for (double density : {0.0, 0.1, 0.5, 1.0})
      check_nested(n, density, 0.4, {});
  for (double density : {0.02, 0.5})
    check_nested(4 * kLarge, density, 0.5, thread_counts());
}

} // namespace selfcheck
