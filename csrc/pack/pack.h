// Survivors side by side, and back. Contract: fedmap_sparse/ops/pack.py.
#pragma once

#include <cstdint>

namespace fedmap {

// Returns how many finite values overflowed to infinity on the way to `out_dtype`.
int64_t pack(const void* values, int dtype, const uint32_t* words, const int64_t* rank,
             int64_t numel, void* out, int out_dtype, int threads);
void unpack(const void* packed, int packed_dtype, const uint32_t* words, const int64_t* rank,
            int64_t numel, void* out, int out_dtype, int threads);

} // namespace fedmap
