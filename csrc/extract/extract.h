// A child's bits over its parent's survivors, and back. Contract: fedmap_sparse/ops/extract.py.
#pragma once

#include <cstdint>

namespace fedmap {

void extract(const uint32_t* child, const uint32_t* parent, const int64_t* parent_rank,
             int64_t numel, uint32_t* out, int64_t* rank, int threads);
void deposit(const uint32_t* kept, const uint32_t* parent, const int64_t* parent_rank,
             int64_t numel, uint32_t* out, int64_t* rank, int threads);

} // namespace fedmap
