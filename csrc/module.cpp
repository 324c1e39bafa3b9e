// All of pybind11: converts, releases the GIL, calls. Buffers come as integer addresses
// (`tensor.data_ptr()`), so that a call costs well under a microsecond and no torch header is
// needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu.h"
#include "entropy.h"
#include "kernels.h"
#include "pool.h"
#include "tensors.h"

namespace py = pybind11;
using namespace fedmap;
using Address = uintptr_t;

namespace {

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
      Unlock unlocked;
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
                            ranks.empty() ? nullptr : at<int64_t>(ranks[i])});
        return select(inputs, dtype, eligible, keep, threads);
      },
      Unlocked());
  m.def("select_reads", &select_reads);
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
         Address rank, int threads) {
        relative(at<uint32_t>(child), at<uint32_t>(parent), at<int64_t>(parent_rank), numel,
                 at<uint32_t>(out), at<int64_t>(rank), threads);
      },
      Unlocked());
  m.def(
      "nest",
      [](Address kept, Address parent, Address parent_rank, int64_t numel, Address out,
         Address rank, int threads) {
        nest(at<uint32_t>(kept), at<uint32_t>(parent), at<int64_t>(parent_rank), numel,
             at<uint32_t>(out), at<int64_t>(rank), threads);
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

// Whether torch shows a tensor; false too where there is none, or not one that DLPack can describe.
bool view(const DlExchange& torch, PyObject* object, DlTensor& seen) {
  if (torch.view(object, &seen) == 0)
    return true;
  PyErr_Clear();
  return false;
}

// One look at a model before a step: true, with each gradient's address in `segments` (0: none), if
// every parameter is still its module's and the view of `values` that its segment says, and every
// gradient is as kernels want it. From Python, an attribute at a time, it took eight times as long.
bool read_gradients(const py::capsule& exchange, py::handle values, const py::list& parameters,
                    const py::list& owners, const py::list& keys, Address segments) {
  static PyObject* const grad = PyUnicode_InternFromString("grad");
  const auto* torch = exchange.get_pointer<DlExchange>();
  DlTensor whole, seen;
  if (torch->version.major != 1 || !view(*torch, values.ptr(), whole))
    return false;
  Segment* segment = at<Segment>(segments);
  for (size_t i = 0; i < parameters.size(); ++i, ++segment) {
    PyObject* parameter = PyList_GET_ITEM(parameters.ptr(), i);
    PyObject* owner = PyList_GET_ITEM(owners.ptr(), i);
    if (PyDict_GetItem(owner, PyList_GET_ITEM(keys.ptr(), i)) != parameter ||
        !view(*torch, parameter, seen) || !seen.is_flat(segment->numel, whole) ||
        (segment->numel &&
         seen.address() != whole.address() + segment->offset * whole.dtype.bits / 8))
      return false;
    const auto gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter, grad));
    if (!gradient)
      throw py::error_already_set();
    if (gradient.is_none())
      segment->gradient = 0;
    else if (view(*torch, gradient.ptr(), seen) && seen.is_flat(segment->numel, whole))
      segment->gradient = seen.address();
    else
      return false;
  }
  return true;
}

void bind_steps(py::module_& m) {
  m.def("read_gradients", &read_gradients);
  m.def(
      "masked_sgd",
      [](Address values, int dtype, Address words, Address rank, int64_t prunable, int64_t numel,
         Address segments, int64_t nseg, Address scalars, Address momentum, Address master,
         int threads) {
        masked_sgd(at<void>(values), dtype, at<uint32_t>(words), at<int64_t>(rank), prunable, numel,
                   at<Segment>(segments), nseg, at<double>(scalars), at<float>(momentum),
                   at<float>(master), threads);
      },
      Unlocked());
  m.def(
      "masked_adamw",
      [](Address values, int dtype, Address words, Address rank, int64_t prunable, int64_t numel,
         Address segments, int64_t nseg, Address scalars, Address exp_avg, Address exp_avg_sq,
         Address max_exp_avg_sq, Address master, int threads) {
        masked_adamw(at<void>(values), dtype, at<uint32_t>(words), at<int64_t>(rank), prunable,
                     numel, at<Segment>(segments), nseg, at<double>(scalars), at<float>(exp_avg),
                     at<float>(exp_avg_sq), at<float>(max_exp_avg_sq), at<float>(master), threads);
      },
      Unlocked());
}

void bind_accumulate(py::module_& m) {
  m.def(
      "weighted_mean",
      [](const std::vector<Address>& payloads, int dtype, const std::vector<double>& weights,
         int64_t n, Address out, int out_dtype, int threads) {
        return weighted_mean(at_each<const void>(payloads), dtype, weights, n, at<void>(out),
                             out_dtype, threads);
      },
      Unlocked());
  m.def(
      "weighted_mean_int8",
      [](const std::vector<Address>& payloads, const std::vector<Address>& scales, int64_t block,
         const std::vector<double>& weights, int64_t n, Address out, int out_dtype, int threads) {
        return weighted_mean_int8(at_each<const int8_t>(payloads), at_each<const float>(scales),
                                  block, weights, n, at<void>(out), out_dtype, threads);
      },
      Unlocked());
  m.def(
      "accumulate_add",
      [](Address sums, Address payload, int dtype, double weight, int64_t n, int threads) {
        accumulate_add(at<double>(sums), at<void>(payload), dtype, weight, n, threads);
      },
      Unlocked());
  m.def(
      "accumulate_add_int8",
      [](Address sums, Address payload, Address scales, int64_t block, double weight, int64_t n,
         int threads) {
        accumulate_add_int8(at<double>(sums), at<int8_t>(payload), at<float>(scales), block, weight,
                            n, threads);
      },
      Unlocked());
  m.def(
      "accumulate_mean",
      [](Address sums, double total_weight, int64_t n, Address out, int out_dtype, int threads) {
        return accumulate_mean(at<double>(sums), total_weight, n, at<void>(out), out_dtype,
                               threads);
      },
      Unlocked());
}

void bind_quantize(py::module_& m) {
  m.def(
      "cast",
      [](Address src, int src_dtype, Address dst, int dst_dtype, int64_t n, int threads) {
        return cast(at<void>(src), src_dtype, at<void>(dst), dst_dtype, n, threads);
      },
      Unlocked());
  m.def(
      "all_finite",
      [](Address src, int dtype, int64_t n, int threads) {
        return all_finite(at<void>(src), dtype, n, threads);
      },
      Unlocked());
  m.def(
      "quantize_int8",
      [](Address src, int64_t n, int64_t block, Address q, Address scales, Address residual,
         int threads) {
        quantize_int8(at<float>(src), n, block, at<int8_t>(q), at<float>(scales),
                      at<float>(residual), threads);
      },
      Unlocked());
  m.def(
      "dequantize_int8",
      [](Address q, Address scales, int64_t block, int64_t n, Address dst, int threads) {
        dequantize_int8(at<int8_t>(q), at<float>(scales), block, n, at<float>(dst), threads);
      },
      Unlocked());
}

// None, or (reason, offset).
py::object fault_or_none(const Fault& fault) {
  if (!fault.reason)
    return py::none();
  return py::make_tuple(fault.reason, fault.offset);
}

void bind_entropy(py::module_& m) {
  m.def(
      "ranks_at",
      [](Address words, Address rank, Address positions, int64_t count, Address out) {
        ranks_at(at<uint32_t>(words), at<int64_t>(rank), at<int64_t>(positions), count,
                 at<int64_t>(out));
      },
      Unlocked());
  m.def(
      "encode_mask",
      [](Address words, Address starts, Address numels, int64_t runs, Address codes,
         int64_t chunk_steps, Address out, int64_t capacity, int threads) {
        return encode_mask(at<uint32_t>(words), {at<int64_t>(starts), at<int64_t>(numels), runs},
                           at<uint8_t>(codes), chunk_steps, at<uint8_t>(out), capacity, threads);
      },
      Unlocked());
  m.def("decode_mask", [](Address payload, int64_t size, Address starts, Address numels,
                          int64_t runs, int64_t numel, Address words, int threads) {
    Fault fault;
    {
      Unlock unlocked;
      fault =
          decode_mask(at<uint8_t>(payload), size, {at<int64_t>(starts), at<int64_t>(numels), runs},
                      numel, at<uint32_t>(words), threads);
    }
    return fault_or_none(fault);
  });
  m.def(
      "encode_values",
      [](Address values, int dtype, int64_t n, Address out, int64_t capacity, int threads) {
        return encode_values(at<void>(values), dtype, n, at<uint8_t>(out), capacity, threads);
      },
      Unlocked());
  m.def("decode_values",
        [](Address payload, int64_t size, int dtype, int64_t n, Address out, int threads) {
          Fault fault;
          {
            Unlock unlocked;
            fault = decode_values(at<uint8_t>(payload), size, dtype, n, at<void>(out), threads);
          }
          return fault_or_none(fault);
        });
  m.def("check_values", [](Address payload, int64_t size, int dtype, int64_t n, int threads) {
    Fault fault;
    bool finite = false;
    {
      Unlock unlocked;
      fault = check_values(at<uint8_t>(payload), size, dtype, n, &finite, threads);
    }
    return py::make_tuple(fault_or_none(fault), finite);
  });
  m.def("add_values", [](Address payload, int64_t size, int dtype, int64_t n, Address sums,
                         double weight, int threads) {
    Fault fault;
    {
      Unlock unlocked;
      fault = add_values(at<uint8_t>(payload), size, dtype, n, at<double>(sums), weight, threads);
    }
    return fault_or_none(fault);
  });
}

} // namespace

PYBIND11_MODULE(_native, m) {
  m.def("isa", [] { return isa_name(isa()); });
  m.def("isa_levels", &isa_levels);
  m.def("set_isa", &set_isa);
  m.def("isa_probe", &isa_probe);
  m.def("pool_threads", &pool::workers);
  bind_masks(m);
  bind_select(m);
  bind_pack(m);
  bind_nest(m);
  bind_steps(m);
  bind_accumulate(m);
  bind_quantize(m);
  bind_entropy(m);
  bind_bytes(m);
}
