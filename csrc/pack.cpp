#include "convert.h"
#include "kernels.h"
#include "pool.h"

namespace fedmap {
namespace {

bool bit(const uint32_t* words, int64_t i) { return words[i >> 5] >> (i & 31) & 1; }

float load(const void* values, int dtype, int64_t i) {
  if (dtype == kFloat32)
    return static_cast<const float*>(values)[i];
  uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return dtype == kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

void store(void* values, int dtype, int64_t i, float x) {
  if (dtype == kFloat32)
    static_cast<float*>(values)[i] = x;
  else
    static_cast<uint16_t*>(values)[i] = dtype == kFloat16 ? to_float16(x) : to_bfloat16(x);
}

void copy(const void* src, int64_t i, void* dst, int64_t o, int dtype) {
  if (dtype == kFloat32)
    static_cast<uint32_t*>(dst)[o] = static_cast<const uint32_t*>(src)[i];
  else
    static_cast<uint16_t*>(dst)[o] = static_cast<const uint16_t*>(src)[i];
}

} // namespace

int64_t pack(const void* values, int dtype, const uint32_t* words, const int64_t* rank,
             int64_t numel, void* out, int out_dtype, int threads) {
  (void)threads, (void)rank;
  int64_t o = 0, overflow = 0;
  for (int64_t i = 0; i < numel; ++i) {
    if (!bit(words, i))
      continue;
    if (dtype == out_dtype) {
      copy(values, i, out, o++, dtype);
      continue;
    }
    float x = load(values, dtype, i);
    store(out, out_dtype, o, x);
    overflow += (float_bits(x) & 0x7fffffff) < 0x7f800000 &&
                (float_bits(load(out, out_dtype, o)) & 0x7fffffff) == 0x7f800000;
    ++o;
  }
  return overflow;
}

void unpack(const void* packed, int packed_dtype, const uint32_t* words, const int64_t* rank,
            int64_t numel, void* out, int out_dtype, int threads) {
  (void)threads, (void)rank;
  int64_t o = 0;
  for (int64_t i = 0; i < numel; ++i) {
    if (!bit(words, i))
      store(out, out_dtype, i, 0.0f);
    else if (packed_dtype == out_dtype)
      copy(packed, o++, out, i, out_dtype);
    else
      store(out, out_dtype, i, load(packed, packed_dtype, o++));
  }
}

} // namespace fedmap
