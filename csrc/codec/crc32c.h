// CRC-32C (Castagnoli), the checksum of a message's sections. docs/format.md, 2.
#pragma once

#include <cstdint>

namespace fedmap {

// Continues from `crc`, 0 at the beginning.
uint32_t crc32c(const void* data, int64_t nbytes, uint32_t crc, int threads);

} // namespace fedmap
