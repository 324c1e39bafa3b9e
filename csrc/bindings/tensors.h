// Torch tensors read from C++ without torch's headers: by DLPack's C exchange API, whose table of
// functions torch.Tensor hands out (https://dmlc.github.io/dlpack, version 1.3; torch from 2.11).
#pragma once

#include <cstdint>

#include <pybind11/pybind11.h>

#include "core/dtype.h"

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

  // Its elements, if they lie side by side in row-major order; else -1.
  int64_t flat_numel() const {
    int64_t count = 1;
    bool row_major = true;
    for (int i = dimensions - 1; i >= 0; --i) {
      row_major = row_major && (!strides || shape[i] == 1 || strides[i] == count);
      count *= shape[i];
    }
    return row_major || count == 0 ? count : -1;
  }

  // `n` elements side by side, of the dtype and on the device of `like`.
  bool is_flat(int64_t n, const DlTensor& like) const {
    return dtype.code == like.dtype.code && dtype.bits == like.dtype.bits &&
           device.kind == like.device.kind && device.index == like.device.index &&
           flat_numel() == n;
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

// What this process's torch hands out, borrowed for as long as the process lives. Where torch was
// not imported before this module, nothing, and nothing is a tensor.
struct Torch {
  const DlExchange* exchange = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");

  Torch() {
    const pybind11::dict modules = pybind11::module_::import("sys").attr("modules");
    if (!modules.contains("torch"))
      return;
    const pybind11::object module = modules["torch"];
    const pybind11::object type = module.attr("Tensor");
    const pybind11::capsule table = type.attr("__dlpack_c_exchange_api__");
    const auto* found = table.get_pointer<DlExchange>();
    if (found->version.major == 1)
      exchange = found;
    tensor = reinterpret_cast<PyTypeObject*>(type.ptr());
    parameter = reinterpret_cast<PyTypeObject*>(module.attr("nn").attr("Parameter").ptr());
  }

  // False where there is no tensor, or none that DLPack can describe: a fake one, say.
  bool view(PyObject* object, DlTensor& seen) const {
    if (!exchange || !PyObject_TypeCheck(object, tensor))
      return false;
    if (exchange->view(object, &seen) == 0)
      return true;
    PyErr_Clear();
    return false;
  }

  // Whether it stands for the negative of what its memory holds, as the imaginary part of a
  // conjugate does. DLPack's view does not say.
  bool negated(PyObject* object) const {
    PyObject* const answer = PyObject_CallMethodNoArgs(object, is_neg);
    Py_XDECREF(answer);
    PyErr_Clear();
    return answer != Py_False;
  }
};

inline const Torch* torch = nullptr; // set when the module is made

// Further dtypes of tensors, after those of values (core/dtype.h).
enum OtherDtype : int { kInt32 = 4, kInt64, kFloat64, kUint8, kBool, kNone = -1, kUnfit = -2 };

// An argument that is a tensor: contiguous, in this machine's memory, of a known dtype.
struct Flat {
  void* data = nullptr;
  int64_t numel = 0;
  int dtype = kNone;    // kNone: the argument is None; kUnfit: it is anything else
  bool ordinary = true; // exactly a Tensor or Parameter, or None

  bool is(int wanted, int64_t n) const { return dtype == wanted && numel == n; }
  bool is_none() const { return dtype == kNone; }
  bool is_values(int64_t n) const {
    return (dtype == kFloat32 || dtype == kFloat16 || dtype == kBfloat16) && numel == n;
  }
  // Elements side by side of any dtype that is known.
  bool is_some() const { return dtype >= 0; }
  int64_t nbytes() const {
    constexpr int kWidths[] = {4, 2, 2, 1, 4, 8, 8, 1, 1};
    return numel * kWidths[dtype];
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  static Flat read(PyObject* object) {
    Flat flat;
    if (object == Py_None)
      return flat;
    flat.dtype = kUnfit;
    DlTensor seen;
    constexpr int kCpu = 1; // of DLPack's devices
    if (!torch->view(object, seen) || seen.device.kind != kCpu)
      return flat;
    flat.numel = seen.flat_numel();
    flat.data = reinterpret_cast<void*>(seen.address());
    flat.ordinary = Py_TYPE(object) == torch->tensor || Py_TYPE(object) == torch->parameter;
    const int dtype = known(seen.dtype.code, seen.dtype.bits * seen.dtype.lanes);
    const bool whole = dtype >= kInt8 && dtype != kFloat64; // torch negates only floats lazily
    if ((flat.numel > 0 && flat.data && (whole || !torch->negated(object))) || flat.numel == 0)
      flat.dtype = dtype;
    return flat;
  }

 private:
  static int known(int code, int bits) {
    enum { kInteger = 0, kUnsigned = 1, kFloat = 2, kBrain = 4, kTruth = 6 }; // DLPack's codes
    switch (code << 8 | bits) {
    case kFloat << 8 | 32:
      return kFloat32;
    case kFloat << 8 | 16:
      return kFloat16;
    case kBrain << 8 | 16:
      return kBfloat16;
    case kInteger << 8 | 8:
      return kInt8;
    case kInteger << 8 | 32:
      return kInt32;
    case kInteger << 8 | 64:
      return kInt64;
    case kFloat << 8 | 64:
      return kFloat64;
    case kUnsigned << 8 | 8:
      return kUint8;
    case kTruth << 8 | 8:
      return kBool;
    default:
      return kUnfit;
    }
  }
};

} // namespace fedmap
