// Selection by magnitude. Contract: fedmap_sparse/ops/select.py.
#pragma once

#include <cstdint>
#include <vector>

namespace fedmap {

struct SelectInput {
  const void* values;
  int64_t numel;
  const uint32_t* within; // null: every element
  uint32_t* words;
  int64_t* rank; // null: only the threshold is wanted
};
uint32_t select(const std::vector<SelectInput>& inputs, int dtype, int64_t eligible, int64_t keep,
                int threads);
// How often the calling thread's last selection read its values: 1 usually, 4 at most. (Where the
// input fits L1, what it reads there is not counted.)
int select_reads();

// Writes zeros where `before` (null: everywhere) kept an element and `after` does not.
void zero_pruned(void* values, const uint32_t* before, const uint32_t* after, int64_t numel,
                 int dtype, int threads);

} // namespace fedmap
