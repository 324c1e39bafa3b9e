// Squared distances between vectors. Contract: fedmap_sparse/ops/distances.py.
#pragma once

#include <cstdint>
#include <vector>

namespace fedmap {

// out[i * others + j] between vectors[i] and others[j]; no others: among the vectors.
void squared_distances(const std::vector<const float*>& vectors,
                       const std::vector<const float*>& others, int64_t n, double* out,
                       int threads);

} // namespace fedmap
