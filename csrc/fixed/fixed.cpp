// Fixed-point integers. Contract: fedmap_sparse/ops/fixed.py.
#include "fixed/fixed.h"

#include <atomic>

#include "core/cpu.h"
#include "core/pool.h"

namespace fedmap {

namespace scalar {
#include "fixed/fixed_body.h"
} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {
#include "fixed/fixed_body.h"
} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {
#include "fixed/fixed_body.h"
} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {
#include "fixed/fixed_body.h"
} // namespace neon
#endif

namespace {

template <class F>
void for_pieces(int64_t n, int threads, F&& f) {
  const int used = threads_for(n * 8, threads);
  parallel_ranges(n, piece_of(n, 1 << 18, 64, used), used, f);
}

} // namespace

int64_t to_fixed(const float* values, int64_t n, double clip, double scale, int32_t weight,
                 int32_t* out, int threads) {
  const auto convert = FEDMAP_DISPATCH(to_fixed);
  std::atomic<int64_t> beyond{0};
  for_pieces(n, threads, [&](int64_t begin, int64_t end) {
    beyond += convert(values + begin, end - begin, clip, scale, weight, out + begin);
  });
  return beyond;
}

void from_fixed(const int32_t* sums, int64_t n, double divisor, float* out, int threads) {
  const auto convert = FEDMAP_DISPATCH(from_fixed);
  for_pieces(n, threads, [&](int64_t begin, int64_t end) {
    convert(sums + begin, end - begin, divisor, out + begin);
  });
}

} // namespace fedmap
