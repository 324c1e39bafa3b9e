// float32 to and from the 16-bit types, one value at a time: the forms that finish every tail.
//
// Rounding is to nearest even, subnormals included. A NaN becomes the canonical quiet one, its sign
// dropped, because hardware and integer paths would otherwise keep different payloads.
#pragma once

#include <cstdint>
#include <cstring>

namespace fedmap {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000)
    return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_float16(float x) {
  uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000)
    return 0x7e00;
  if (magnitude >= 0x477ff000) // 65520: halfway between the largest finite and the next
    return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Adding 0.5 leaves the multiple of 2^-24, the spacing of subnormals, in the low bits.
    float aligned = bits_float(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(float_bits(aligned) - 0x3f000000);
  }
  magnitude -= 0x38000000; // rebias the exponent, 127 to 15
  return sign | static_cast<uint16_t>((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline float from_float16(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00)
    return bits_float(sign | 0x7f800000 | magnitude << 13);
  if (magnitude < 0x400) // a multiple of 2^-24, exact in float32
    return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
  return bits_float(sign | ((magnitude << 13) + 0x38000000));
}

} // namespace fedmap
