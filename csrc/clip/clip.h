// Cuts the difference of two vectors to a norm. Contract: fedmap_sparse/ops/clip.py.
#pragma once

#include <cstdint>

namespace fedmap {

// The norm of `values - start` before; `values` changes only where that is finite and larger.
double clip_difference(float* values, const float* start, int64_t n, double max_norm, int threads);

} // namespace fedmap
