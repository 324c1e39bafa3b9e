// The walk that the masked optimizer steps share: the flat buffer in order, the segments in each
// part of it, and the update of their survivors.
//
// Pruned weights are +0.0 before a step, and so they are after it: where few survive, theirs are
// the only values read and written.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/ahead.h"
#include "core/bits.h"
#include "core/dtype.h"
#include "core/half.h"
#include "core/pool.h"
#include "masked_step/segment.h"
#include "pack/pack_block.h"

namespace fedmap {

constexpr int kMaxStates = 3;
using States = std::array<float*, kMaxStates>;

// What an update works on: n survivors side by side. `weights` are float32 (the masters of 16-bit
// values); `out` has the values, receives the new ones, and is `weights` itself for float32.
template <class T>
struct Run {
  int64_t n;
  const T* gradient;
  float* weights;
  T* out;
  States states;
  bool in_place; // gradient and `out` lie in memory, not packed in L1
};

// Asks for what 64 bytes of float32 elements, from element i + ahead / 4 on, need from memory.
template <class T, class Rule>
__attribute__((always_inline)) inline void ask_ahead(int64_t i, const Rule& rule, const Run<T>& run,
                                                     int64_t ahead) {
  for (int k = 0; k < Rule::kStates; ++k)
    if (rule.uses(k))
      fetch_lines(reinterpret_cast<const char*>(run.states[k] + i) + ahead, 64);
  if (run.in_place || !std::is_same_v<T, float>)
    fetch_lines(reinterpret_cast<const char*>(run.weights + i) + ahead, 64);
  if (run.in_place)
    fetch_lines(reinterpret_cast<const char*>(run.gradient + i) + ahead, 64);
}

inline void square_root(float& x) {
  x = std::sqrt(x);
}
#if FEDMAP_X86
FEDMAP_TARGET_AVX2
inline void square_root(__m256& x) {
  x = _mm256_sqrt_ps(x);
}
FEDMAP_TARGET_END
FEDMAP_TARGET_AVX512_CORE
inline void square_root(__m512& x) {
  x = _mm512_sqrt_ps(x);
}
FEDMAP_TARGET_END
#elif FEDMAP_ARM64
inline void square_root(float32x4_t& x) {
  x = vsqrtq_f32(x);
}
#endif

// A Rule holds one segment's hyper-parameters. It is made from (scalars, flags, states),
// `uses(k)` tells whether it reads and writes state k, and `apply(p, g, s)` is its arithmetic, for
// V = float or the vector of a level alike: compilers give vectors the operators of float.
// Everything goes by reference, because a vector argument outside a target region would change the
// ABI.
#define FEDMAP_ARITHMETIC                                                                          \
  template <class V>                                                                               \
  __attribute__((always_inline)) inline void

namespace scalar {

template <class T, class Rule>
void update_from(int64_t i, const Rule rule, const Run<T> run) {
  for (; i < run.n; ++i) {
    float p = run.weights[i], g = widen(run.gradient[i]), s[kMaxStates] = {};
    if constexpr (!std::is_same_v<T, float>)
      if (narrow<T>(p).bits != run.out[i].bits)
        p = widen(run.out[i]);
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

// The masters, or the values where these are not the masters rounded.
template <class T>
inline __m256 unless_written(__m256 masters, const T* values) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  const __m128i same = _mm_cmpeq_epi16(narrow(masters, values), bits);
  return _mm256_blendv_ps(load(values), masters, _mm256_castsi256_ps(_mm256_cvtepi16_epi32(same)));
}

template <bool kAhead, class T, class Rule>
void update_as(const Rule& shared_rule, const Run<T>& shared_run, int64_t ahead) {
  const Rule rule = shared_rule; // copies, which stores cannot alias
  const Run<T> run = shared_run;
  int64_t i = 0;
  for (; i + 8 <= run.n; i += 8) {
    if (kAhead && i % 16 == 0)
      ask_ahead(i, rule, run, ahead);
    __m256 p = load(run.weights + i), g = load(run.gradient + i), s[kMaxStates] = {};
    if constexpr (!std::is_same_v<T, float>)
      p = unless_written(p, run.out + i);
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

template <class T, class Rule>
void update(const Rule& rule, const Run<T>& run) {
  const int64_t ahead = read_ahead();
  ahead ? update_as<true>(rule, run, ahead) : update_as<false>(rule, run, 0);
}

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

// The masters, or the values where these are not the masters rounded.
template <class T>
inline __m512 unless_written(__m512 masters, const T* values, __mmask16 lanes = 0xffff) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, values);
  const __mmask16 other = _mm256_cmpneq_epi16_mask(narrow(masters, values), bits);
  return _mm512_mask_mov_ps(masters, other, widen(bits, values));
}

// `lanes`: none for all 16, or a mask of those to update.
template <class T, class Rule, class... Lanes>
inline void update_16(int64_t i, const Rule& rule, const Run<T>& run, Lanes... lanes) {
  __m512 p = load(run.weights + i, lanes...), g = load(run.gradient + i, lanes...);
  __m512 s[kMaxStates] = {};
  if constexpr (!std::is_same_v<T, float>)
    p = unless_written(p, run.out + i, lanes...);
  for (int k = 0; k < Rule::kStates; ++k)
    if (rule.uses(k))
      s[k] = load(run.states[k] + i, lanes...);
  rule.apply(p, g, s);
  for (int k = 0; k < Rule::kStates; ++k)
    if (rule.uses(k))
      store(run.states[k] + i, s[k], lanes...);
  store(run.weights + i, p, lanes...);
  if constexpr (!std::is_same_v<T, float>)
    store(run.out + i, p, lanes...);
}

template <bool kAhead, class T, class Rule>
void update_as(const Rule& shared_rule, const Run<T>& shared_run, int64_t ahead) {
  const Rule rule = shared_rule;
  const Run<T> run = shared_run;
  int64_t i = 0;
  for (; i + 16 <= run.n; i += 16) {
    if constexpr (kAhead)
      ask_ahead(i, rule, run, ahead);
    update_16(i, rule, run);
  }
  // Packed runs are short: up to 15 survivors one by one would cost as much as all before.
  if (i < run.n)
    update_16(i, rule, run, static_cast<__mmask16>((1u << (run.n - i)) - 1));
}

template <class T, class Rule>
void update(const Rule& rule, const Run<T>& run) {
  const int64_t ahead = read_ahead();
  ahead ? update_as<true>(rule, run, ahead) : update_as<false>(rule, run, 0);
}

} // namespace avx512_core
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
namespace neon {

// The masters, or the values where these are not the masters rounded.
template <class T>
inline float32x4_t unless_written(float32x4_t masters, const T* values) {
  const uint16x4_t same = vceq_u16(narrow(masters, values), vld1_u16(&values->bits));
  const int32x4_t wide = vmovl_s16(vreinterpret_s16_u16(same));
  return vbslq_f32(vreinterpretq_u32_s32(wide), masters, load(values));
}

template <class T, class Rule>
void update(const Rule& shared_rule, const Run<T>& shared_run) {
  const Rule rule = shared_rule; // copies, which stores cannot alias
  const Run<T> run = shared_run;
  int64_t i = 0;
  for (; i + 4 <= run.n; i += 4) {
    float32x4_t p = load(run.weights + i), g = load(run.gradient + i), s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k)
      if (rule.uses(k))
        s[k] = load(run.states[k] + i);
    if constexpr (!std::is_same_v<T, float>)
      p = unless_written(p, run.out + i);
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

} // namespace neon
#endif

// One ISA level's share of a step.
template <class T, class Rule>
struct StepKernels {
  int64_t (*count)(const uint32_t* words, int64_t n);
  int64_t (*next_chunk)(const uint32_t* words, int64_t n);
  int64_t (*find)(const uint32_t* words, int64_t n, uint16_t* places);
  int64_t (*pack)(const T* src, const uint32_t* words, int64_t n, T* out);
  int64_t (*pack_both)(const T* a, const T* b, const uint32_t* words, int64_t n, T* a_out,
                       T* b_out);
  void (*unpack)(const T* packed, const uint32_t* words, int64_t n, T* dst);
  void (*update)(const Rule& rule, const Run<T>& run);

  static StepKernels chosen() {
    return {FEDMAP_DISPATCH(count_block),    FEDMAP_DISPATCH(next_chunk),
            FEDMAP_DISPATCH(find_block),     FEDMAP_DISPATCH(pack_block<T>),
            FEDMAP_DISPATCH(pack_both<T>),   FEDMAP_DISPATCH(unpack_block<T>),
            FEDMAP_DISPATCH(update<T, Rule>)};
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
  MaskedStep(const StepBuffers<T>& buffers, int threads)
      : b_(buffers), k_(StepKernels<T, Rule>::chosen()), blocks_(mask_blocks(b_.prunable)),
        nnz_(b_.rank[blocks_]),
        threads_(threads_for(b_.numel + 16 * (nnz_ + b_.numel - b_.prunable), threads, kGrain)) {}

  void run(const Segment* segments, int64_t nseg, const double* scalars) const {
    const Segment* last = segments + nseg;
    const int64_t blocks = blocks_ + mask_blocks(b_.numel - b_.prunable);
    const int64_t piece = piece_of(blocks, kPieceBlocks, kSpan / kBlock, threads_);
    parallel_ranges(blocks, piece, threads_, [&](int64_t from_block, int64_t to_block) {
      const int64_t begin = begin_of(from_block), end = std::min(begin_of(to_block), b_.numel);
      const Segment* s = std::partition_point(
          segments, last, [&](const Segment& x) { return x.offset + x.numel <= begin; });
      for (; s < last && s->offset < end; ++s)
        if (const double* own = scalars + kScalars * (s - segments); s->gradient && !own[kSkipped])
          step_segment(*s, Rule(own, s->flags, b_.states), std::max(begin, s->offset),
                       std::min(end, s->offset + s->numel));
    });
  }

 private:
  // Parts of kSpan elements are stepped in one of three ways, by the density of each: whole,
  // survivor by survivor, or by chunks, whose values, gradients and packed forms stay in L1 until
  // they are unpacked. 26 M float32 on one thread of Zen 4, density .5: chunks of 512 took 9.8 ms,
  // of 256 11.0, of 2048 13.8; there packing gradients and values in one pass 10.6.
  static constexpr int64_t kPieceBlocks = 128;
  // Bytes for each thread. 270 k float32 at density .1 took 51 us on one thread, 54 on two of which
  // the second was awake, 112 where it had to be woken.
  static constexpr int64_t kGrain = 1 << 20;

  // Where a block of the prunable part, or after those one of the tail, begins.
  int64_t begin_of(int64_t block) const {
    return block < blocks_ ? block * kBlock : b_.prunable + (block - blocks_) * kBlock;
  }

  int64_t state_of(int64_t at) const {
    if (at >= b_.prunable)
      return nnz_ + at - b_.prunable;
    const int64_t block = at / kBlock;
    return b_.rank[block] + k_.count(b_.words + block * kBlockWords, at - block * kBlock);
  }

  // Steps elements [from, to) of the flat buffer, all of segment s.
  void step_segment(const Segment& s, const Rule& rule, int64_t from, int64_t to) const {
    int64_t state = state_of(from);
    for (int64_t at = from, end, next; at < to; at = end, state = next) {
      end = at < b_.prunable ? std::min(to, at / kSpan * kSpan + kSpan) : to;
      next = state_of(end);
      const int64_t n = end - at, count = next - state;
      const T* gradient = reinterpret_cast<const T*>(s.gradient) + (at - s.offset);
      T* values = b_.values + at;
      const uint32_t* words = b_.words + at / 32;
      if (count == n)
        update(rule, gradient, values, state, n, true);
      else if (count * kSparse < n)
        step_sparse(rule, gradient, values, words, n, state);
      else
        for (int64_t i = 0, size; i < n; i += size) {
          size = k_.next_chunk(words + i / 32, n - i);
          state += step_chunk(rule, gradient + i, values + i, words + i / 32, size, state);
        }
    }
  }

  // Pack, update, unpack: a step that expanded, updated and compressed its state in place took
  // twice as long, because every masked store overlaps the next load and stalls forwarding.
  int64_t step_chunk(const Rule& rule, const T* gradient, T* values, const uint32_t* words,
                     int64_t n, int64_t state) const {
    constexpr int64_t kRoom = kChunk + kPackSlack / sizeof(T);
    alignas(64) T packed_gradient[kRoom], packed_values[kRoom];
    const int64_t count = k_.pack_both(gradient, values, words, n, packed_gradient, packed_values);
    update(rule, packed_gradient, packed_values, state, count);
    k_.unpack(packed_values, words, n, values);
    return count;
  }

  void step_sparse(const Rule& rule, const T* gradient, T* values, const uint32_t* words, int64_t n,
                   int64_t state) const {
    constexpr int64_t kRoom = kSpan / kSparse + kPackSlack;
    uint16_t places[kRoom];
    T packed_gradient[kRoom], packed_values[kRoom];
    const int64_t count = k_.find(words, n, places);
    prefetch(gradient, places, count);
    prefetch(values, places, count);
    gather(gradient, places, count, packed_gradient);
    gather(values, places, count, packed_values);
    update(rule, packed_gradient, packed_values, state, count);
    for (int64_t i = 0; i < count; ++i)
      values[places[i]] = packed_values[i];
  }

  // n survivors side by side, in place or packed.
  void update(const Rule& rule, const T* gradient, T* values, int64_t state, int64_t n,
              bool in_place = false) const {
    Run<T> run{n, gradient, nullptr, values, {}, in_place};
    if constexpr (std::is_same_v<T, float>)
      run.weights = values;
    else
      run.weights = b_.master + state;
    for (int k = 0; k < Rule::kStates; ++k)
      if (rule.uses(k))
        run.states[k] = b_.states[k] + state;
    k_.update(rule, run);
  }

  const StepBuffers<T> b_;
  const StepKernels<T, Rule> k_;
  const int64_t blocks_, nnz_; // of the prunable part
  const int threads_;
};

template <class T, class Rule>
void masked_step(void* values, const uint32_t* words, const int64_t* rank, int64_t prunable,
                 int64_t numel, const Segment* segments, int64_t nseg, const double* scalars,
                 const States& states, float* master, int threads) {
  MaskedStep<T, Rule>({static_cast<T*>(values), words, rank, prunable, numel, states, master},
                      threads)
      .run(segments, nseg, scalars);
}

} // namespace fedmap
