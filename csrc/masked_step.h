// The walk that the masked optimizer steps share: over blocks of the flat buffer in order, the
// segments in each, and for each such run pack, update and unpack in L1.
//
// A step expanding and compressing its state in place took twice as long: every masked store
// overlaps the next load and stalls forwarding.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "compress.h"
#include "half.h"
#include "kernels.h"
#include "pool.h"

namespace fedmap {

constexpr int kMaxStates = 3;
using States = std::array<float*, kMaxStates>;

// What an update works on: n survivors side by side. `weights` are float32 (the masters of 16-bit
// values); `out` receives them in the values' dtype and is `weights` itself for float32.
template <class T>
struct Run {
  int64_t n;
  const T* gradient;
  float* weights;
  T* out;
  States states;
};

inline void square_root(float& x) { x = std::sqrt(x); }
#if FEDMAP_X86
FEDMAP_TARGET_AVX2
inline void square_root(__m256& x) { x = _mm256_sqrt_ps(x); }
FEDMAP_TARGET_END
FEDMAP_TARGET_AVX512
inline void square_root(__m512& x) { x = _mm512_sqrt_ps(x); }
FEDMAP_TARGET_END
#endif

// A Rule holds one segment's hyper-parameters. It is made from (scalars, flags, states),
// `uses(k)` tells whether it reads and writes state k, and `apply(p, g, s)` is its arithmetic, for
// V = float, __m256 or __m512 alike: compilers give vectors the operators of float. Everything
// goes by reference, because a vector argument outside a target region would change the ABI.
#define FEDMAP_ARITHMETIC                                                                          \
  template <class V>                                                                               \
  __attribute__((always_inline)) inline void

namespace scalar {

template <class T, class Rule>
void update_from(int64_t i, const Rule rule, const Run<T> run) {
  for (; i < run.n; ++i) {
    float p = run.weights[i], g = widen(run.gradient[i]), s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k)
      if (rule.uses(k))
        s[k] = run.states[k][i];
    rule.apply(p, g, s);
    for (int k = 0; k < Rule::kStates; ++k)
      if (rule.uses(k))
        run.states[k][i] = s[k];
    run.weights[i] = p;
    if constexpr (!std::is_same_v<T, float>)
      run.out[i] = narrow<T>(p);
  }
}

template <class T, class Rule>
void update(const Rule& rule, const Run<T>& run) {
  update_from(0, rule, run);
}

} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

template <class T, class Rule>
void update(const Rule& shared_rule, const Run<T>& shared_run) {
  const Rule rule = shared_rule; // copies, which stores cannot alias
  const Run<T> run = shared_run;
  int64_t i = 0;
  for (; i + 8 <= run.n; i += 8) {
    __m256 p = load(run.weights + i), g = load(run.gradient + i), s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k)
      if (rule.uses(k))
        s[k] = load(run.states[k] + i);
    rule.apply(p, g, s);
    for (int k = 0; k < Rule::kStates; ++k)
      if (rule.uses(k))
        store(run.states[k] + i, s[k]);
    store(run.weights + i, p);
    if constexpr (!std::is_same_v<T, float>)
      store(run.out + i, p);
  }
  scalar::update_from(i, rule, run);
}

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512
namespace avx512 {

template <class T, class Rule>
void update(const Rule& shared_rule, const Run<T>& shared_run) {
  const Rule rule = shared_rule; // copies, which stores cannot alias
  const Run<T> run = shared_run;
  int64_t i = 0;
  for (; i + 16 <= run.n; i += 16) {
    __m512 p = load(run.weights + i), g = load(run.gradient + i), s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k)
      if (rule.uses(k))
        s[k] = load(run.states[k] + i);
    rule.apply(p, g, s);
    for (int k = 0; k < Rule::kStates; ++k)
      if (rule.uses(k))
        store(run.states[k] + i, s[k]);
    store(run.weights + i, p);
    if constexpr (!std::is_same_v<T, float>)
      store(run.out + i, p);
  }
  scalar::update_from(i, rule, run);
}

} // namespace avx512
FEDMAP_TARGET_END
#endif

// One ISA level's share of a step.
template <class T, class Rule>
struct StepKernels {
  int64_t (*count)(const uint32_t* words, int64_t n);
  T* (*pack)(const T* src, const uint32_t* words, int64_t n, T* out);
  void (*unpack)(const T* packed, const uint32_t* words, int64_t n, T* dst);
  void (*update)(const Rule& rule, const Run<T>& run);

  static StepKernels chosen() {
    return {FEDMAP_DISPATCH(count_block), FEDMAP_DISPATCH(pack_block<T>),
            FEDMAP_DISPATCH(unpack_block<T>), FEDMAP_DISPATCH(update<T, Rule>)};
  }
};

template <class T>
struct StepBuffers {
  T* values;
  const uint32_t* words;
  const int64_t* rank;
  int64_t prunable, numel;
  States states; // packed: the survivors by rank, then the tail
  float* master; // packed likewise; null for float32 values
};

template <class T, class Rule>
class MaskedStep {
public:
  MaskedStep(const StepBuffers<T>& buffers, const StepKernels<T, Rule>& kernels)
      : b_(buffers), k_(kernels), nnz_(buffers.rank[mask_blocks(buffers.prunable)]) {}

  void run(const Segment* segments, int64_t nseg, const double* scalars, int threads) const {
    const int64_t blocks = mask_blocks(b_.prunable);
    const int64_t all = blocks + mask_blocks(b_.numel - b_.prunable);
    parallel_ranges(all, kTaskBlocks, threads_for(b_.numel, threads), [&](int64_t b, int64_t end) {
      const int64_t first = b < blocks ? b * kBlock : b_.prunable + (b - blocks) * kBlock;
      const Segment* s = std::partition_point(segments, segments + nseg, [&](const Segment& x) {
        return x.offset + x.numel <= first;
      });
      for (; b < end; ++b) {
        const bool tail = b >= blocks;
        const int64_t begin = tail ? b_.prunable + (b - blocks) * kBlock : b * kBlock;
        const int64_t stop = std::min(begin + kBlock, tail ? b_.numel : b_.prunable);
        int64_t at = begin, state = tail ? nnz_ + begin - b_.prunable : b_.rank[b];
        for (; s < segments + nseg && s->offset < stop; ++s) {
          const int64_t from = std::max(begin, s->offset);
          const int64_t to = std::min(stop, s->offset + s->numel);
          state += survivors(at, from);
          const int64_t count = survivors(from, to);
          if (s->gradient && count)
            step(Rule(scalars + kScalars * (s - segments), s->flags, b_.states),
                 gradient(*s, from), from, to - from, state, count);
          state += count;
          at = to;
          if (s->offset + s->numel > stop)
            break;
        }
      }
    });
  }

private:
  static constexpr int64_t kTaskBlocks = 16;

  // `from` may lie inside a word only where padding begins.
  int64_t survivors(int64_t from, int64_t to) const {
    if (from >= b_.prunable)
      return to - from;
    const int64_t word = (from + 31) / 32;
    return k_.count(b_.words + word, to - 32 * word);
  }

  static const T* gradient(const Segment& s, int64_t at) {
    return reinterpret_cast<const T*>(s.gradient) + (at - s.offset);
  }

  void step(const Rule& rule, const T* gradient, int64_t at, int64_t n, int64_t state,
            int64_t count) const {
    Run<T> run{count, gradient, nullptr, b_.values + at, {}};
    for (int k = 0; k < Rule::kStates; ++k)
      if (rule.uses(k))
        run.states[k] = b_.states[k] + state;
    run.weights = b_.master ? b_.master + state : reinterpret_cast<float*>(run.out);
    if (count == n)
      return k_.update(rule, run);

    constexpr int64_t kRoom = kBlock + kPackSlack / sizeof(T);
    alignas(64) T packed_gradient[kRoom], packed_values[kRoom];
    const uint32_t* words = b_.words + at / 32;
    k_.pack(gradient, words, n, packed_gradient);
    run.gradient = packed_gradient;
    run.out = packed_values;
    if constexpr (std::is_same_v<T, float>) {
      k_.pack(b_.values + at, words, n, packed_values);
      run.weights = packed_values;
    }
    k_.update(rule, run);
    k_.unpack(packed_values, words, n, b_.values + at);
  }

  const StepBuffers<T> b_;
  const StepKernels<T, Rule> k_;
  const int64_t nnz_;
};

template <class T, class Rule>
void masked_step(void* values, const uint32_t* words, const int64_t* rank, int64_t prunable,
                 int64_t numel, const Segment* segments, int64_t nseg, const double* scalars,
                 const States& states, float* master, int threads) {
  const StepBuffers<T> buffers{static_cast<T*>(values), words, rank, prunable, numel, states,
                               master};
  MaskedStep<T, Rule>(buffers, StepKernels<T, Rule>::chosen())
      .run(segments, nseg, scalars, threads);
}

} // namespace fedmap
