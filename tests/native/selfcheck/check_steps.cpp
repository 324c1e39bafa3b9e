// Masked SGD and AdamW steps: each flag, dtype, density, with segments that cut blocks.
#include <cmath>

#include "check.h"
#include "core/dtype.h"
#include "masked_step/segment.h"
#include "select/select.h"

namespace selfcheck {
namespace {

struct Problem {
  int64_t prunable, tail;
  int dtype;
  double density;
  Kind kind;
  int64_t flags;
  double weight_decay;
};

std::string name_of(const char* rule, const Problem& p) {
  return label(rule, p.prunable) + " " + name_of_dtype(p.dtype) + " " + selfcheck::name_of(p.kind) +
         " density " + std::to_string(p.density) + " flags " + std::to_string(p.flags) +
         (p.weight_decay != 0 ? " decays" : "");
}

void fill_positive(Buffer<float>& state, uint64_t seed, Kind kind) {
  fill(state.data(), fedmap::kFloat32, state.size(), seed, kind);
  for (int64_t i = 0; i < state.size(); ++i)
    state[i] = std::fabs(state[i]);
}

void check_one(bool adamw, const Problem& p, const std::vector<int>& threads) {
  const Bitmap mask = random_bitmap(p.prunable, p.density, 51);
  const int64_t n = p.prunable + p.tail, width = fedmap::dtype_bytes(p.dtype);
  const int64_t packed = mask.nnz + p.tail;
  Buffer<uint8_t> gradient(n * width);
  fill(gradient.data(), p.dtype, n, 52, p.kind);
  // Three segments cut the prunable part at no edge, the second without a gradient; one is the
  // tail.
  const int64_t first = p.prunable / 3, second = p.prunable / 3 * 2;
  const auto at = [&](int64_t i) {
    return reinterpret_cast<uintptr_t>(gradient.data() + i * width);
  };
  const fedmap::Segment segments[] = {{0, first, at(0), p.flags},
                                      {first, second - first, 0, p.flags},
                                      {second, p.prunable - second, at(second), p.flags},
                                      {p.prunable, p.tail, at(p.prunable), p.flags}};
  constexpr int kSegments = 4;
  double scalars[kSegments * fedmap::kScalars] = {};
  for (int s = 0; s < kSegments; ++s) {
    double* row = scalars + s * fedmap::kScalars;
    row[0] = 0.05;
    row[1] = 0.9;
    if (adamw) {
      row[2] = 0.999, row[3] = 1e-8, row[4] = p.weight_decay;
      row[5] = std::pow(0.9, 3), row[6] = std::pow(0.999, 3);
    } else {
      row[2] = 0.1, row[3] = p.weight_decay;
    }
  }
  compare(
      name_of(adamw ? "adamw" : "sgd", p),
      [&](int t, Outcome& out) {
        Buffer<uint8_t> values(n * width);
        fill(values.data(), p.dtype, n, 53, p.kind);
        fedmap::zero_pruned(values.data(), nullptr, mask.words.data(), p.prunable, p.dtype, 1);
        Buffer<float> master(p.dtype == fedmap::kFloat32 ? 0 : packed, 1);
        fill(master.data(), fedmap::kFloat32, master.size(), 54, p.kind);
        float* masters = p.dtype == fedmap::kFloat32 ? nullptr : master.data();
        Buffer<float> state[3] = {Buffer<float>(packed, 1), Buffer<float>(packed, 2),
                                  Buffer<float>(packed, 3)};
        fill(state[0].data(), fedmap::kFloat32, packed, 55, p.kind);
        fill_positive(state[1], 56, p.kind);
        fill_positive(state[2], 57, p.kind);
        if (adamw)
          fedmap::masked_adamw(values.data(), p.dtype, mask.words.data(), mask.rank.data(),
                               p.prunable, n, segments, kSegments, scalars, state[0].data(),
                               state[1].data(), state[2].data(), masters, t);
        else
          fedmap::masked_sgd(values.data(), p.dtype, mask.words.data(), mask.rank.data(),
                             p.prunable, n, segments, kSegments, scalars, state[0].data(), masters,
                             t);
        out.add_results(values, p.dtype);
        out.add_results(master);
        for (const Buffer<float>& s : state)
          out.add_results(s);
      },
      threads);
}

} // namespace

void check_steps() {
  using namespace fedmap;
  constexpr int64_t kSgdFlags[] = {0, kNesterov, kMaximize | kFirst, kNesterov | kMaximize};
  constexpr int64_t kAdamFlags[] = {0, kAmsgrad, kMaximize, kAmsgrad | kMaximize};
  for (int dtype : {kFloat32, kFloat16, kBfloat16})
    for (Kind kind : {Kind::normal, Kind::special}) {
      for (int64_t n : {1, 31, 127, 128, 2047, 2049, 4096, 20'000, 33'000})
        for (double density : {0.02, 0.1, 0.5, 1.0}) {
          check_one(false, {n, 77, dtype, density, kind, kNesterov, 0.01}, {});
          check_one(true, {n, 77, dtype, density, kind, kAmsgrad, 0.01}, {});
        }
      for (int k = 0; k < 4; ++k)
        for (double decay : {0.0, 0.1}) {
          check_one(false, {5'000, 3, dtype, 0.3, kind, kSgdFlags[k], decay}, {});
          check_one(true, {5'000, 3, dtype, 0.3, kind, kAdamFlags[k], decay}, {});
        }
    }
  for (double density : {0.02, 0.2}) {
    check_one(false, {kLarge, 5'000, kFloat32, density, Kind::normal, 0, 0.1}, thread_counts());
    check_one(true, {kLarge, 5'000, kBfloat16, density, Kind::normal, 0, 0.1}, thread_counts());
  }
}

} // namespace selfcheck
