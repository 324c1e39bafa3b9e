// The floors that benchmarks measure beside each case.
#pragma once

#include <cstdint>

namespace fedmap {

uint64_t stream_read(const void* src, int64_t nbytes, int threads);
void stream_copy(const void* src, void* dst, int64_t nbytes, int threads);
void stream_inplace(void* buf, int64_t nbytes, int threads);
void stream_touched(float* buf, const uint32_t* words, int64_t numel, int threads);

} // namespace fedmap
