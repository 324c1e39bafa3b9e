// What every file of bindings uses: releasing the GIL, arguments that are tensors or bytes,
// results, and how a file adds its functions to the module.
//
// Functions that serve an op take `attempt` last. True: these are a public function's own arguments
// and nothing was checked yet; unless all are plain tensors as the kernel wants them, the result is
// None and nothing was done. (Python's checks then say what is wrong: fedmap_sparse/ops/_rules.py
// has the table that both follow.) False: they were checked, and what does not fit is an error.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/tensors.h"
#include "core/bits.h"

namespace py = pybind11;

namespace fedmap {

// Adds a file's functions to the module: `const Binding binding([](py::module_& m) { .. });`.
struct Binding {
  using Bind = void (*)(py::module_&);
  explicit Binding(Bind bind) { all().push_back(bind); }
  static std::vector<Bind>& all() {
    static std::vector<Bind> every;
    return every;
  }
};

// Releases the GIL. py::gil_scoped_release takes it back in a destructor that must not throw; but
// when the interpreter exits, taking it ends the thread by an exception (pthread_exit), which
// pybind11 lets pass: a daemon thread inside of a kernel would abort the process.
class Unlock {
 public:
  Unlock() : state_(PyEval_SaveThread()) {}
  Unlock(const Unlock&) = delete;
  Unlock& operator=(const Unlock&) = delete;
  ~Unlock() noexcept(false) { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

using Unlocked = py::call_guard<Unlock>;

// The result of an op's kernel; nothing: an attempt that did not fit.
using Answer = std::optional<int64_t>;
using Flats = std::vector<Flat>;

inline Answer unfit(bool attempt) {
  if (attempt)
    return std::nullopt;
  throw std::invalid_argument("expected contiguous CPU tensors whose dtypes and sizes agree");
}

// For functions without `attempt`.
inline void require(bool fit) {
  if (!fit)
    unfit(false);
}

// Whether each is exactly a torch.Tensor or Parameter, or None.
template <class... Each>
bool ordinary(const Each&... tensors) {
  return (... && tensors.ordinary);
}

inline bool ordinary(const Flats& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Flat& t) { return t.ordinary; });
}

// Whether each is a float32 tensor of n elements.
inline bool vectors_of(const Flats& tensors, int64_t n) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const Flat& t) { return t.is(kFloat32, n); });
}

inline std::vector<const float*> addresses(const Flats& tensors) {
  std::vector<const float*> found;
  for (const Flat& t : tensors)
    found.push_back(t.as<float>());
  return found;
}

// The tensors of a Mask.
struct Bits {
  const Flat &words, &rank;
  int64_t numel;

  bool fit() const {
    return numel >= 0 && words.is(kInt32, mask_words(numel)) &&
           rank.is(kInt64, mask_blocks(numel) + 1);
  }
  int64_t nnz() const { return ranks()[mask_blocks(numel)]; } // once they fit
  uint32_t* bits() const { return words.as<uint32_t>(); }
  int64_t* ranks() const { return rank.as<int64_t>(); }
};

// Memory to read: any contiguous CPU tensor, or what has Python's buffer protocol.
class Bytes {
 public:
  Bytes() = default;
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() {
    if (held_)
      PyBuffer_Release(&view_);
  }

  bool read(PyObject* object) {
    if (const Flat flat = Flat::read(object); flat.dtype >= 0) {
      data = flat.data;
      size = flat.nbytes();
      return true;
    }
    if (PyObject_GetBuffer(object, &view_, PyBUF_SIMPLE) != 0) {
      PyErr_Clear();
      return false;
    }
    held_ = true;
    data = view_.buf;
    size = view_.len;
    return true;
  }

  const void* data = nullptr;
  int64_t size = 0;

 private:
  Py_buffer view_;
  bool held_ = false;
};

} // namespace fedmap

template <>
struct pybind11::detail::type_caster<fedmap::Flat> {
  PYBIND11_TYPE_CASTER(fedmap::Flat, const_name("Tensor | None"));
  bool load(handle source, bool) {
    value = fedmap::Flat::read(source.ptr());
    return true;
  }
};

template <>
struct pybind11::detail::type_caster<fedmap::Bytes> {
  static constexpr auto name = const_name("Tensor | Buffer");
  template <class T>
  using cast_op_type = const fedmap::Bytes&;
  operator const fedmap::Bytes&() const { return value; }
  bool load(handle source, bool) { return value.read(source.ptr()); }

 private:
  fedmap::Bytes value;
};
