// Means of the middle values of each element. Contract: fedmap_sparse/ops/trimmed.py.
#pragma once

#include <cstdint>
#include <vector>

namespace fedmap {

// Returns how many of the means are NaN or infinite.
int64_t trimmed_mean(const std::vector<const float*>& rows, int trim, int64_t n, float* out,
                     int threads);

} // namespace fedmap
