// Runs kernels at one ISA level: to be counted under an emulator (tools/arm/count.py) or valgrind
// (benchmarks/instructions.py), or timed on a board.
//
//   kernels                         list the kernels
//   kernels KERNEL LEVEL TIMES      run it, and print how many elements one run has
//   kernels each LEVEL KERNEL ...   run each of them twice, inside `counted`, and print the same
//   kernels time                    nanoseconds per element of each at each level, one thread
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "accumulate/accumulate.h"
#include "check.h"
#include "clip/clip.h"
#include "codec/crc32c.h"
#include "core/ahead.h"
#include "core/bits.h"
#include "core/cpu.h"
#include "core/dtype.h"
#include "distances/distances.h"
#include "entropy/entropy.h"
#include "extract/extract.h"
#include "fixed/fixed.h"
#include "mask/mask.h"
#include "masked_step/segment.h"
#include "noise/noise.h"
#include "pack/pack.h"
#include "quantize/quantize.h"
#include "select/select.h"
#include "trimmed/trimmed.h"

namespace {

using namespace selfcheck;

constexpr int64_t kCount = 1 << 18, kLarge = 1 << 22;

struct Kernel {
  const char* name;
  int64_t elements;
  std::function<void()> run;
};

struct Data {
  Bitmap tenth = random_bitmap(kCount, 0.1, 1), half = random_bitmap(kCount, 0.5, 2);
  Bitmap hundredth = random_bitmap(kCount, 0.01, 3);
  Buffer<float> values{kCount}, gradient{kCount}, packed{kCount}, first{kCount}, second{kCount};
  Buffer<uint16_t> halves{kCount};
  Buffer<int8_t> codes{kCount};
  Buffer<float> scales{kCount / 128};
  Buffer<float> shrinking{kCount}, zeros{kCount};
  Buffer<int32_t> fixed{kCount};
  Buffer<double> sums{kCount}, distances{25};
  double norm =
      1; // below that of `shrinking`, which each run of clip_difference cuts to half of it
  Buffer<uint8_t> bools{kCount}, payload{8 * kCount};
  Buffer<uint32_t> words{kLarge / 32 + 1};
  Buffer<int64_t> rank{kLarge / fedmap::kBlock + 2};
  Buffer<uint32_t> many{kLarge}; // bits of two values of 16, or of one of 32
  int64_t size = 0;

  Data() {
    fill(values.data(), fedmap::kFloat32, kCount, 4, Kind::normal);
    fill(gradient.data(), fedmap::kFloat32, kCount, 5, Kind::normal);
    fill(packed.data(), fedmap::kFloat32, kCount, 6, Kind::normal);
    fill(halves.data(), fedmap::kBfloat16, kCount, 7, Kind::normal);
    fill(shrinking.data(), fedmap::kFloat32, kCount, 8, Kind::normal);
    for (int64_t i = 0; i < kLarge; ++i) { // two bfloat16 make one float32
      uint16_t pair[2];
      std::memcpy(pair, halves.data() + 2 * i % kCount, sizeof pair);
      many[i] = static_cast<uint32_t>(pair[1]) << 16 | (pair[0] ^ static_cast<uint32_t>(i));
    }
    for (int64_t i = 0; i < kCount; ++i)
      sums[i] = first[i] = second[i] = zeros[i] = 0;
  }
};

void step(Data& d, const Bitmap& mask, bool adamw) {
  const fedmap::Segment segment{0, kCount, reinterpret_cast<uintptr_t>(d.gradient.data()), 0};
  const double sgd[fedmap::kScalars] = {1e-3, 0.9, 0, 0};
  const double adam[fedmap::kScalars] = {1e-3, 0.9, 0.999, 1e-8, 0.01, 0.9, 0.999};
  if (adamw)
    fedmap::masked_adamw(d.values.data(), fedmap::kFloat32, mask.words.data(), mask.rank.data(),
                         kCount, kCount, &segment, 1, adam, d.first.data(), d.second.data(),
                         nullptr, nullptr, 1);
  else
    fedmap::masked_sgd(d.values.data(), fedmap::kFloat32, mask.words.data(), mask.rank.data(),
                       kCount, kCount, &segment, 1, sgd, d.first.data(), nullptr, 1);
}

std::vector<Kernel> kernels(Data& d) {
  using namespace fedmap;
  static const int64_t start = 0, numel = kCount;
  static const uint8_t code = 27; // one bit in ten
  const MaskRuns runs{&start, &numel, 1};
  const auto pack_at = [&d](const Bitmap& mask) {
    fedmap::pack(d.values.data(), kFloat32, mask.words.data(), mask.rank.data(), kCount,
                 d.packed.data(), kFloat32, 1);
  };
  const auto unpack_at = [&d](const Bitmap& mask) {
    fedmap::unpack(d.packed.data(), kFloat32, mask.words.data(), mask.rank.data(), kCount,
                   d.gradient.data(), kFloat32, 1);
  };
  const auto mean_of = [&d](int dtype, const void* payload) {
    const std::vector<const void*> payloads(10, payload);
    fedmap::weighted_mean(payloads, dtype, std::vector<double>(10, 1.5), kCount, d.packed.data(),
                          kFloat32, 1);
  };
  const auto rows_of = [&d](size_t count) { // three vectors, in turn
    const float* const three[] = {d.values.data(), d.gradient.data(), d.first.data()};
    std::vector<const float*> rows(count);
    for (size_t k = 0; k < count; ++k)
      rows[k] = three[k % 3];
    return rows;
  };
  const auto select_tenth = [&d](int dtype, const void* values) {
    fedmap::select({{values, kLarge, nullptr, d.words.data(), d.rank.data()}}, dtype, kLarge,
                   kLarge / 10, 1);
  };
  return {
      {"select .1", kLarge, [=, &d] { select_tenth(kFloat32, d.many.data()); }},
      {"select .1 bfloat16", kLarge, [=, &d] { select_tenth(kBfloat16, d.many.data()); }},
      {"zero_pruned", kCount,
       [&d] {
         fedmap::zero_pruned(d.values.data(), d.half.words.data(), d.tenth.words.data(), kCount,
                             kFloat32, 1);
       }},
      {"pack .01", kCount, [=, &d] { pack_at(d.hundredth); }},
      {"pack .1", kCount, [=, &d] { pack_at(d.tenth); }},
      {"pack .5", kCount, [=, &d] { pack_at(d.half); }},
      {"unpack .1", kCount, [=, &d] { unpack_at(d.tenth); }},
      {"unpack .5", kCount, [=, &d] { unpack_at(d.half); }},
      {"extract .1", kCount,
       [&d] {
         fedmap::extract(d.half.words.data(), d.tenth.words.data(), d.tenth.rank.data(), kCount,
                         d.words.data(), d.rank.data(), 1);
       }},
      {"deposit .1", kCount,
       [&d] {
         fedmap::deposit(d.half.words.data(), d.tenth.words.data(), d.tenth.rank.data(), kCount,
                         d.words.data(), d.rank.data(), 1);
       }},
      {"rank_index", kCount,
       [&d] { fedmap::rank_index(d.half.words.data(), kCount, d.rank.data(), 1); }},
      {"mask_from_bools", kCount,
       [&d] { fedmap::mask_from_bools(d.bools.data(), kCount, d.words.data(), 1); }},
      {"mask_to_bools", kCount,
       [&d] { fedmap::mask_to_bools(d.half.words.data(), kCount, d.bools.data(), 1); }},
      {"mask_subset", kCount,
       [&d] { fedmap::mask_subset(d.half.words.data(), d.half.words.data(), kCount, 1); }},
      {"mask_digest", kCount, [&d] { fedmap::mask_digest(d.half.words.data(), kCount, 1); }},
      {"masked_sgd .1", kCount, [&d] { step(d, d.tenth, false); }},
      {"masked_sgd .5", kCount, [&d] { step(d, d.half, false); }},
      {"masked_adamw .1", kCount, [&d] { step(d, d.tenth, true); }},
      {"masked_adamw .5", kCount, [&d] { step(d, d.half, true); }},
      {"weighted_mean of 10", 10 * kCount, [=, &d] { mean_of(kFloat32, d.values.data()); }},
      {"weighted_mean of 10 bfloat16", 10 * kCount,
       [=, &d] { mean_of(kBfloat16, d.halves.data()); }},
      {"accumulate_add", kCount,
       [&d] { fedmap::accumulate_add(d.sums.data(), d.values.data(), kFloat32, 1.5, kCount, 1); }},
      {"accumulate_add int8", kCount,
       [&d] {
         fedmap::accumulate_add_int8(d.sums.data(), d.codes.data(), d.scales.data(), 128, 1.5,
                                     kCount, 1);
       }},
      {"accumulate_mean", kCount,
       [&d] { fedmap::accumulate_mean(d.sums.data(), 10, kCount, d.packed.data(), kFloat32, 1); }},
      {"quantize_int8", kCount,
       [&d] {
         fedmap::quantize_int8(d.values.data(), kCount, 128, d.codes.data(), d.scales.data(),
                               nullptr, 1);
       }},
      {"dequantize_int8", kCount,
       [&d] {
         fedmap::dequantize_int8(d.codes.data(), d.scales.data(), 128, kCount, d.packed.data(), 1);
       }},
      {"cast to float16", kCount,
       [&d] { fedmap::cast(d.values.data(), kFloat32, d.halves.data(), kFloat16, kCount, 1); }},
      {"cast to bfloat16", kCount,
       [&d] { fedmap::cast(d.values.data(), kFloat32, d.halves.data(), kBfloat16, kCount, 1); }},
      {"cast from float16", kCount,
       [&d] { fedmap::cast(d.halves.data(), kFloat16, d.packed.data(), kFloat32, kCount, 1); }},
      {"trimmed_mean of 10", 10 * kCount,
       [=, &d] { fedmap::trimmed_mean(rows_of(10), 2, kCount, d.packed.data(), 1); }},
      {"squared_distances of 5", 10 * kCount, // 10 pairs
       [=, &d] { fedmap::squared_distances(rows_of(5), {}, kCount, d.distances.data(), 1); }},
      {"clip_difference", kCount,
       [&d] {
         fedmap::clip_difference(d.shrinking.data(), d.zeros.data(), kCount, d.norm, 1);
         d.norm /= 2;
       }},
      {"add_gaussian", kCount,
       [&d] { fedmap::add_gaussian(d.packed.data(), kCount, 0.5, 42, 3, 1); }},
      {"to_fixed", kCount,
       [&d] { fedmap::to_fixed(d.values.data(), kCount, 0.75, 1e6, 3, d.fixed.data(), 1); }},
      {"from_fixed", kCount,
       [&d] { fedmap::from_fixed(d.fixed.data(), kCount, 3e6, d.packed.data(), 1); }},
      {"crc32c, per byte", 4 * kCount, [&d] { fedmap::crc32c(d.values.data(), 4 * kCount, 0, 1); }},
      {"encode_mask .1", kCount,
       [=, &d] {
         d.size = fedmap::encode_mask(d.tenth.words.data(), runs, &code, 1024, d.payload.data(),
                                      d.payload.size(), 1);
       }},
      {"decode_mask .1", kCount,
       [=, &d] {
         if (!d.size)
           d.size = fedmap::encode_mask(d.tenth.words.data(), runs, &code, 1024, d.payload.data(),
                                        d.payload.size(), 1);
         fedmap::decode_mask(d.payload.data(), d.size, runs, kCount, d.words.data(), 1);
       }},
      {"encode_values", kCount,
       [&d] {
         d.size = fedmap::encode_values(d.values.data(), kFloat32, kCount, d.payload.data(),
                                        d.payload.size(), 1);
       }},
      {"decode_values", kCount,
       [&d] {
         if (!d.size)
           d.size = fedmap::encode_values(d.values.data(), kFloat32, kCount, d.payload.data(),
                                          d.payload.size(), 1);
         fedmap::decode_values(d.payload.data(), d.size, kFloat32, kCount, d.packed.data(), 1);
       }},
  };
}

const Kernel& named(const std::vector<Kernel>& all, const char* name) {
  for (const Kernel& kernel : all)
    if (!std::strcmp(name, kernel.name))
      return kernel;
  std::fprintf(stderr, "kernels: no kernel '%s'; without arguments it lists them\n", name);
  std::exit(2);
}

void print_times(const std::vector<Kernel>& all) {
  using Clock = std::chrono::steady_clock;
  std::printf("%-30s", "ns per element");
  for (const std::string& level : fedmap::isa_levels())
    std::printf("%10s", level.c_str());
  for (const Kernel& kernel : all) {
    std::printf("\n%-30s", kernel.name);
    for (const std::string& level : fedmap::isa_levels()) {
      fedmap::set_isa(level);
      double best = 1e30;
      for (int k = 0; k < 20; ++k) {
        const auto begin = Clock::now();
        kernel.run();
        best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
      }
      std::printf("%10.3f", best * 1e9 / static_cast<double>(kernel.elements));
    }
  }
  std::printf("\n");
}

} // namespace

// What a profiler is told to look at. No call to be left out, inlined or made a jump.
extern "C" __attribute__((noinline)) void counted(const std::function<void()>* run) {
  (*run)();
  __asm__ volatile("" ::: "memory");
}

int main(int argc, char** argv) {
  Data data;
  const std::vector<Kernel> all = kernels(data);
  if (argc == 2 && !std::strcmp(argv[1], "time")) {
    print_times(all);
  } else if (argc > 3 && !std::strcmp(argv[1], "each")) {
    fedmap::set_isa(argv[2]);
    fedmap::set_read_ahead(0); // valgrind says that it is an Intel
    for (int k = 3; k < argc; ++k) {
      const Kernel& kernel = named(all, argv[k]);
      counted(&kernel.run); // what happens once in a process: tables, memory
      counted(&kernel.run);
      std::printf("%lld\n", static_cast<long long>(kernel.elements));
    }
  } else if (argc == 4) {
    const Kernel& kernel = named(all, argv[1]);
    fedmap::set_isa(argv[2]);
    fedmap::set_read_ahead(0); // valgrind says that it is an Intel
    for (int k = std::atoi(argv[3]); k > 0; --k)
      kernel.run();
    std::printf("%lld\n", static_cast<long long>(kernel.elements));
  } else {
    for (const Kernel& kernel : all)
      std::printf("%s\n", kernel.name);
  }
  return 0;
}
