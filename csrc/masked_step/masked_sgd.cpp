// One SGD step of a whole model. Contract: fedmap_sparse/ops/masked_sgd.py.
#include "masked_step/masked_step.h"

namespace fedmap {
namespace {

struct Sgd {
  static constexpr int kStates = 1;
  float lr, momentum, undamped, weight_decay;
  bool nesterov, maximize, first, decays, has_momentum;

  Sgd(const double* scalars, int64_t flags, const States& states)
      : lr(static_cast<float>(scalars[0])), momentum(static_cast<float>(scalars[1])),
        undamped(static_cast<float>(1 - scalars[2])), weight_decay(static_cast<float>(scalars[3])),
        nesterov(flags & kNesterov), maximize(flags & kMaximize), first(flags & kFirst),
        decays(scalars[3] != 0), has_momentum(scalars[1] != 0 && states[0]) {}

  bool uses(int) const { return has_momentum; }

  FEDMAP_ARITHMETIC apply(V& p, V& g, V (&s)[kMaxStates]) const {
    V& buffer = s[0];
    if (maximize)
      g = -g;
    if (decays)
      g = g + weight_decay * p;
    if (has_momentum) {
      if (first)
        buffer = g;
      else
        buffer = momentum * buffer + undamped * g;
      if (nesterov)
        g = g + momentum * buffer;
      else
        g = buffer;
    }
    p = p - lr * g;
  }
};

} // namespace

void masked_sgd(void* values, int dtype, const uint32_t* words, const int64_t* rank,
                int64_t prunable, int64_t numel, const Segment* segments, int64_t nseg,
                const double* scalars, float* momentum, float* master, int threads) {
  const auto step = dtype == kFloat32   ? masked_step<float, Sgd>
                    : dtype == kFloat16 ? masked_step<Float16, Sgd>
                                        : masked_step<Bfloat16, Sgd>;
  step(values, words, rank, prunable, numel, segments, nseg, scalars, {momentum, nullptr, nullptr},
       master, threads);
}

} // namespace fedmap
