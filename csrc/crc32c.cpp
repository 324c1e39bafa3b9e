#include "kernels.h"

namespace fedmap {

uint32_t crc32c(const void* data, int64_t nbytes, uint32_t crc, int threads) {
  (void)threads;
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
  crc = ~crc;
  for (int64_t i = 0; i < nbytes; ++i) {
    crc ^= bytes[i];
    for (int k = 0; k < 8; ++k)
      crc = crc >> 1 ^ (0x82F63B78u & (0u - (crc & 1)));
  }
  return ~crc;
}

} // namespace fedmap
