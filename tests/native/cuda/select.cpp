// csrc/cuda/select.cu on fibers, beside a stable sort: masks, rank indices, keys, bit for bit.

#include "on_cpu.h"

#define THREADS 128
#include "../../../csrc/cuda/select.cu"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <set>
#include <string>

namespace {

std::mt19937 random_bits(7);

template <class Bits>
struct Input {
  std::vector<std::vector<Bits>> values;
  std::vector<std::vector<u32>> within; // empty: all
};

i64 blocks_of(i64 n) {
  return (n + 2047) / 2048;
}

bool held(const std::vector<u32>& words, i64 i) {
  return words.empty() || ((words[i / 32] >> (i % 32)) & 1);
}

int failures = 0;

template <class Bits>
void check(const std::string& name, const Input<Bits>& in, u64 keep, unsigned grid, unsigned seed,
           bool marks = true) {
  constexpr u32 kMask = (1u << (8 * sizeof(Bits) - 1)) - 1;
  struct Element {
    u32 key;
    std::size_t part;
    i64 at;
  };
  std::vector<Element> order;
  for (std::size_t t = 0; t < in.values.size(); t++)
    for (std::size_t i = 0; i < in.values[t].size(); i++)
      if (held(in.within[t], i64(i)))
        order.push_back({in.values[t][i] & kMask, t, i64(i)});
  std::stable_sort(order.begin(), order.end(),
                   [](const Element& a, const Element& b) { return a.key > b.key; });
  u64 eligible = order.size();
  std::vector<std::vector<u32>> want_words, words;
  std::vector<std::vector<i64>> want_ranks, ranks;
  Job job{};
  for (std::size_t t = 0; t < in.values.size(); t++) {
    i64 n = i64(in.values[t].size());
    want_words.emplace_back((n + 31) / 32, 0);
    want_ranks.emplace_back(blocks_of(n) + 1, 0);
    words.emplace_back((n + 31) / 32, 0xDEADBEEF);
    ranks.emplace_back(blocks_of(n) + 1, -1);
  }
  for (u64 i = 0; i < keep; i++)
    want_words[order[i].part][order[i].at / 32] |= 1u << (order[i].at % 32);
  for (std::size_t t = 0; t < in.values.size(); t++) {
    i64 n = i64(in.values[t].size());
    for (i64 i = 0; i < n; i++)
      if ((want_words[t][i / 32] >> (i % 32)) & 1)
        for (i64 b = i / 2048 + 1; b <= blocks_of(n); b++)
          want_ranks[t][b]++;
    job.part[t] = Part{in.values[t].data(),
                       in.within[t].empty() ? nullptr : in.within[t].data(),
                       marks ? words[t].data() : nullptr,
                       ranks[t].data(),
                       n,
                       job.blocks};
    job.blocks += blocks_of(n);
  }
  job.parts = i64(in.values.size());
  job.keep = keep;
  job.eligible = eligible;
  std::vector<u64> state((4 + kLevels * kBins + 1) / 2);
  std::vector<Bits> pool(job.blocks * kShare, Bits(0x5A5A));
  std::vector<u32> marks_of(job.blocks * 64, 77), places(job.blocks * kShare, 77);
  std::vector<Unit> units(job.blocks * 2, Unit{5, 5, 5});
  std::vector<u64> counts(job.blocks, 77), before(job.blocks, 77), totals(grid, 77);
  std::vector<u64> bases(kParts, 77);
  u32 key = 77;
  job.state = reinterpret_cast<u32*>(state.data());
  job.pool = pool.data();
  job.places = places.data();
  job.marks = marks_of.data();
  job.units = units.data();
  job.counts = marks ? counts.data() : nullptr;
  job.ties_before = before.data();
  job.totals = totals.data();
  job.bases = bases.data();
  job.key = &key;
  on_cpu::launch(grid, THREADS, sizeof(Shared), seed, [&] {
    if constexpr (sizeof(Bits) == 4)
      select_32(job);
    else
      select_16(job);
  });
  bool right = key == order[keep - 1].key;
  if (marks)
    right = right && words == want_words && ranks == want_ranks;
  if (!right) {
    failures++;
    std::printf("wrong: %s, keep %llu of %llu, grid %u, key %x beside %x\n", name.c_str(), keep,
                eligible, grid, key, order[keep - 1].key);
  }
}

// The octets that a selection of one tensor looks at first, as in `bracket`.
std::set<u64> sample_of(i64 n) {
  std::set<u64> out;
  u64 octets = u64(blocks_of(n)) * 256;
  for (u32 run = 0; run < kRuns && octets >= kRuns; run++) {
    u64 begin = run * octets / kRuns, room = (run + 1) * octets / kRuns - begin;
    out.insert(begin + (u64(run * 0x9E3779B1u) * room >> 32));
  }
  return out;
}

// Values of one kind, `n` of them.
template <class Bits>
std::vector<Bits> draw(const std::string& kind, i64 n) {
  std::normal_distribution<float> normal;
  std::vector<Bits> out(n);
  std::set<u64> sampled = sample_of(n);
  for (i64 i = 0; i < n; i++) {
    float x = normal(random_bits);
    if (kind == "constant")
      x = 1.0f;
    if (kind == "zeros")
      x = 0.0f;
    if (kind == "two values")
      x = x > 0 ? 1.0f : -2.0f;
    if (kind == "two near values") // in one bin of the first histogram
      x = x > 0 ? 1.0f : -std::nextafter(1.0f, 2.0f);
    if (kind == "levels")
      x = float(1 + random_bits() % 16) / 8;
    if (kind == "rounded")
      x = std::nearbyint(x * 4) / 4;
    if (kind == "sorted")
      x = float(i) / float(n);
    // Small where the sample looks, so that the bracket misses.
    if (kind == "hidden")
      x = sampled.count(u64(i / 8)) ? 1e-30f * x : 1.0f + x * x;
    if (kind == "special" && i % 97 == 0)
      x = i % 2 ? INFINITY : -NAN;
    u32 bits;
    std::memcpy(&bits, &x, 4);
    out[i] = sizeof(Bits) == 4 ? Bits(bits) : Bits(bits >> 16);
    if (kind == "any bits")
      out[i] = Bits(random_bits());
  }
  return out;
}

template <class Bits>
void all() {
  const char* kinds[] = {"normal",  "constant", "zeros",  "two values", "two near values", "levels",
                         "rounded", "sorted",   "hidden", "special",    "any bits"};
  for (const char* kind : kinds)
    for (i64 n : {1, 31, 33, 1023, 2048, 2049, 5001, 40000})
      for (int share : {1, 30, 100}) {
        if (n == 40000 && share == 100)
          continue;
        Input<Bits> in{{draw<Bits>(kind, n)}, {{}}};
        u64 keep = std::max<u64>(1, u64(n) * share / 100);
        std::string name = std::string(kind) + " " + std::to_string(n);
        check(name, in, keep, 1 + unsigned(n) % 3, unsigned(share));
        if (share == 30 && n > 33) {
          in.within[0].resize((n + 31) / 32);
          u64 eligible = 0;
          for (i64 i = 0; i < n; i++)
            if (random_bits() % 3 == 0 && (i < 3000 || i > 9000))
              in.within[0][i / 32] |= 1u << (i % 32), eligible++;
          check(name + " within", in, std::max<u64>(1, eligible / 2), 3, 5);
          check(name + " key", in, std::max<u64>(1, eligible / 2), 2, 5, false);
        }
      }
  // Ties of a few values: most are read for the bracket, twice, and once more for the bin.
  for (const char* kind : {"two values", "levels"}) {
    constexpr i64 n = 40000;
    Input<Bits> in{{draw<Bits>(kind, n)}, {{}}};
    check(kind, in, n / 2, 2, 3);
    if (on_cpu::loads > 3 * n + 2 * 8 * kRuns) {
      failures++;
      std::printf("%s: %llu loads of %lld values\n", kind, on_cpu::loads, n);
    }
  }
  for (const char* kind : kinds) {
    Input<Bits> in;
    u64 eligible = 0;
    for (i64 n : {100, 2048, 5000, 1, 7001}) {
      in.values.push_back(draw<Bits>(kind, n));
      in.within.emplace_back();
      if (n == 2048)
        in.within.back().assign(64, 0x00FF00FF);
      eligible += n == 2048 ? 1024 : n;
    }
    for (u64 keep : {u64(1), eligible / 3, eligible})
      check(kind, in, keep, 3, 9);
  }
}

} // namespace

int main(int count, char**) {
  if (count > 1) { // what cuda_kernels/select.py has to know
    std::printf("%zu %zu %u %d %d\n", sizeof(Job), sizeof(Part), kShare, 4 + kLevels * kBins,
                kParts);
    return 0;
  }
  all<u32>();
  all<u16>();
  std::printf(failures ? "%d wrong\n" : "all right\n", failures);
  return failures != 0;
}
