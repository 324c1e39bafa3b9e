// The checks of a masked step's arguments, and of a model's gradients before it.
#pragma once

#include "bindings/args.h"
#include "masked_step/segment.h"

namespace fedmap {

// What one masked step works on.
struct Step {
  const Flat& values;
  Bits mask;
  int64_t nnz; // of the mask
  const Flat &rows, &scalars;
  const std::optional<Flats>& grads; // none: `rows` holds their addresses
  const Flat& master;

  int64_t count() const { return rows.numel / 4; }
  Segment* segments() const { return rows.as<Segment>(); }

  template <class... States>
  bool fit(const States&... states) const {
    if (!mask.fit() || !values.is_values(values.numel) || mask.numel > values.numel ||
        !rows.is(kInt64, 4 * count()) || !scalars.is(kFloat64, kScalars * count()) ||
        (master.is_none() && values.dtype != kFloat32) || !fit_segments() ||
        (grads && !fit_grads()) || mask.nnz() != nnz)
      return false;
    const int64_t size = nnz + values.numel - mask.numel;
    const auto packed = [&](const Flat& t) { return t.is_none() || t.is(kFloat32, size); };
    return (... && packed(states)) && packed(master);
  }
  template <class... States>
  bool ordinary(const States&... states) const {
    return fedmap::ordinary(values, mask.words, mask.rank, states..., master) &&
           (!grads || fedmap::ordinary(*grads));
  }
  // In order, apart, inside of `values`, each on one side of the mask's end.
  bool fit_segments() const {
    int64_t end = 0;
    for (int64_t i = 0; i < count(); ++i) {
      const Segment& s = segments()[i];
      if (s.offset < end || s.numel < 0 || s.numel > values.numel - s.offset ||
          (s.offset < mask.numel && (s.offset % 32 || s.numel > mask.numel - s.offset)))
        return false;
      end = s.offset + s.numel;
    }
    return true;
  }
  bool fit_grads() const {
    bool fit = static_cast<int64_t>(grads->size()) == count();
    for (int64_t i = 0; fit && i < count(); ++i) {
      const Flat& grad = (*grads)[i];
      fit = grad.is_none() || grad.is(values.dtype, segments()[i].numel);
    }
    return fit;
  }
  void write_addresses() const {
    for (int64_t i = 0; grads && i < count(); ++i)
      segments()[i].gradient = reinterpret_cast<uintptr_t>((*grads)[i].data);
  }
  bool flagged(int64_t flag) const {
    return std::any_of(segments(), segments() + count(),
                       [&](const Segment& s) { return s.flags & flag; });
  }
};

// Whether dicts still hold what `seen` says, in its order: a dict, its keys and values, the next
// dict, ... A model that has not been touched for a while is out of the cache, and each of its
// objects would be waited for. So they are asked for ahead, a dict's entries a little later than
// itself: a cold mobilenetv2 takes 15 us, where a lookup by each key took 38.
inline bool same_tree(const py::list& seen) {
  constexpr Py_ssize_t kFar = 24, kNear = 8;
  const Py_ssize_t count = PyList_GET_SIZE(seen.ptr());
  const auto at = [&](Py_ssize_t i) { return PyList_GET_ITEM(seen.ptr(), i); };
  Py_ssize_t i = 0;
  const auto next = [&] {
    if (i + kFar < count)
      __builtin_prefetch(at(i + kFar));
    if (i + kNear < count && PyDict_CheckExact(at(i + kNear)))
      __builtin_prefetch(reinterpret_cast<PyDictObject*>(at(i + kNear))->ma_keys);
    return i < count ? at(i++) : nullptr;
  };
  while (i < count) {
    PyObject *const dict = next(), *key, *value;
    if (!PyDict_Check(dict))
      return false;
    for (Py_ssize_t place = 0; PyDict_Next(dict, &place, &key, &value);)
      if (next() != key || next() != value)
        return false;
  }
  return true;
}

// Ask for a Python tensor, and for what it wraps, whose address is its first word (torch 2.13).
// Hints alone, right or wrong: nothing is read through that address. Of a cold mobilenetv2 a look
// at 158 gradients took 130 us, 90 with it.
inline void fetch_tensor(PyObject* far, PyObject* near) {
  __builtin_prefetch(far);
  const char* implementation = reinterpret_cast<char**>(near)[2];
  for (int line = 0; line < 4; ++line)
    __builtin_prefetch(implementation + 64 * line);
}

// One look at a model before a step: how many gradients there are, with the address of each in
// `rows` (0: none), if every parameter is still the view of `values` that its segment says, and
// every gradient is as kernels want it; else -1. From Python, an attribute at a time, it took eight
// times as long.
inline int64_t read_gradients(py::handle values, const py::list& parameters, const Flat& rows) {
  static PyObject* const grad = PyUnicode_InternFromString("grad");
  require(rows.is(kInt64, 4 * static_cast<int64_t>(parameters.size())));
  DlTensor whole, seen;
  if (!torch->view(values.ptr(), whole))
    return -1;
  int64_t count = 0;
  Segment* segment = rows.as<Segment>();
  for (size_t i = 0; i < parameters.size(); ++i, ++segment) {
    if (i + 8 < parameters.size())
      fetch_tensor(PyList_GET_ITEM(parameters.ptr(), i + 8),
                   PyList_GET_ITEM(parameters.ptr(), i + 4));
    PyObject* parameter = PyList_GET_ITEM(parameters.ptr(), i);
    if (!torch->view(parameter, seen) || !seen.is_flat(segment->numel, whole) ||
        (segment->numel &&
         seen.address() != whole.address() + segment->offset * whole.dtype.bits / 8))
      return -1;
    const auto gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter, grad));
    if (!gradient)
      throw py::error_already_set();
    segment->gradient = 0;
    if (gradient.is_none())
      continue;
    if (!torch->view(gradient.ptr(), seen) || !seen.is_flat(segment->numel, whole) ||
        torch->negated(gradient.ptr()))
      return -1;
    segment->gradient = seen.address();
    ++count;
  }
  return count;
}

} // namespace fedmap
