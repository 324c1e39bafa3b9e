// A child's bits over its parent's survivors (bit extract), and back (bit deposit).
#include <algorithm>
#include <cstring>

#include "cpu.h"
#include "kernels.h"
#include "pool.h"

namespace fedmap {
namespace {

constexpr int64_t kShareBlocks = 256; // one task: 64 KiB of each mask

uint64_t load_64(const uint32_t* words) {
  uint64_t word;
  std::memcpy(&word, words, sizeof word);
  return word;
}

// Appends bits to the array from `position` to `end`, both in bits. Other threads may share its
// first and last word: there bits are added atomically, onto zeros; all others are stored.
class BitWriter {
 public:
  BitWriter(uint32_t* words, uint64_t position, uint64_t end)
      : next_(words + position / 32), last_(words + end / 32), fill_(position % 32),
        shared_(fill_ > 0) {}

  void append_32(uint32_t bits, int count) {
    held_ |= static_cast<uint64_t>(bits) << fill_;
    fill_ += count;
    if (fill_ >= 32)
      flush_32();
  }

  // Whether 64 bits can be stored without reaching a shared word.
  bool roomy() const { return !shared_ && next_ + 2 <= last_; }

  // In roomy places alone. Stores what it has each time, complete or not: no branch to mispredict.
  void append_64(uint64_t bits, unsigned count) {
    const uint64_t low = held_ | bits << fill_, high = bits >> 1 >> (63 - fill_);
    std::memcpy(next_, &low, sizeof low);
    fill_ += count;
    const bool full = fill_ >= 64;
    held_ = full ? high : low;
    next_ += full ? 2 : 0;
    fill_ &= 63;
  }

  // Between append_64 and append_32 or finish.
  void settle() {
    if (fill_ >= 32)
      flush_32();
  }

  void finish() {
    if (fill_ > 0)
      add(static_cast<uint32_t>(held_));
  }

 private:
  void add(uint32_t bits) { __atomic_fetch_or(next_, bits, __ATOMIC_RELAXED); }

  void flush_32() {
    if (shared_)
      add(static_cast<uint32_t>(held_));
    else
      *next_ = static_cast<uint32_t>(held_);
    shared_ = false;
    ++next_;
    held_ >>= 32;
    fill_ -= 32;
  }

  uint32_t *next_, *last_;
  unsigned fill_;
  uint64_t held_ = 0;
  bool shared_;
};

// 64 bits from `position` on; bits past the end of the array read as zero.
inline uint64_t read_64(const uint32_t* words, uint64_t count, uint64_t position) {
  const uint64_t word = position / 32, shift = position % 32;
  if (word + 3 <= count) {
    const uint64_t high = static_cast<uint64_t>(words[word + 2]) << 32 << (31 - shift) << 1;
    return load_64(words + word) >> shift | high;
  }
  uint64_t bits = word < count ? words[word] : 0;
  if (word + 1 < count)
    bits |= static_cast<uint64_t>(words[word + 1]) << 32;
  return bits >> shift;
}

} // namespace

namespace scalar {

static uint32_t extract(uint32_t bits, uint32_t mask) {
  uint32_t result = 0;
  for (int k = 0; mask; mask &= mask - 1, ++k)
    result |= (bits >> __builtin_ctz(mask) & 1) << k;
  return result;
}

static uint32_t deposit(uint32_t bits, uint32_t mask) {
  uint32_t result = 0;
  for (; mask; mask &= mask - 1, bits >>= 1)
    result |= (mask & (0 - mask)) & (0 - (bits & 1));
  return result;
}

static void relative(const uint32_t* child, const uint32_t* parent, int64_t count, BitWriter& out) {
  for (int64_t j = 0; j < count; ++j)
    out.append_32(extract(child[j], parent[j]), __builtin_popcount(parent[j]));
}

static void nest(const uint32_t* kept, uint64_t kept_count, uint64_t position,
                 const uint32_t* parent, int64_t count, uint32_t* out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = deposit(static_cast<uint32_t>(read_64(kept, kept_count, position)), parent[j]);
    position += __builtin_popcount(parent[j]);
  }
}

} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

static void relative(const uint32_t* child, const uint32_t* parent, int64_t count,
                     BitWriter& shared) {
  BitWriter out = shared; // a copy whose members can stay in registers
  int64_t j = 0;
  const auto one = [&] {
    out.append_32(_pext_u32(child[j], parent[j]), _mm_popcnt_u32(parent[j]));
    ++j;
  };
  while (j < count && !out.roomy())
    one();
  for (; j + 2 <= count && out.roomy(); j += 2) {
    const uint64_t mask = load_64(parent + j);
    out.append_64(_pext_u64(load_64(child + j), mask), static_cast<unsigned>(_mm_popcnt_u64(mask)));
  }
  out.settle();
  while (j < count)
    one();
  shared = out;
}

static void nest(const uint32_t* kept, uint64_t kept_count, uint64_t position,
                 const uint32_t* parent, int64_t count, uint32_t* out) {
  const int64_t whole = count / 2 * 2;
  for (int64_t j = 0; j < whole; j += 2) {
    const uint64_t mask = load_64(parent + j);
    const uint64_t bits = _pdep_u64(read_64(kept, kept_count, position), mask);
    std::memcpy(out + j, &bits, sizeof bits);
    position += _mm_popcnt_u64(mask);
  }
  scalar::nest(kept, kept_count, position, parent + whole, count - whole, out + whole);
}

} // namespace avx2
FEDMAP_TARGET_END

namespace avx512 {
using avx2::nest;
using avx2::relative;
} // namespace avx512
#endif

void relative(const uint32_t* child, const uint32_t* parent, const int64_t* parent_rank,
              int64_t numel, uint32_t* out, int threads) {
  const int64_t count = mask_words(numel), blocks = mask_blocks(numel);
  const auto form = FEDMAP_DISPATCH(relative);
  for (int64_t b = 0; b < blocks; b += kShareBlocks)
    if (parent_rank[b] < parent_rank[blocks])
      out[parent_rank[b] / 32] = 0;
  if (parent_rank[blocks] % 32)
    out[parent_rank[blocks] / 32] = 0;
  parallel_ranges(
      blocks, kShareBlocks, threads_for(count * 8, threads), [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kBlockWords;
        BitWriter writer(out, parent_rank[begin], parent_rank[end]);
        form(child + first, parent + first, std::min(count, end * kBlockWords) - first, writer);
        writer.finish();
      });
}

void nest(const uint32_t* kept, const uint32_t* parent, const int64_t* parent_rank, int64_t numel,
          uint32_t* out, int threads) {
  const int64_t count = mask_words(numel), blocks = mask_blocks(numel);
  const int64_t kept_count = mask_words(parent_rank[blocks]);
  const auto form = FEDMAP_DISPATCH(nest);
  parallel_ranges(blocks, kShareBlocks, threads_for(count * 8, threads),
                  [&](int64_t begin, int64_t end) {
                    const int64_t first = begin * kBlockWords;
                    form(kept, kept_count, parent_rank[begin], parent + first,
                         std::min(count, end * kBlockWords) - first, out + first);
                  });
}

} // namespace fedmap
