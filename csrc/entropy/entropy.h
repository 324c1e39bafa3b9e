// Entropy coding of mask bits and of exponents. docs/format.md, 5 and 6, define the bytes;
// fedmap_sparse/ops/entropy.py the contracts. What decodes checks everything it reads.
#pragma once

#include <cstdint>

namespace fedmap {

// What is wrong with a payload, and at which of its bytes; `reason` is null when nothing is.
struct Fault {
  const char* reason = nullptr;
  int64_t offset = 0;
};

// Bits [start, start + numel) of a bitmap belong to one tensor.
struct MaskRuns {
  const int64_t* start;
  const int64_t* numel;
  int64_t count;
};

// Returns the size of the payload, or -1 if it is above `capacity`. `codes` has a density code for
// each run; a run whose code says that it is constant must be.
int64_t encode_mask(const uint32_t* words, MaskRuns runs, const uint8_t* codes, int64_t chunk_steps,
                    uint8_t* out, int64_t capacity, int threads);
// Writes all ceil(numel / 32) words: zeros outside of the runs.
Fault decode_mask(const uint8_t* payload, int64_t size, MaskRuns runs, int64_t numel,
                  uint32_t* words, int threads);

// Values of dtype float32, float16 or bfloat16. Returns the size of the payload, or -1 if it is
// above `capacity`.
int64_t encode_values(const void* values, int dtype, int64_t n, uint8_t* out, int64_t capacity,
                      int threads);
Fault decode_values(const uint8_t* payload, int64_t size, int dtype, int64_t n, void* out,
                    int threads);
// Decodes without storing; `finite` tells whether all values are.
Fault check_values(const uint8_t* payload, int64_t size, int dtype, int64_t n, bool* finite,
                   int threads);
// acc[i] += weight * value[i] in float64, tile by tile, as accumulate_add; after check_values.
Fault add_values(const uint8_t* payload, int64_t size, int dtype, int64_t n, double* acc,
                 double weight, int threads);

} // namespace fedmap
