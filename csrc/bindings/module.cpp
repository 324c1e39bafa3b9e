// All of pybind11: converts, releases the GIL, calls. The ops that cost no more than their call
// take tensors (tensors.h), read and checked here at once; others integer addresses
// (`tensor.data_ptr()`). No torch header is needed.
#include <algorithm>
#include <optional>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "accumulate/accumulate.h"
#include "bindings/tensors.h"
#include "codec/crc32c.h"
#include "core/bits.h"
#include "core/cpu.h"
#include "core/pool.h"
#include "entropy/entropy.h"
#include "extract/extract.h"
#include "floors/stream.h"
#include "mask/mask.h"
#include "masked_step/segment.h"
#include "pack/pack.h"
#include "quantize/quantize.h"
#include "select/select.h"

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

// What a call on tensors answers. Its last argument, `attempt`: these are a public function's own
// arguments, nothing was checked yet. Then it is None, with nothing done, unless each is a
// torch.Tensor, no subclass, and all is as the kernel wants it; Python has the checks that say what
// is wrong. Else they were checked, and what does not fit is an error.
using Answer = std::optional<int64_t>;
using Flats = std::vector<Flat>;

Answer unfit(bool attempt) {
  if (attempt)
    return std::nullopt;
  throw std::invalid_argument("expected contiguous CPU tensors whose dtypes and sizes agree");
}

template <class... Each>
bool ordinary(const Each&... tensors) {
  return (... && tensors.ordinary);
}

bool ordinary(const Flats& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Flat& t) { return t.ordinary; });
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

void bind_select(py::module_& m) {
  m.def(
      "select",
      [](const Flats& values, const Flats& within, int64_t eligible, int64_t keep,
         const Flats& words, const Flats& ranks, int threads, bool attempt) -> Answer {
        bool fit = !values.empty() && within.size() == values.size() && 0 < keep &&
                   keep <= eligible && ranks.size() == words.size() &&
                   (words.empty() || words.size() == values.size());
        fit = fit && (!attempt || (ordinary(values) && ordinary(within)));
        std::vector<SelectInput> inputs;
        inputs.reserve(values.size());
        for (size_t i = 0; fit && i < values.size(); ++i) {
          const Flat &v = values[i], &w = within[i];
          fit = v.is_values(v.numel) && v.dtype == values[0].dtype &&
                (w.is_none() || w.is(kInt32, mask_words(v.numel))) &&
                (words.empty() || Bits{words[i], ranks[i], v.numel}.fit());
          inputs.push_back({v.data, v.numel, w.as<uint32_t>(),
                            words.empty() ? nullptr : words[i].as<uint32_t>(),
                            words.empty() ? nullptr : ranks[i].as<int64_t>()});
        }
        if (!fit)
          return unfit(attempt);
        return select(inputs, values[0].dtype, eligible, keep, threads);
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
      [](const Flat& values, const Flat& words, const Flat& rank, int64_t numel, const Flat& out,
         int threads, bool attempt) -> Answer {
        const Bits mask{words, rank, numel};
        if ((attempt && !ordinary(values, words, rank, out)) || !mask.fit() ||
            !values.is_values(numel) || !out.is_values(mask.nnz()))
          return unfit(attempt);
        return pack(values.data, values.dtype, mask.bits(), mask.ranks(), numel, out.data,
                    out.dtype, threads);
      },
      Unlocked());
  m.def(
      "unpack",
      [](const Flat& packed, const Flat& words, const Flat& rank, int64_t numel, const Flat& out,
         int threads, bool attempt) -> Answer {
        const Bits mask{words, rank, numel};
        if ((attempt && !ordinary(packed, words, rank, out)) || !mask.fit() ||
            !packed.is_values(mask.nnz()) || !out.is_values(numel))
          return unfit(attempt);
        unpack(packed.data, packed.dtype, mask.bits(), mask.ranks(), numel, out.data, out.dtype,
               threads);
        return 0;
      },
      Unlocked());
}

void bind_deposit(py::module_& m) {
  m.def(
      "extract",
      [](const Flat& child, const Flat& parent, const Flat& parent_rank, int64_t numel,
         const Flat& out, const Flat& rank, int threads, bool attempt) -> Answer {
        const Bits whole{parent, parent_rank, numel};
        if ((attempt && !ordinary(child, parent, parent_rank)) || !whole.fit() ||
            !child.is(kInt32, mask_words(numel)))
          return unfit(attempt);
        const Bits part{out, rank, whole.nnz()};
        if (!part.fit())
          return unfit(attempt);
        extract(child.as<uint32_t>(), whole.bits(), whole.ranks(), numel, part.bits(), part.ranks(),
                threads);
        return part.nnz();
      },
      Unlocked());
  m.def(
      "deposit",
      [](const Flat& kept, const Flat& parent, const Flat& parent_rank, int64_t numel,
         const Flat& out, const Flat& rank, int threads, bool attempt) -> Answer {
        const Bits whole{parent, parent_rank, numel}, nested{out, rank, numel};
        if ((attempt && !ordinary(kept, parent, parent_rank)) || !whole.fit() || !nested.fit() ||
            !kept.is(kInt32, mask_words(whole.nnz())))
          return unfit(attempt);
        deposit(kept.as<uint32_t>(), whole.bits(), whole.ranks(), numel, nested.bits(),
                nested.ranks(), threads);
        return nested.nnz();
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

// Whether a module still is as `links` (dict, key, what it held) and `sizes` (dict, size) say.
bool same_tree(const py::list& links, const py::list& sizes) {
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
// `segments` (0: none), if every parameter is still its module's and the view of `values` that its
// segment says, and every gradient is as kernels want it; else -1. From Python, an attribute at a
// time, it took eight times as long.
int64_t read_gradients(py::handle values, const py::list& parameters, const py::list& owners,
                       const py::list& keys, Address segments) {
  static PyObject* const grad = PyUnicode_InternFromString("grad");
  DlTensor whole, seen;
  if (!torch->view(values.ptr(), whole))
    return -1;
  int64_t count = 0;
  Segment* segment = at<Segment>(segments);
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

// What one masked step works on; `states` in the kernel's order, null where it keeps none.
struct Step {
  const Flat& values;
  Bits mask;
  const Flat &rows, &scalars;
  const std::optional<Flats>& grads; // none: `rows` holds their addresses
  const Flat& master;

  int64_t count() const { return rows.numel / 4; }
  Segment* segments() const { return rows.as<Segment>(); }

  template <class... States>
  bool fit(const States&... states) const {
    if (!mask.fit() || !values.is_values(values.numel) || mask.numel > values.numel ||
        !rows.is(kInt64, 4 * count()) || !scalars.is(kFloat64, kScalars * count()) ||
        (master.is_none() && values.dtype != kFloat32) || (grads && !fit_grads()))
      return false;
    const int64_t size = mask.nnz() + values.numel - mask.numel;
    const auto packed = [&](const Flat& t) { return t.is_none() || t.is(kFloat32, size); };
    return (... && packed(states)) && packed(master);
  }
  template <class... States>
  bool ordinary(const States&... states) const {
    return ::ordinary(values, mask.words, mask.rank, states..., master) &&
           (!grads || ::ordinary(*grads));
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

void bind_steps(py::module_& m) {
  m.def("same_tree", &same_tree);
  m.def("read_gradients", &read_gradients);
  m.def(
      "written_unseen",
      [](const Flat& values, const Flat& words, const Flat& rank, int64_t prunable,
         const Flat& rows, int64_t turn) {
        const Bits mask{words, rank, prunable};
        const int64_t count = rows.numel / 4;
        const Segment* segments = rows.as<Segment>();
        bool fit = mask.fit() && values.is_values(values.numel) && prunable <= values.numel &&
                   rows.is(kInt64, 4 * count);
        for (int64_t i = 0; fit && i < count && segments[i].offset < prunable; ++i)
          fit = segments[i].offset >= 0 && segments[i].offset % 32 == 0 && segments[i].numel >= 0 &&
                segments[i].offset + segments[i].numel <= prunable;
        if (!fit)
          throw std::invalid_argument("expected tensors whose dtypes and sizes agree");
        return written_unseen(values.data, values.dtype, mask.bits(), mask.ranks(), prunable,
                              segments, count, turn);
      },
      Unlocked());
  m.def(
      "masked_sgd",
      [](const Flat& values, const Flat& words, const Flat& rank, int64_t prunable,
         const std::optional<Flats>& grads, const Flat& rows, const Flat& scalars,
         const Flat& momentum, const Flat& master, int threads, bool attempt) -> Answer {
        const Step s{values, {words, rank, prunable}, rows, scalars, grads, master};
        if ((attempt && !s.ordinary(momentum)) || !s.fit(momentum))
          return unfit(attempt);
        s.write_addresses();
        masked_sgd(values.data, values.dtype, s.mask.bits(), s.mask.ranks(), prunable, values.numel,
                   s.segments(), s.count(), scalars.as<double>(), momentum.as<float>(),
                   master.as<float>(), threads);
        return 0;
      },
      Unlocked());
  m.def(
      "masked_adamw",
      [](const Flat& values, const Flat& words, const Flat& rank, int64_t prunable,
         const std::optional<Flats>& grads, const Flat& rows, const Flat& scalars,
         const Flat& exp_avg, const Flat& exp_avg_sq, const Flat& max_exp_avg_sq,
         const Flat& master, int threads, bool attempt) -> Answer {
        const Step s{values, {words, rank, prunable}, rows, scalars, grads, master};
        if ((attempt && !s.ordinary(exp_avg, exp_avg_sq, max_exp_avg_sq)) ||
            !s.fit(exp_avg, exp_avg_sq, max_exp_avg_sq) || exp_avg.is_none() ||
            exp_avg_sq.is_none() || (max_exp_avg_sq.is_none() && s.flagged(kAmsgrad)))
          return unfit(attempt);
        s.write_addresses();
        masked_adamw(values.data, values.dtype, s.mask.bits(), s.mask.ranks(), prunable,
                     values.numel, s.segments(), s.count(), scalars.as<double>(),
                     exp_avg.as<float>(), exp_avg_sq.as<float>(), max_exp_avg_sq.as<float>(),
                     master.as<float>(), threads);
        return 0;
      },
      Unlocked());
}

void bind_accumulate(py::module_& m) {
  m.def(
      "weighted_mean",
      [](const Flats& payloads, const std::vector<double>& weights, const Flat& out, int threads,
         bool attempt) -> Answer {
        bool fit = !payloads.empty() && weights.size() == payloads.size() &&
                   out.is_values(payloads[0].numel) &&
                   (!attempt || (ordinary(payloads) && out.ordinary));
        std::vector<const void*> data;
        data.reserve(payloads.size());
        for (const Flat& p : payloads) {
          fit = fit && p.is_values(out.numel) && p.dtype == payloads[0].dtype;
          data.push_back(p.data);
        }
        if (!fit)
          return unfit(attempt);
        return weighted_mean(data, payloads[0].dtype, weights, out.numel, out.data, out.dtype,
                             threads);
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
  torch = new Torch; // for as long as the process lives
  m.def("isa", [] { return isa_name(isa()); });
  m.def("isa_levels", &isa_levels);
  m.def("set_isa", &set_isa);
  m.def("isa_probe", &isa_probe);
  m.def("pool_threads", &pool::workers);
  bind_masks(m);
  bind_select(m);
  bind_pack(m);
  bind_deposit(m);
  bind_steps(m);
  bind_accumulate(m);
  bind_quantize(m);
  bind_entropy(m);
  bind_bytes(m);
}
