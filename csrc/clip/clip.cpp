// Cuts the difference of two vectors to a norm. Contract: fedmap_sparse/ops/clip.py.
#include "clip/clip.h"

#include <cmath>
#include <vector>

#include "core/cpu.h"
#include "core/pool.h"

namespace fedmap {

constexpr int64_t kClipLanes = 256, kClipBlock = 4096;

namespace scalar {
#include "clip/clip_body.h"
} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {
#include "clip/clip_body.h"
} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {
#include "clip/clip_body.h"
} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {
#include "clip/clip_body.h"
} // namespace neon
#endif

double clip_difference(float* values, const float* start, int64_t n, double max_norm, int threads) {
  const auto squares = FEDMAP_DISPATCH(squares);
  const auto shorten = FEDMAP_DISPATCH(shorten);
  const int used = threads_for(n * 8, threads);
  const int64_t piece = piece_of(n, 1 << 18, kClipBlock, used);
  std::vector<double> blocks(static_cast<size_t>((n + kClipBlock - 1) / kClipBlock));
  parallel_ranges(n, piece, used, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += kClipBlock)
      blocks[static_cast<size_t>(begin / kClipBlock)] =
          squares(values + begin, start + begin, std::min(kClipBlock, end - begin));
  });
  double lanes[kClipLanes] = {};
  for (size_t i = 0; i < blocks.size(); ++i)
    lanes[i % kClipLanes] += blocks[i];
  const double norm = std::sqrt(scalar::sum_of_halves(lanes));
  if (max_norm < norm && std::isfinite(norm)) {
    const double factor = max_norm / norm;
    parallel_ranges(n, piece, used, [&](int64_t begin, int64_t end) {
      shorten(values + begin, start + begin, factor, end - begin);
    });
  }
  return norm;
}

} // namespace fedmap
