// One AdamW step of a whole model. Contract: fedmap_sparse/ops/masked_adamw.py.
#include "masked_step/masked_step.h"

namespace fedmap {
namespace {

struct AdamW {
  static constexpr int kStates = 3;
  float step_size, rest1, beta2, rest2, root_correction, eps, decay;
  bool maximize, decays, amsgrad;

  AdamW(const double* scalars, int64_t flags, const States& states)
      : step_size(static_cast<float>(scalars[0] / (1 - scalars[5]))),
        rest1(static_cast<float>(1 - scalars[1])), beta2(static_cast<float>(scalars[2])),
        rest2(static_cast<float>(1 - scalars[2])),
        root_correction(static_cast<float>(std::sqrt(1 - scalars[6]))),
        eps(static_cast<float>(scalars[3])), decay(static_cast<float>(1 - scalars[0] * scalars[4])),
        maximize(flags & kMaximize), decays(scalars[4] != 0),
        amsgrad((flags & kAmsgrad) && states[2]) {}

  bool uses(int k) const { return k < 2 || amsgrad; }

  FEDMAP_ARITHMETIC apply(V& p, V& g, V (&s)[kMaxStates]) const {
    V &first = s[0], &second = s[1], &largest = s[2];
    if (maximize)
      g = -g;
    if (decays)
      p = p * decay;
    first = first + (g - first) * rest1;
    second = second * beta2 + (rest2 * g) * g;
    V root = second;
    if (amsgrad) {
      largest = largest >= second ? largest : second; // NaN in `second` wins, as in torch.maximum
      root = largest;
    }
    square_root(root);
    p = p - step_size * (first / (root / root_correction + eps));
  }
};

} // namespace

void masked_adamw(void* values, int dtype, const uint32_t* words, const int64_t* rank,
                  int64_t prunable, int64_t numel, const Segment* segments, int64_t nseg,
                  const double* scalars, float* exp_avg, float* exp_avg_sq, float* max_exp_avg_sq,
                  float* master, int threads) {
  const auto step = dtype == kFloat32   ? masked_step<float, AdamW>
                    : dtype == kFloat16 ? masked_step<Float16, AdamW>
                                        : masked_step<Bfloat16, AdamW>;
  step(values, words, rank, prunable, numel, segments, nseg, scalars,
       {exp_avg, exp_avg_sq, max_exp_avg_sq}, master, threads);
}

} // namespace fedmap
