// Torch tensors read from C++ without torch's headers: by DLPack's C exchange API, whose table of
// functions torch.Tensor hands out (https://dmlc.github.io/dlpack, version 1.3; torch from 2.11).
#pragma once

#include <cstdint>

namespace fedmap {

// The ABI that the standard fixes for every version 1.x.
struct DlTensor {
  void* data;
  struct {
    int32_t kind, index;
  } device;
  int32_t dimensions;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides; // in elements; null: row-major
  uint64_t byte_offset;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data) + byte_offset; }

  // `n` elements side by side in row-major order, of the dtype and on the device of `like`.
  bool is_flat(int64_t n, const DlTensor& like) const {
    if (dtype.code != like.dtype.code || dtype.bits != like.dtype.bits ||
        device.kind != like.device.kind || device.index != like.device.index)
      return false;
    int64_t count = 1;
    bool row_major = true;
    for (int i = dimensions - 1; i >= 0; --i) {
      row_major = row_major && (!strides || shape[i] == 1 || strides[i] == count);
      count *= shape[i];
    }
    return count == n && (row_major || n == 0);
  }
};

struct DlExchange {
  struct {
    uint32_t major, minor;
  } version;
  const DlExchange* previous;
  void* allocate;
  void* export_owned;
  void* import_owned;
  int (*view)(void* object, DlTensor* out); // borrows; not 0: a Python exception is set
  void* current_stream;
};

} // namespace fedmap
