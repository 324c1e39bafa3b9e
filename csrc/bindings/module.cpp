// The module: what belongs to no stem, and then what the other files of this folder add.
#include "bindings/args.h"
#include "core/ahead.h"
#include "core/cpu.h"
#include "core/pool.h"

using namespace fedmap;

PYBIND11_MODULE(_native, m) {
  torch = new Torch; // for as long as the process lives
  m.def("isa", [] { return isa_name(isa()); });
  m.def("isa_levels", &isa_levels);
  m.def("set_isa", &set_isa);
  m.def("read_ahead", &read_ahead);
  m.def("set_read_ahead", &set_read_ahead);
  m.def("write_ahead", &write_ahead);
  m.def("set_write_ahead", &set_write_ahead);
  m.def("isa_probe", &isa_probe);
  m.def("pool_threads", &pool::workers);
  for (const Binding::Bind bind : Binding::all())
    bind(m);
}
