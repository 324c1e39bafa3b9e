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

// Whether a module still is as `links` (dict, key, what it held) and `sizes` (dict, size) say.
inline bool same_tree(const py::list& links, const py::list& sizes) {
  const auto item = [](PyObject* tuple, int i) { return PyTuple_GET_ITEM(tuple, i); };
  for (const py::handle link : links) {
    PyObject* const found = PyDict_GetItem(item(link.ptr(), 0), item(link.ptr(), 1));
    if (found != item(link.ptr(), 2))
      return false;
  }
  for (const py::handle size : sizes)
    if (PyDict_Size(item(size.ptr(), 0)) != PyLong_AsSsize_t(item(size.ptr(), 1)))
      return false;
  return true;
}

// One look at a model before a step: how many gradients there are, with the address of each in
// `rows` (0: none), if every parameter is still its module's and the view of `values` that its
// segment says, and every gradient is as kernels want it; else -1. From Python, an attribute at a
// time, it took eight times as long.
inline int64_t read_gradients(py::handle values, const py::list& parameters, const py::list& owners,
                              const py::list& keys, const Flat& rows) {
  static PyObject* const grad = PyUnicode_InternFromString("grad");
  require(rows.is(kInt64, 4 * static_cast<int64_t>(parameters.size())) &&
          owners.size() == parameters.size() && keys.size() == parameters.size());
  DlTensor whole, seen;
  if (!torch->view(values.ptr(), whole))
    return -1;
  int64_t count = 0;
  Segment* segment = rows.as<Segment>();
  for (size_t i = 0; i < parameters.size(); ++i, ++segment) {
    PyObject* parameter = PyList_GET_ITEM(parameters.ptr(), i);
    PyObject* owner = PyList_GET_ITEM(owners.ptr(), i);
    if (PyDict_GetItem(owner, PyList_GET_ITEM(keys.ptr(), i)) != parameter ||
        !torch->view(parameter, seen) || !seen.is_flat(segment->numel, whole) ||
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
