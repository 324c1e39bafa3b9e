// Weighted sums in float64, and means of them. Contract: fedmap_sparse/ops/accumulate.py.
#pragma once

#include <cstdint>
#include <vector>

namespace fedmap {

// The two that write a mean return how many of its elements are NaN or infinite.
int64_t weighted_mean(const std::vector<const void*>& payloads, int dtype,
                      const std::vector<double>& weights, int64_t n, void* out, int out_dtype,
                      int threads);
void accumulate_add(double* acc, const void* payload, int dtype, double weight, int64_t n,
                    int threads);
void accumulate_add_int8(double* acc, const int8_t* payload, const float* scales, int64_t block,
                         double weight, int64_t n, int threads);
int64_t accumulate_mean(const double* acc, double total_weight, int64_t n, void* out, int out_dtype,
                        int threads);

} // namespace fedmap
