// Fixed-point integers. Contract: fedmap_sparse/ops/fixed.py.
#pragma once

#include <cstdint>

namespace fedmap {

// Returns how many values were beyond `clip`.
int64_t to_fixed(const float* values, int64_t n, double clip, double scale, int32_t weight,
                 int32_t* out, int threads);
void from_fixed(const int32_t* sums, int64_t n, double divisor, float* out, int threads);

} // namespace fedmap
