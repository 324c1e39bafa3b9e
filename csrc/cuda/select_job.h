// What a selection is told and shares, and sums over a warp, a block and the grid.

#pragma once

#ifdef __CUDACC__
#define GRID_CONSTANT __grid_constant__
#define LAUNCHED __launch_bounds__(THREADS, 1)
#define SHARED(type, name) __shared__ type name
#define LOAD_ONCE __ldg // what no one writes
#define LOAD_L2 __ldcg  // what another block may have written
#define PREFETCH(place) asm volatile("prefetch.global.L2 [%0];" ::"l"(place))
#define GRID_WAIT()
#endif
#ifndef THREADS
#define THREADS 1024
#endif

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;

namespace {

constexpr u32 kFull = 0xffffffffu;
constexpr int kWarps = THREADS / 32;
constexpr int kBins = 2048;                      // of a histogram: 11 bits per level
constexpr int kSampleBins = 8192;                // the highest 13 bits of a key
constexpr int kNear = (kSampleBins - kBins) / 2; // of a block's list, which shares the memory
constexpr u32 kRuns = 2048; // of the sample, of eight elements each: a sector of float32
constexpr int kParts = 48;  // tensors of one launch, whose table is an argument of it
constexpr u32 kShare = 128; // candidates that a block has room for: a sixteenth of it
constexpr int kLevels = 4;  // histograms: one of the read, three if the bracket missed
// In place of where a unit's candidates begin.
constexpr u32 kReread = 0xffffffffu, kUniform = 0xfffffffeu;
constexpr u32 kNowhere = 0xffffffffu;
// Standard deviations of the sampled rank to either side: a miss in 16 000 on unordered data.
constexpr float kWidth = 4.0f;
// A unit with more candidates than this may hold one key over and over.
constexpr u32 kCrowd = 256;
// With fewer eligible elements in a unit, only these are loaded.
constexpr u32 kSparse = 64;

struct Part {
  const void* values;
  const u32* within;
  u32* words;
  i64* rank;
  i64 n;
  i64 first; // its first block among those of all parts
};

// A block has 2048 elements, a unit 1024.
struct Unit {
  u32 begin; // of its candidates among those of the stretch
  u32 count; // of its candidates
  u32 key;   // of all of them, if it is uniform
};

struct Job {
  Part part[kParts];
  i64 parts, blocks; // blocks: of all parts
  u64 keep, eligible;
  u32* state; // zero before: the barrier, 0, keys over the bracket (u64), kLevels histograms
  // Of any content.
  void* pool;  // the candidates' keys, kShare for each block
  u32* places; // and where they are in the stretch
  u32* marks;  // candidates of uniform units, as words
  Unit* units;
  u64* counts;      // of each block: over the key (<< 32) and ties; null: only the key is wanted
  u64* ties_before; // of each block
  u64* totals;      // counts of each stretch
  u64* bases;       // survivors before each part
  u32* key;         // out
};

struct Shared {
  u32 bins[kSampleBins];
  u32 spots[kRuns]; // of the sample, in octets of a part
  unsigned char owner[kRuns];
  u64 scan[kWarps];
  u64 total, wanted;
  i64 torn; // the block some of whose ties are kept
  u32 low, high, used, filled, special, near;
};

// What a block of the grid goes by.
struct Stretch {
  i64 first, last;        // of its blocks
  u32 low, shift;         // the wanted key lies in [low, low + 2^shift)
  u32 top;                // of the bracket, beyond which its last bin may reach
  u32 near_low, near_top; // of the first bin that was found
  bool missed;            // the bracket
};

__device__ u32 lane_id() {
  return threadIdx.x & 31;
}
__device__ u64 least(u64 a, u64 b) {
  return a < b ? a : b;
}

template <class T>
__device__ T warp_sum(T x) {
  for (int d = 16; d; d >>= 1)
    x += __shfl_xor_sync(kFull, x, d);
  return x;
}

__device__ u32 warp_min(u32 x) {
  for (int d = 16; d; d >>= 1) {
    u32 other = __shfl_xor_sync(kFull, x, d);
    x = other < x ? other : x;
  }
  return x;
}

__device__ u32 warp_max(u32 x) {
  return ~warp_min(~x);
}

template <class T>
__device__ T warp_before(T x) { // the sum over the lanes below
  T all = x;
  for (int d = 1; d < 32; d <<= 1) {
    T other = __shfl_up_sync(kFull, all, d);
    if (lane_id() >= (u32)d)
      all += other;
  }
  return all - x;
}

// The sum over the threads below; `s.total` is that over all of them. A barrier has to follow
// before the next one.
__device__ u64 block_before(Shared& s, u64 x) {
  u64 before = warp_before(x);
  if (lane_id() == 31)
    s.scan[threadIdx.x >> 5] = before + x;
  __syncthreads();
  if (threadIdx.x < 32) {
    u64 mine = lane_id() < (u32)kWarps ? s.scan[lane_id()] : 0;
    u64 earlier = warp_before(mine);
    if (lane_id() < (u32)kWarps)
      s.scan[lane_id()] = earlier;
    if (lane_id() == 31)
      s.total = earlier + mine;
  }
  __syncthreads();
  return before + s.scan[threadIdx.x >> 5];
}

__device__ u64 block_sum(Shared& s, u64 x) {
  block_before(s, x);
  u64 total = s.total;
  __syncthreads();
  return total;
}

// Every block of the grid waits here for the others: all are resident in a cooperative launch.
__device__ void grid_sync(u32* arrived, u32 times) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (*(volatile u32*)arrived < gridDim.x * times)
      GRID_WAIT();
    __threadfence();
  }
  __syncthreads();
}

__device__ int part_of(const Job& job, i64 block) {
  int low = 0, high = (int)job.parts;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (job.part[middle].first <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

} // namespace
