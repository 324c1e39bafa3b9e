#include "bindings/step.h"

namespace fedmap {
namespace {

Answer sgd_checked(const Flat& values, const Flat& words, const Flat& rank, int64_t prunable,
                   int64_t nnz, const std::optional<Flats>& grads, const Flat& rows,
                   const Flat& scalars, const Flat& momentum, const Flat& master, int threads,
                   bool attempt) {
  const Step s{values, {words, rank, prunable}, nnz, rows, scalars, grads, master};
  if ((attempt && !s.ordinary(momentum)) || !s.fit(momentum))
    return unfit(attempt);
  s.write_addresses();
  masked_sgd(values.data, values.dtype, s.mask.bits(), s.mask.ranks(), prunable, values.numel,
             s.segments(), s.count(), scalars.as<double>(), momentum.as<float>(),
             master.as<float>(), threads);
  return 0;
}

Answer adamw_checked(const Flat& values, const Flat& words, const Flat& rank, int64_t prunable,
                     int64_t nnz, const std::optional<Flats>& grads, const Flat& rows,
                     const Flat& scalars, const Flat& exp_avg, const Flat& exp_avg_sq,
                     const Flat& max_exp_avg_sq, const Flat& master, int threads, bool attempt) {
  const Step s{values, {words, rank, prunable}, nnz, rows, scalars, grads, master};
  if ((attempt && !s.ordinary(exp_avg, exp_avg_sq, max_exp_avg_sq)) ||
      !s.fit(exp_avg, exp_avg_sq, max_exp_avg_sq) || exp_avg.is_none() || exp_avg_sq.is_none() ||
      (max_exp_avg_sq.is_none() && s.flagged(kAmsgrad)))
    return unfit(attempt);
  s.write_addresses();
  masked_adamw(values.data, values.dtype, s.mask.bits(), s.mask.ranks(), prunable, values.numel,
               s.segments(), s.count(), scalars.as<double>(), exp_avg.as<float>(),
               exp_avg_sq.as<float>(), max_exp_avg_sq.as<float>(), master.as<float>(), threads);
  return 0;
}

bool unseen_checked(const Flat& values, const Flat& words, const Flat& rank, int64_t prunable,
                    const Flat& rows, int64_t turn, int threads) {
  const Bits mask{words, rank, prunable};
  const int64_t count = rows.numel / 4;
  const Segment* segments = rows.as<Segment>();
  bool fit = mask.fit() && values.is_values(values.numel) && prunable <= values.numel &&
             rows.is(kInt64, 4 * count);
  for (int64_t i = 0; fit && i < count && segments[i].offset < prunable; ++i)
    fit = segments[i].offset >= 0 && segments[i].offset % 32 == 0 && segments[i].numel >= 0 &&
          segments[i].offset + segments[i].numel <= prunable;
  require(fit);
  return written_unseen(values.data, values.dtype, mask.bits(), mask.ranks(), prunable, segments,
                        count, turn, threads);
}

const Binding binding([](py::module_& m) {
  m.def("same_tree", &same_tree);
  m.def("read_gradients", &read_gradients);
  m.def("written_unseen", &unseen_checked, Unlocked());
  m.def("masked_sgd", &sgd_checked, Unlocked());
  m.def("masked_adamw", &adamw_checked, Unlocked());
});

} // namespace
} // namespace fedmap
