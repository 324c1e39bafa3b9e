// Many small tensors and one that holds their elements side by side, as messages carry a model's
// buffers: by torch each takes 1 us, whatever its size.
#include <algorithm>

#include "bindings/args.h"

namespace fedmap {
namespace {

bool has_shape(const DlTensor& tensor, const py::tuple& shape) {
  if (static_cast<size_t>(tensor.dimensions) != shape.size())
    return false;
  for (int i = 0; i < tensor.dimensions; ++i)
    if (tensor.shape[i] != shape[i].cast<int64_t>())
      return false;
  return true;
}

bool same_shapes(const py::list& tensors, const py::tuple& shapes) {
  DlTensor seen;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (i >= shapes.size() || !torch->view(PyList_GET_ITEM(tensors.ptr(), i), seen) ||
        !has_shape(seen, shapes[i]))
      return false;
  return tensors.size() == shapes.size();
}

// Whether all are plain, in row-major order, of these shapes and of the dtype of `flat`, which they
// fill; then their addresses and sizes.
bool read_pieces(const py::list& tensors, const py::tuple& shapes, const Flat& flat, Flats& found) {
  if (!flat.is_some() || !flat.ordinary || tensors.size() != shapes.size())
    return false;
  int64_t numel = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
    const Flat piece = Flat::read(tensor);
    DlTensor seen;
    if (!piece.ordinary || !piece.is(flat.dtype, piece.numel) || !torch->view(tensor, seen) ||
        !has_shape(seen, shapes[i]))
      return false;
    numel += piece.numel;
    found.push_back(piece);
  }
  return numel == flat.numel;
}

bool gather(const py::list& tensors, const py::tuple& shapes, const Flat& flat) {
  Flats pieces;
  if (!read_pieces(tensors, shapes, flat, pieces))
    return false;
  char* to = flat.as<char>();
  for (const Flat& piece : pieces) {
    std::copy_n(piece.as<char>(), piece.nbytes(), to);
    to += piece.nbytes();
  }
  return true;
}

bool scatter(const Flat& flat, const py::tuple& shapes, const py::list& tensors) {
  Flats pieces;
  if (!read_pieces(tensors, shapes, flat, pieces))
    return false;
  const char* from = flat.as<char>();
  for (const Flat& piece : pieces) {
    std::copy_n(from, piece.nbytes(), piece.as<char>());
    from += piece.nbytes();
  }
  return true;
}

const Binding binding([](py::module_& m) {
  m.def("same_shapes", &same_shapes);
  m.def("gather", &gather);
  m.def("scatter", &scatter);
});

} // namespace
} // namespace fedmap
