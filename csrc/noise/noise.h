// Gaussian noise from a counter. Contract and method: fedmap_sparse/ops/noise.py.
#pragma once

#include <cstdint>

namespace fedmap {

void add_gaussian(float* values, int64_t n, double std, uint64_t seed, uint64_t stream,
                  int threads);

} // namespace fedmap
