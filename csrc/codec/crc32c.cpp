// CRC-32C (Castagnoli), reflected, as iSCSI and zlib's interface have it.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "codec/crc32c.h"
#include "core/ahead.h"
#include "core/bits.h"
#include "core/cpu.h"
#include "core/pool.h"

namespace fedmap {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u; // bit 31 is x^0
constexpr int64_t kCrcShare = 1 << 20;

// a * b modulo the polynomial.
uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    if (a & bit)
      product ^= b;
    b = b >> 1 ^ (kPolynomial & (0u - (b & 1)));
  }
  return product;
}

// x^(8 bytes): multiplying a checksum by it appends so many zero bytes.
uint32_t power_of_bytes(int64_t bytes) {
  uint32_t result = 1u << 31, square = 1u << 23; // x^0 and x^8
  for (; bytes; bytes >>= 1, square = multiply(square, square))
    if (bytes & 1)
      result = multiply(square, result);
  return result;
}

using Table = std::array<uint32_t, 256>;

// The product of a checksum and a constant, byte by byte.
class Multiplier {
 public:
  explicit Multiplier(uint32_t factor) {
    for (int byte = 0; byte < 4; ++byte)
      for (uint32_t n = 0; n < 256; ++n)
        tables_[byte][n] = multiply(factor, n << (8 * byte));
  }

  uint32_t operator()(uint32_t crc) const {
    return tables_[0][crc & 0xff] ^ tables_[1][crc >> 8 & 0xff] ^ tables_[2][crc >> 16 & 0xff] ^
           tables_[3][crc >> 24];
  }

 private:
  std::array<Table, 4> tables_;
};

// tables[k][n]: the checksum of byte n followed by k zero bytes (M. Kounavis, F. Berry, "Novel
// Table Lookup-Based Algorithms for High-Performance CRC Generation", 2008).
const std::array<Table, 8>& slicing_tables() {
  static const std::array<Table, 8> tables = [] {
    std::array<Table, 8> made;
    for (uint32_t n = 0; n < 256; ++n)
      made[0][n] = multiply(1u << 23, n);
    for (int k = 1; k < 8; ++k)
      for (uint32_t n = 0; n < 256; ++n)
        made[k][n] = made[k - 1][n] >> 8 ^ made[0][made[k - 1][n] & 0xff];
    return made;
  }();
  return tables;
}

} // namespace

namespace scalar {

static uint32_t checksum(const uint8_t* data, int64_t nbytes, uint32_t crc) {
  const std::array<Table, 8>& t = slicing_tables();
  for (; nbytes >= 8; nbytes -= 8, data += 8) {
    crc ^= data[0] | data[1] << 8 | data[2] << 16 | static_cast<uint32_t>(data[3]) << 24;
    crc = t[7][crc & 0xff] ^ t[6][crc >> 8 & 0xff] ^ t[5][crc >> 16 & 0xff] ^ t[4][crc >> 24] ^
          t[3][data[4]] ^ t[2][data[5]] ^ t[1][data[6]] ^ t[0][data[7]];
  }
  for (; nbytes > 0; --nbytes)
    crc = crc >> 8 ^ t[0][(crc ^ *data++) & 0xff];
  return crc;
}

} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

static uint64_t append_8(uint64_t crc, uint64_t bytes) {
  return _mm_crc32_u64(crc, bytes);
}

#include "codec/crc32c_body.h"

static uint32_t checksum(const uint8_t* data, int64_t nbytes, uint32_t crc) {
  return checksum_by_instruction(data, nbytes, crc);
}

} // namespace avx2
FEDMAP_TARGET_END

namespace avx512_core {
using avx2::checksum;
} // namespace avx512_core

#elif FEDMAP_ARM64
namespace neon {

// In assembly, because compilers offer it only to files that are compiled for such processors.
static uint64_t append_8(uint64_t crc, uint64_t bytes) {
  __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(bytes));
  return crc;
}

#include "codec/crc32c_body.h"

static uint32_t checksum(const uint8_t* data, int64_t nbytes, uint32_t crc) {
  return has_arm_crc32() ? checksum_by_instruction(data, nbytes, crc)
                         : scalar::checksum(data, nbytes, crc);
}

} // namespace neon
#endif

uint32_t crc32c(const void* data, int64_t nbytes, uint32_t crc, int threads) {
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
  const auto checksum = FEDMAP_DISPATCH(checksum);
  crc = ~crc;
  const int workers = threads_for(nbytes, threads);
  if (workers == 1)
    return ~checksum(bytes, nbytes, crc);
  std::vector<uint32_t> parts((nbytes + kCrcShare - 1) / kCrcShare);
  parallel_ranges(nbytes, kCrcShare, workers, [&](int64_t begin, int64_t end) {
    parts[begin / kCrcShare] = checksum(bytes + begin, end - begin, begin ? 0 : crc);
  });
  const uint32_t append = power_of_bytes(kCrcShare);
  const uint32_t append_last = power_of_bytes(nbytes - (parts.size() - 1) * kCrcShare);
  crc = parts[0];
  for (size_t k = 1; k < parts.size(); ++k)
    crc = multiply(k + 1 < parts.size() ? append : append_last, crc) ^ parts[k];
  return ~crc;
}

} // namespace fedmap
