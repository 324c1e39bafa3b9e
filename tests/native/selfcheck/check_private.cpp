// What private sums are made of: the cut to a norm, noise, fixed-point integers.
#include "check.h"
#include "clip/clip.h"
#include "core/dtype.h"
#include "core/half.h"
#include "fixed/fixed.h"
#include "noise/noise.h"

namespace selfcheck {
namespace {

void check_clip(int64_t n, Kind kind, double share, const std::vector<int>& threads) {
  Buffer<float> values(n, n % 3), start(n, 1);
  fill(values.data(), fedmap::kFloat32, n, 101, kind);
  fill(start.data(), fedmap::kFloat32, n, 102, Kind::normal);
  compare(
      label("clip", n) + " " + name_of(kind),
      [&](int t, Outcome& out) {
        Buffer<float> cut(n, n % 3);
        std::memcpy(cut.data(), values.data(), static_cast<size_t>(n) * sizeof(float));
        const double norm = fedmap::clip_difference(cut.data(), start.data(), n, 1e300, t);
        out.add_value(norm == norm ? norm : -1); // a NaN's sign is the compiler's choice
        fedmap::clip_difference(cut.data(), start.data(), n, share * (norm > 0 ? norm : 1), t);
        out.add(cut);
      },
      threads);
}

void check_noise(int64_t n, double std, uint64_t seed, uint64_t stream,
                 const std::vector<int>& threads) {
  Buffer<float> values(n, n % 3);
  fill(values.data(), fedmap::kFloat32, n, 103, Kind::normal);
  compare(
      label("noise", n),
      [&](int t, Outcome& out) {
        Buffer<float> noised(n, n % 3);
        std::memcpy(noised.data(), values.data(), static_cast<size_t>(n) * sizeof(float));
        fedmap::add_gaussian(noised.data(), n, std, seed, stream, t);
        out.add(noised);
      },
      threads);
}

void check_fixed(int64_t n, double clip, double scale, int32_t weight,
                 const std::vector<int>& threads) {
  Buffer<float> values(n, n % 3);
  fill(values.data(), fedmap::kFloat32, n, 104, Kind::ties);
  compare(
      label("fixed", n),
      [&](int t, Outcome& out) {
        Buffer<int32_t> steps(n, n % 2);
        Buffer<float> back(n, 1);
        out.add_value(fedmap::to_fixed(values.data(), n, clip, scale, weight, steps.data(), t));
        fedmap::from_fixed(steps.data(), n, scale * 3, back.data(), t);
        out.add(steps);
        out.add(back);
      },
      threads);
}

} // namespace

void check_private() {
  for (int64_t n : edges()) {
    for (Kind kind : kKinds)
      check_clip(n, kind, 0.4, {});
    check_noise(n, 0.7, 0x7fffffffffffffff, 3, {});
    check_noise(n, 1e-20, 1, 0x7fffffffffffffff, {});
    check_fixed(n, 0.75, 1e6, 3, {});
    check_fixed(n, 100, 0x1p20, 1, {});
  }
  check_clip(kLarge, Kind::normal, 0.4, thread_counts());
  check_noise(kLarge, 1.5, 42, 7, thread_counts());
  check_fixed(kLarge, 1.5, 1e4, 11, thread_counts());
}

} // namespace selfcheck
