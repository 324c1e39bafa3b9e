// The dtypes of values, by the codes that Python and the message format use.
#pragma once

#include <cstdint>

namespace fedmap {

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kInt8 = 3 };

inline int64_t dtype_bytes(int dtype) {
  return dtype == kFloat32 ? 4 : dtype == kInt8 ? 1 : 2;
}

} // namespace fedmap
