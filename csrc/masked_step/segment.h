// The masked steps and their table of segments. Contract: fedmap_sparse/ops/masked_sgd.py and
// masked_adamw.py.
#pragma once

#include <cstdint>

namespace fedmap {

struct Segment {
  int64_t offset, numel;
  uintptr_t gradient; // 0: the parameter is skipped, its state untouched
  int64_t flags;
};
enum SegmentFlags : int64_t { kNesterov = 1, kMaximize = 2, kFirst = 4, kAmsgrad = 8 };
constexpr int kScalars = 8; // float64 hyper-parameters for each segment, and last:
constexpr int kSkipped = 7; // not 0: the segment and its state stay as they are
void masked_sgd(void* values, int dtype, const uint32_t* words, const int64_t* rank,
                int64_t prunable, int64_t numel, const Segment* segments, int64_t nseg,
                const double* scalars, float* momentum, float* master, int threads);
void masked_adamw(void* values, int dtype, const uint32_t* words, const int64_t* rank,
                  int64_t prunable, int64_t numel, const Segment* segments, int64_t nseg,
                  const double* scalars, float* exp_avg, float* exp_avg_sq, float* max_exp_avg_sq,
                  float* master, int threads);

// Whether a pruned weight that the next step would not write is not +0.0, of those looked at this
// turn (negative: of all of them): fedmap_sparse/_writes.py, `written_unseen`.
bool written_unseen(const void* values, int dtype, const uint32_t* words, const int64_t* rank,
                    int64_t prunable, const Segment* segments, int64_t nseg, int64_t turn,
                    int threads);

} // namespace fedmap
