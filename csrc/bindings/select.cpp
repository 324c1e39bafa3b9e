#include "select/select.h"

#include "bindings/args.h"

namespace fedmap {
namespace {

// Without `words` only the threshold is wanted.
Answer select_checked(const Flats& values, const Flats& within, int64_t eligible, int64_t keep,
                      const Flats& words, const Flats& ranks, int threads, bool attempt) {
  bool fit = !values.empty() && within.size() == values.size() && 0 < keep && keep <= eligible &&
             ranks.size() == words.size() && (words.empty() || words.size() == values.size());
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
}

const Binding binding([](py::module_& m) {
  m.def("select", &select_checked, Unlocked());
  m.def("select_reads", &select_reads);
  m.def(
      "zero_pruned",
      [](const Flat& values, const Flat& before, const Flat& after, int threads,
         bool attempt) -> Answer {
        const int64_t words = mask_words(values.numel);
        if ((attempt && !ordinary(values, before, after)) || !values.is_values(values.numel) ||
            !(before.is_none() || before.is(kInt32, words)) || !after.is(kInt32, words))
          return unfit(attempt);
        zero_pruned(values.data, before.as<uint32_t>(), after.as<uint32_t>(), values.numel,
                    values.dtype, threads);
        return 0;
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
