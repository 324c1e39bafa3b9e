// Casts and int8 by blocks. Contract: fedmap_sparse/ops/quantize.py.
#pragma once

#include <cstdint>

namespace fedmap {

// Returns how many finite values overflowed to infinity.
int64_t cast(const void* src, int src_dtype, void* dst, int dst_dtype, int64_t n, int threads);
bool all_finite(const void* src, int dtype, int64_t n, int threads);
void quantize_int8(const float* src, int64_t n, int64_t block, int8_t* q, float* scales,
                   float* residual, int threads);
void dequantize_int8(const int8_t* q, const float* scales, int64_t block, int64_t n, float* dst,
                     int threads);

} // namespace fedmap
