// Masks made and read. Contract: fedmap_sparse/mask.py.
#pragma once

#include <array>
#include <cstdint>

namespace fedmap {

int64_t rank_index(const uint32_t* words, int64_t numel, int64_t* rank, int threads);
void mask_from_bools(const uint8_t* bools, int64_t numel, uint32_t* words, int threads);
void mask_to_bools(const uint32_t* words, int64_t numel, uint8_t* bools, int threads);
bool mask_subset(const uint32_t* a, const uint32_t* b, int64_t numel, int threads);
std::array<uint64_t, 2> mask_digest(const uint32_t* words, int64_t numel, int threads);
// Survivors before each of `count` ascending positions.
void ranks_at(const uint32_t* words, const int64_t* rank, const int64_t* positions, int64_t count,
              int64_t* out);

} // namespace fedmap
