#include "accumulate/accumulate.h"

#include "bindings/args.h"

namespace fedmap {
namespace {

Answer mean_checked(const Flats& payloads, const std::vector<double>& weights, const Flat& out,
                    int threads, bool attempt) {
  bool fit = !payloads.empty() && weights.size() == payloads.size() &&
             out.is_values(payloads[0].numel) && (!attempt || (ordinary(payloads) && out.ordinary));
  std::vector<const void*> data;
  data.reserve(payloads.size());
  for (const Flat& p : payloads) {
    fit = fit && p.is_values(out.numel) && p.dtype == payloads[0].dtype;
    data.push_back(p.data);
  }
  if (!fit)
    return unfit(attempt);
  return weighted_mean(data, payloads[0].dtype, weights, out.numel, out.data, out.dtype, threads);
}

const Binding binding([](py::module_& m) {
  m.def("weighted_mean", &mean_checked, Unlocked());
  m.def(
      "accumulate_add",
      [](const Flat& sums, const Flat& payload, double weight, int threads,
         bool attempt) -> Answer {
        if ((attempt && !ordinary(sums, payload)) || !sums.is(kFloat64, sums.numel) ||
            !payload.is_values(sums.numel))
          return unfit(attempt);
        accumulate_add(sums.as<double>(), payload.data, payload.dtype, weight, sums.numel, threads);
        return 0;
      },
      Unlocked());
  m.def(
      "accumulate_add_int8",
      [](const Flat& sums, const Flat& q, const Flat& scales, int64_t block, double weight,
         int threads, bool attempt) -> Answer {
        const int64_t n = sums.numel;
        if ((attempt && !ordinary(sums, q, scales)) || !sums.is(kFloat64, n) || !q.is(kInt8, n) ||
            block <= 0 || block % 64 || !scales.is(kFloat32, (n + block - 1) / block))
          return unfit(attempt);
        accumulate_add_int8(sums.as<double>(), q.as<int8_t>(), scales.as<float>(), block, weight, n,
                            threads);
        return 0;
      },
      Unlocked());
  m.def(
      "accumulate_mean",
      [](const Flat& sums, double total, const Flat& out, int threads, bool attempt) -> Answer {
        if ((attempt && !ordinary(sums, out)) || !sums.is(kFloat64, sums.numel) ||
            !out.is_values(sums.numel))
          return unfit(attempt);
        return accumulate_mean(sums.as<double>(), total, sums.numel, out.data, out.dtype, threads);
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
