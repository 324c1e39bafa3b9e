// All of pybind11: converts, releases the GIL, calls. Buffers come as integer addresses
// (`tensor.data_ptr()`), so that a call costs well under a microsecond and no torch header is
// needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu.h"
#include "kernels.h"
#include "pool.h"

namespace py = pybind11;
using namespace fedmap;
using Address = uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
std::vector<T*> at_each(const std::vector<Address>& addresses) {
  std::vector<T*> pointers;
  pointers.reserve(addresses.size());
  for (Address address : addresses)
    pointers.push_back(at<T>(address));
  return pointers;
}

void bind_masks(py::module_& m) {
  m.def(
      "rank_index",
      [](Address words, int64_t numel, Address rank, int threads) {
        return rank_index(at<uint32_t>(words), numel, at<int64_t>(rank), threads);
      },
      Unlocked());
  m.def(
      "mask_from_bools",
      [](Address bools, int64_t numel, Address words, int threads) {
        mask_from_bools(at<uint8_t>(bools), numel, at<uint32_t>(words), threads);
      },
      Unlocked());
  m.def(
      "mask_to_bools",
      [](Address words, int64_t numel, Address bools, int threads) {
        mask_to_bools(at<uint32_t>(words), numel, at<uint8_t>(bools), threads);
      },
      Unlocked());
  m.def(
      "mask_subset",
      [](Address a, Address b, int64_t numel, int threads) {
        return mask_subset(at<uint32_t>(a), at<uint32_t>(b), numel, threads);
      },
      Unlocked());
  m.def("mask_digest", [](Address words, int64_t numel, int threads) {
    std::array<uint64_t, 2> sums;
    {
      py::gil_scoped_release unlocked;
      sums = mask_digest(at<uint32_t>(words), numel, threads);
    }
    char bytes[16];
    for (int i = 0; i < 16; ++i)
      bytes[i] = static_cast<char>(sums[i / 8] >> (8 * (i % 8)));
    return py::bytes(bytes, sizeof bytes);
  });
}

void bind_select(py::module_& m) {
  m.def(
      "select",
      [](const std::vector<Address>& values, const std::vector<int64_t>& numels, int dtype,
         const std::vector<Address>& within, int64_t eligible, int64_t keep,
         const std::vector<Address>& words, const std::vector<Address>& ranks, int threads) {
        std::vector<SelectInput> inputs;
        inputs.reserve(values.size());
        for (size_t i = 0; i < values.size(); ++i)
          inputs.push_back({at<void>(values[i]), numels[i], at<uint32_t>(within[i]),
                            words.empty() ? nullptr : at<uint32_t>(words[i]),
                            words.empty() ? nullptr : at<int64_t>(ranks[i])});
        return select(inputs, dtype, eligible, keep, threads);
      },
      Unlocked());
  m.def(
      "zero_pruned",
      [](Address values, Address before, Address after, int64_t numel, int dtype, int threads) {
        zero_pruned(at<void>(values), at<uint32_t>(before), at<uint32_t>(after), numel, dtype,
                    threads);
      },
      Unlocked());
}

void bind_pack(py::module_& m) {
  m.def(
      "pack",
      [](Address values, int dtype, Address words, Address rank, int64_t numel, Address out,
         int out_dtype, int threads) {
        return pack(at<void>(values), dtype, at<uint32_t>(words), at<int64_t>(rank), numel,
                    at<void>(out), out_dtype, threads);
      },
      Unlocked());
  m.def(
      "unpack",
      [](Address packed, int packed_dtype, Address words, Address rank, int64_t numel, Address out,
         int out_dtype, int threads) {
        unpack(at<void>(packed), packed_dtype, at<uint32_t>(words), at<int64_t>(rank), numel,
               at<void>(out), out_dtype, threads);
      },
      Unlocked());
}

void bind_nest(py::module_& m) {
  m.def(
      "relative",
      [](Address child, Address parent, Address parent_rank, int64_t numel, Address out,
         int threads) {
        relative(at<uint32_t>(child), at<uint32_t>(parent), at<int64_t>(parent_rank), numel,
                 at<uint32_t>(out), threads);
      },
      Unlocked());
  m.def(
      "nest",
      [](Address kept, Address parent, Address parent_rank, int64_t numel, Address out,
         int threads) {
        nest(at<uint32_t>(kept), at<uint32_t>(parent), at<int64_t>(parent_rank), numel,
             at<uint32_t>(out), threads);
      },
      Unlocked());
}

void bind_bytes(py::module_& m) {
  m.def(
      "crc32c",
      [](Address data, int64_t nbytes, uint32_t crc, int threads) {
        return crc32c(at<void>(data), nbytes, crc, threads);
      },
      Unlocked());
  m.def(
      "stream_read",
      [](Address src, int64_t nbytes, int threads) {
        return stream_read(at<void>(src), nbytes, threads);
      },
      Unlocked());
  m.def(
      "stream_copy",
      [](Address src, Address dst, int64_t nbytes, int threads) {
        stream_copy(at<void>(src), at<void>(dst), nbytes, threads);
      },
      Unlocked());
  m.def(
      "stream_inplace",
      [](Address buf, int64_t nbytes, int threads) {
        stream_inplace(at<void>(buf), nbytes, threads);
      },
      Unlocked());
  m.def(
      "stream_touched",
      [](Address buf, Address words, int64_t numel, int threads) {
        stream_touched(at<float>(buf), at<uint32_t>(words), numel, threads);
      },
      Unlocked());
}

// A2's region: bind_steps, bind_accumulate, bind_quantize go here, and are called below.
// (end of A2's region)

} // namespace

PYBIND11_MODULE(_native, m) {
  m.def("isa", [] { return isa_name(isa()); });
  m.def("isa_levels", &isa_levels);
  m.def("set_isa", &set_isa);
  m.def("pool_threads", &pool::workers);
  bind_masks(m);
  bind_select(m);
  bind_pack(m);
  bind_nest(m);
  bind_bytes(m);
}
