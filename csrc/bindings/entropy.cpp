#include "entropy/entropy.h"

#include "bindings/args.h"

namespace fedmap {
namespace {

// None, or (reason, offset).
py::object fault_or_none(const Fault& fault) {
  if (!fault.reason)
    return py::none();
  return py::make_tuple(fault.reason, fault.offset);
}

MaskRuns runs_of(const Flat& starts, const Flat& numels, int64_t words) {
  require(starts.dtype == kInt64 && numels.is(kInt64, starts.numel));
  const MaskRuns runs{starts.as<int64_t>(), numels.as<int64_t>(), starts.numel};
  for (int64_t r = 0; r < runs.count; ++r)
    require(runs.start[r] >= 0 && runs.numel[r] >= 0 &&
            runs.start[r] <= 32 * words - runs.numel[r]);
  return runs;
}

const Binding binding([](py::module_& m) {
  m.def(
      "encode_mask",
      [](const Flat& words, const Flat& starts, const Flat& numels, const Flat& codes,
         int64_t chunk_steps, const Flat& out, int threads) {
        require(words.dtype == kInt32 && codes.is(kUint8, starts.numel) && chunk_steps > 0 &&
                out.dtype == kUint8);
        return encode_mask(words.as<uint32_t>(), runs_of(starts, numels, words.numel),
                           codes.as<uint8_t>(), chunk_steps, out.as<uint8_t>(), out.numel, threads);
      },
      Unlocked());
  m.def("decode_mask", [](const Flat& payload, const Flat& starts, const Flat& numels,
                          int64_t numel, const Flat& words, int threads) {
    require(payload.dtype == kUint8 && numel >= 0 && words.is(kInt32, mask_words(numel)));
    const MaskRuns runs = runs_of(starts, numels, words.numel);
    Fault fault;
    {
      Unlock unlocked;
      fault = decode_mask(payload.as<uint8_t>(), payload.numel, runs, numel, words.as<uint32_t>(),
                          threads);
    }
    return fault_or_none(fault);
  });
  m.def(
      "encode_values",
      [](const Flat& values, const Flat& out, int threads) {
        require(values.is_values(values.numel) && out.dtype == kUint8);
        return encode_values(values.data, values.dtype, values.numel, out.as<uint8_t>(), out.numel,
                             threads);
      },
      Unlocked());
  m.def("decode_values", [](const Flat& payload, const Flat& out, int threads) {
    require(payload.dtype == kUint8 && out.is_values(out.numel));
    Fault fault;
    {
      Unlock unlocked;
      fault = decode_values(payload.as<uint8_t>(), payload.numel, out.dtype, out.numel, out.data,
                            threads);
    }
    return fault_or_none(fault);
  });
  m.def("check_values", [](const Flat& payload, int dtype, int64_t numel, int threads) {
    require(payload.dtype == kUint8 && numel >= 0);
    Fault fault;
    bool finite = false;
    {
      Unlock unlocked;
      fault = check_values(payload.as<uint8_t>(), payload.numel, dtype, numel, &finite, threads);
    }
    return py::make_tuple(fault_or_none(fault), finite);
  });
  m.def("add_values",
        [](const Flat& payload, int dtype, const Flat& sums, double weight, int threads) {
          require(payload.dtype == kUint8 && sums.dtype == kFloat64);
          Fault fault;
          {
            Unlock unlocked;
            fault = add_values(payload.as<uint8_t>(), payload.numel, dtype, sums.numel,
                               sums.as<double>(), weight, threads);
          }
          return fault_or_none(fault);
        });
});

} // namespace
} // namespace fedmap
