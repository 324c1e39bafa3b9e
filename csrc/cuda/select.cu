// Top-k by magnitude in one cooperative launch: values are read once on the usual path.
//
// Every block takes the same sample, brackets the key of the wanted rank with it, and reads its own
// stretch of the values: it writes the bits above the bracket, collects the candidates within it
// and counts them in a radix histogram. Behind a barrier of the grid every block finds the bin of
// the wanted key; the candidates in it are counted again in finer bins, until the key is known.
// Counts of each block then place the survivors and the ties, never the order of atomics.
//
// A unit of 1024 values whose candidates are one key over and over, as ties are, keeps them as
// bits. Where the bracket missed, or a stretch has too many candidates, values are read again.
//
// NVRTC compiles this at first use (fedmap_sparse/cuda_kernels): nothing is included. The tests
// compile it as C++ too, a block's threads as fibers (tests/native/cuda/on_cpu.h).

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

template <class Bits>
struct Keys {
  static constexpr int kBits = 8 * sizeof(Bits) - 1;
  static constexpr u32 kMask = (1u << kBits) - 1;
  static __device__ u32 raw(const void* values, i64 i) {
    return LOAD_ONCE((const Bits*)values + i);
  }
  static __device__ u32 at(const void* values, i64 i) { return raw(values, i) & kMask; }
};

// Whether the bits of a value are above a key, or no less than it.
template <class Bits>
struct Edge {
  u32 key;
  __device__ explicit Edge(u32 k) : key(k) {}
  __device__ bool below(u32 bits) const { return (bits & Keys<Bits>::kMask) > key; }
  __device__ bool reached(u32 bits) const { return (bits & Keys<Bits>::kMask) >= key; }
};

// By floats, whose absolute value costs no instruction. Above infinity, the highest key of a
// bracket of theirs, is NaN.
template <>
struct Edge<u32> {
  float key;
  __device__ explicit Edge(u32 k) : key(__uint_as_float(k)) {}
  __device__ bool below(u32 bits) const { return !(fabsf(__uint_as_float(bits)) <= key); }
  __device__ bool reached(u32 bits) const { return fabsf(__uint_as_float(bits)) >= key; }
};
constexpr u32 kInfinity = 0x7f800000u;

// Bit j of lane l becomes bit l of lane j.
__device__ u32 transpose(u32 x) {
  u32 m = 0x0000ffffu;
#pragma unroll
  for (int k = 16; k; k >>= 1, m ^= m << k) {
    u32 y = __shfl_xor_sync(kFull, x, k);
    x = lane_id() & k ? (x & ~m) | ((y >> k) & m) : (x & m) | ((y << k) & ~m);
  }
  return x;
}

// The eligible elements of a unit: bit i of lane l stands for element 32 l + i.
__device__ u32 held_in(const Part& p, i64 base) {
  i64 word = base / 32 + lane_id(), rest = p.n - word * 32;
  if (rest <= 0)
    return 0;
  u32 inside = rest >= 32 ? kFull : (1u << rest) - 1;
  return p.within ? LOAD_ONCE(p.within + word) & inside : inside;
}

// A unit's values, of lane l those of elements 32 j + l; where `live` has no bit j it may be any.
template <class Bits>
__device__ void load_unit(const Part& p, i64 base, u32 live, bool all, u32 (&bits)[32]) {
  i64 at = base + lane_id();
  if (all) {
#pragma unroll
    for (int j = 0; j < 32; j++)
      bits[j] = Keys<Bits>::raw(p.values, at + j * 32);
  } else {
#pragma unroll
    for (int j = 0; j < 32; j++)
      bits[j] = (live >> j) & 1 ? Keys<Bits>::raw(p.values, at + j * 32) : 0;
  }
}

// Has the values of a unit on their way to the L2 cache: a line of 128 bytes each lane.
template <class Bits>
__device__ void fetch_ahead(const Job& job, i64 unit) {
  const Part& p = job.part[part_of(job, unit / 2)];
  i64 at = (unit - p.first * 2) * 1024 + lane_id() * (128 / (i64)sizeof(Bits));
  if (lane_id() < 8 * sizeof(Bits) && at < p.n)
    PREFETCH((const Bits*)p.values + at);
}

// The keys of a unit that `live` has, of lane l those of elements 32 j + l: `see(j, key, live)`.
template <class Bits, class See>
__device__ void each_key(const Part& p, i64 base, u32 live, See see) {
  constexpr int kAtOnce = 8; // loads on their way
#pragma unroll 1
  for (int first = 0; first < 32; first += kAtOnce) {
    u32 key[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      bool on = (live >> (first + j)) & 1;
      key[j] = on ? Keys<Bits>::at(p.values, base + (first + j) * 32 + lane_id()) : 0;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; j++)
      see(first + j, key[j], (live >> (first + j)) & 1);
  }
}

// Adds to a histogram what shares the first lane's bin at once, as ties do.
__device__ void count_in(u32* bins, u32 bin, bool on) {
  u32 active = __ballot_sync(kFull, on);
  if (!active)
    return;
  u32 leader = __ffs(active) - 1;
  u32 common = __shfl_sync(kFull, bin, leader);
  u32 same = __ballot_sync(kFull, on && bin == common);
  if (lane_id() == leader)
    atomicAdd(bins + common, (u32)__popc(same));
  else if (on && bin != common)
    atomicAdd(bins + bin, 1u);
}

// The bracket [low, top], and the shift that fits it into one histogram.
template <class Bits>
__device__ void bracket(const Job& job, Shared& s, u32& low, u32& top, u32& shift) {
  constexpr int kDown = Keys<Bits>::kBits - 13, kEach = kSampleBins / THREADS;
  constexpr int kMine = kRuns * 8 / THREADS;
  for (int i = threadIdx.x; i < kSampleBins; i += THREADS)
    s.bins[i] = 0;
  u64 octets = (u64)job.blocks * 256;
  for (u32 run = threadIdx.x; run < kRuns; run += THREADS) {
    u64 begin = octets < kRuns ? run : run * octets / kRuns;
    u64 room = octets < kRuns ? run < octets : (run + 1) * octets / kRuns - begin;
    // One at a pseudo-random place of each stretch.
    i64 octet = (i64)(begin + ((u64)(run * 0x9E3779B1u) * room >> 32));
    int at = part_of(job, octet / 256);
    s.owner[run] = (unsigned char)at;
    s.spots[run] = room ? (u32)(octet - job.part[at].first * 256) : kNowhere;
  }
  __syncthreads();
  u32 key[kMine], held[kMine];
  // All loads of a kind are on their way before the first is used.
#pragma unroll
  for (int j = 0; j < kMine; j++) {
    u32 i = threadIdx.x + j * THREADS, octet = s.spots[i >> 3];
    const Part& p = job.part[s.owner[i >> 3]];
    i64 at = (i64)octet * 8 + (i & 7);
    bool inside = octet != kNowhere && at < p.n;
    held[j] = inside && p.within ? LOAD_ONCE(p.within + (at >> 5)) : inside ? kFull : 0;
  }
#pragma unroll
  for (int j = 0; j < kMine; j++) {
    u32 i = threadIdx.x + j * THREADS, octet = s.spots[i >> 3];
    i64 at = (i64)octet * 8 + (i & 7);
    bool live = (held[j] >> (at & 31)) & 1;
    key[j] = live ? Keys<Bits>::at(job.part[s.owner[i >> 3]].values, at) : kNowhere;
  }
  for (int j = 0; j < kMine; j++)
    if (key[j] != kNowhere)
      atomicAdd(s.bins + (key[j] >> kDown), 1u);
  __syncthreads();
  // From the highest down, so that a sum over what is before counts what is above.
  u32 mine[kEach], sum = 0;
  int from = kSampleBins - 1 - (int)threadIdx.x * kEach;
  for (int k = 0; k < kEach; k++)
    sum += mine[k] = s.bins[from - k];
  u64 above = block_before(s, sum);
  if (threadIdx.x == 0)
    s.low = 0, s.high = kSampleBins;
  float share = (float)job.keep / (float)job.eligible, middle = share * (float)s.total;
  float spread = kWidth * sqrtf(middle * (1.0f - share)) + 1.0f;
  __syncthreads();
  for (int k = 0; k < kEach; k++) {
    above += mine[k];
    if ((float)above >= middle + spread)
      atomicMax(&s.low, (u32)(from - k));
    if ((float)above <= middle - spread)
      atomicMin(&s.high, (u32)(from - k));
  }
  __syncthreads();
  u32 first = s.low, last = s.high > first ? s.high : first + 1;
  low = first << kDown;
  top = (last << kDown) - 1;
  if (sizeof(Bits) == 4) {
    // NaN of float32 is left to what is done when a bracket misses.
    low = (u32)least(low, kInfinity);
    top = (u32)least(top, kInfinity);
  }
  shift = 0;
  while ((top - low) >> shift >= (u32)kBins)
    shift++;
  __syncthreads();
}

template <class Bits>
__device__ void read(const Job& job, Shared& s, const Stretch& at) {
  Bits* pool = (Bits*)job.pool + at.first * kShare;
  u32* places = job.places + at.first * kShare;
  u32 room = (u32)((at.last - at.first) * kShare), lane = lane_id(), low = at.low;
  Edge<Bits> above(at.top), within(at.low);
  u64 over_all = 0;
  for (int i = threadIdx.x; i < kBins; i += THREADS)
    s.bins[i] = 0;
  if (threadIdx.x == 0)
    s.used = 0, s.filled = room, s.special = 0;
  __syncthreads();
  for (i64 unit = at.first * 2 + (threadIdx.x >> 5); unit < at.last * 2; unit += kWarps) {
    const Part& p = job.part[part_of(job, unit / 2)];
    i64 base = (unit - p.first * 2) * 1024;
    bool whole = base + 1024 <= p.n, plain = whole && !p.within;
    u32 held = plain ? kFull : held_in(p, base);
    u32 live = plain ? kFull : transpose(held);
    bool all = plain || (whole && warp_sum((u32)__popc(held)) >= kSparse);
    u32 bits[32], columns = 0, overs = 0;
    load_unit<Bits>(p, base, live, all, bits);
#pragma unroll
    for (int j = 0; j < 32; j++) {
      if (above.below(bits[j]))
        overs |= 1u << j;
      else if (within.reached(bits[j]))
        columns |= 1u << j;
    }
    overs &= live;
    columns &= live;
    // Both counts in one sum: of either there are at most 1024.
    u32 mine = (u32)__popc(columns) | (u32)__popc(overs) << 16, before = warp_before(mine);
    u32 sums = __shfl_sync(kFull, before + mine, 31), count = sums & 0xffff, over = sums >> 16;
    before &= 0xffff;
    u32 row = transpose(overs);
    if (p.words && (base / 32 + lane) * 32 < p.n)
      p.words[base / 32 + lane] = row;
    u32 begin = 0, one = 0;
    if (count > kCrowd) {
      u32 least = kFull, most = 0;
#pragma unroll
      for (int j = 0; j < 32; j++)
        if ((columns >> j) & 1) {
          u32 k = bits[j] & Keys<Bits>::kMask;
          least = k < least ? k : least;
          most = k > most ? k : most;
        }
      for (int d = 16; d; d >>= 1) {
        u32 a = __shfl_xor_sync(kFull, least, d), b = __shfl_xor_sync(kFull, most, d);
        least = a < least ? a : least;
        most = b > most ? b : most;
      }
      one = least;
      if (least == most)
        begin = kUniform;
    }
    if (begin != kUniform) {
      if (lane == 0 && count)
        begin = atomicAdd(&s.used, count);
      begin = __shfl_sync(kFull, begin, 0);
      if (begin + count > room) {
        if (lane == 0)
          atomicMin(&s.filled, begin);
        begin = kReread;
      }
    }
    if (lane == 0) {
      job.units[unit] = Unit{begin, count, one};
      over_all += over;
      if (begin >= kUniform)
        atomicAdd(&s.special, 1u);
      if (job.counts && over)
        atomicAdd(job.counts + unit / 2, (u64)over << 32);
    }
    u32 to = begin + before, from = (u32)((unit - at.first * 2) * 1024 + lane);
    if (begin == kUniform) {
      job.marks[unit * 32 + lane] = transpose(columns);
      if (lane == 0)
        atomicAdd(s.bins + ((one - low) >> at.shift), count);
    } else if (count > kCrowd) {
      each_key<Bits>(p, base, columns, [&](int j, u32 k, bool on) {
        if (on && begin != kReread) {
          pool[to] = (Bits)k;
          places[to++] = from + j * 32;
        }
        count_in(s.bins, (k - low) >> at.shift, on);
      });
    } else {
      // A key by a number of its register would need memory: it is loaded again, from a cache.
      for (u32 rest = columns; rest; rest &= rest - 1) {
        u32 j = (u32)__ffs(rest) - 1, k = Keys<Bits>::at(p.values, base + j * 32 + lane);
        if (begin != kReread) {
          pool[to] = (Bits)k;
          places[to++] = from + j * 32;
        }
        atomicAdd(s.bins + ((k - low) >> at.shift), 1u);
      }
    }
  }
  over_all = block_sum(s, over_all);
  if (threadIdx.x == 0 && over_all)
    atomicAdd((u64*)(job.state + 2), over_all);
}

__device__ u32* histogram(const Job& job, int level) {
  return job.state + 4 + level * kBins;
}

// Adds this block's bins to those of the grid.
__device__ void flush(const Job& job, Shared& s, int level) {
  u32* to = histogram(job, level);
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += THREADS)
    if (s.bins[i])
      atomicAdd(to + i, s.bins[i]);
}

// From a histogram to its bin that holds the `wanted`-th largest, and its rank in there. Returns
// whether there are so many.
__device__ bool narrow(const Job& job, Shared& s, int level, u64& wanted, u32& bin) {
  constexpr int kEach = kBins / THREADS;
  const u32* from = histogram(job, level);
  int highest = kBins - 1 - (int)threadIdx.x * kEach;
  u32 mine[kEach];
  u64 sum = 0;
  for (int k = 0; k < kEach; k++)
    sum += mine[k] = LOAD_L2(from + highest - k);
  u64 above = block_before(s, sum);
  bool found = wanted > 0 && wanted <= s.total;
  for (int k = 0; k < kEach; k++) {
    if (above < wanted && wanted <= above + mine[k]) {
      s.low = (u32)(highest - k);
      s.wanted = wanted - above;
    }
    above += mine[k];
  }
  __syncthreads();
  if (found)
    bin = s.low, wanted = s.wanted;
  __syncthreads();
  return found;
}

// The candidates that were collected: `see(key, place in the stretch)`.
template <class Bits, class See>
__device__ void each_collected(const Job& job, Shared& s, const Stretch& at, See see) {
  const Bits* pool = (const Bits*)job.pool + at.first * kShare;
  const u32* places = job.places + at.first * kShare;
  u32 count = at.missed ? 0 : s.used < s.filled ? s.used : s.filled;
#pragma unroll 4
  for (u32 i = threadIdx.x; i < count; i += THREADS)
    see(pool[i], places[i]);
}

// The units that were not collected, a warp each: `uniform(unit, record)`, or `reread(unit, part,
// its first element, live)`.
template <class Bits, class Uniform, class Reread>
__device__ void each_special(const Job& job, Shared& s, const Stretch& at, Uniform uniform,
                             Reread reread) {
  if (!at.missed && !s.special)
    return;
  for (i64 unit = at.first * 2 + (threadIdx.x >> 5); unit < at.last * 2; unit += kWarps) {
    Unit u = job.units[unit];
    if (!at.missed && u.begin < kUniform)
      continue;
    if (!at.missed && u.begin == kUniform) {
      uniform(unit, u);
    } else {
      const Part& p = job.part[part_of(job, unit / 2)];
      i64 base = (unit - p.first * 2) * 1024;
      reread(unit, p, base, transpose(held_in(p, base)));
    }
  }
}

// Of all candidates, those of the first histogram's bin are near: only they are looked at again.
__device__ bool is_near(const Stretch& at, u32 k) {
  return k >= at.near_low && k <= at.near_top;
}

// The near ones of those that were collected, from the list of them if it holds all.
template <class Bits, class See>
__device__ void each_near(const Job& job, Shared& s, const Stretch& at, See see) {
  if (s.near <= (u32)kNear) {
    for (u32 i = threadIdx.x; i < s.near; i += THREADS)
      see(s.bins[kBins + 2 * i], s.bins[kBins + 2 * i + 1]);
  } else {
    each_collected<Bits>(job, s, at, [&](u32 k, u32 place) {
      if (is_near(at, k))
        see(k, place);
    });
  }
}

__device__ void keep(const Job& job, const Stretch& at, u32 place) {
  i64 block = at.first + place / 2048;
  const Part& p = job.part[part_of(job, block)];
  atomicOr(p.words + (block - p.first) * 64 + place % 2048 / 32, 1u << (place & 31));
}

// Settles what is above the near ones, lists these, and counts them in bins of 2^finer keys.
template <class Bits>
__device__ void sift(const Job& job, Shared& s, const Stretch& at, u32 finer) {
  u32 lane = lane_id();
  for (int i = threadIdx.x; i < kBins; i += THREADS)
    s.bins[i] = 0;
  if (threadIdx.x == 0)
    s.near = 0;
  if (at.missed && job.counts)
    for (i64 block = at.first + threadIdx.x; block < at.last; block += THREADS) {
      const Part& p = job.part[part_of(job, block)];
      i64 word = (block - p.first) * 64;
      for (int i = 0; i < 64 && (word + i) * 32 < p.n; i++)
        p.words[word + i] = 0;
      job.counts[block] = 0;
    }
  __syncthreads();
  each_collected<Bits>(job, s, at, [&](u32 k, u32 place) {
    if (k < at.near_low)
      return;
    if (k > at.near_top) {
      if (!job.counts)
        return;
      atomicAdd(job.counts + at.first + place / 2048, 1ull << 32);
      keep(job, at, place);
      return;
    }
    u32 to = atomicAdd(&s.near, 1u);
    if (to < (u32)kNear) {
      s.bins[kBins + 2 * to] = k;
      s.bins[kBins + 2 * to + 1] = place;
    }
    atomicAdd(s.bins + ((k - at.low) >> finer), 1u);
  });
  each_special<Bits>(
      job, s, at,
      [&](i64 unit, const Unit& u) {
        if (is_near(at, u.key)) {
          if (lane == 0)
            atomicAdd(s.bins + ((u.key - at.low) >> finer), u.count);
        } else if (u.key > at.near_top && job.counts) {
          const Part& p = job.part[part_of(job, unit / 2)];
          u32 bits = job.marks[unit * 32 + lane];
          if (bits)
            p.words[(unit - p.first * 2) * 32 + lane] |= bits;
          if (lane == 0)
            atomicAdd(job.counts + unit / 2, (u64)u.count << 32);
        }
      },
      [&](i64 unit, const Part& p, i64 base, u32 live) {
        u32 row = 0;
        each_key<Bits>(p, base, live, [&](int j, u32 k, bool on) {
          u32 over = __ballot_sync(kFull, on && k > at.near_top && k <= at.top);
          if (lane == (u32)j)
            row = over;
          count_in(s.bins, (k - at.low) >> finer, on && is_near(at, k));
        });
        if (!job.counts)
          return;
        if (row)
          p.words[base / 32 + lane] |= row;
        u32 over = warp_sum((u32)__popc(row));
        if (lane == 0 && over)
          atomicAdd(job.counts + unit / 2, (u64)over << 32);
      });
}

// Counts the near ones, in bins of 2^finer keys, that lie within 2^shift of `low`.
template <class Bits>
__device__ void recount(const Job& job, Shared& s, const Stretch& at, u32 finer) {
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += THREADS)
    s.bins[i] = 0;
  __syncthreads();
  auto inside = [&](u32 k) {
    return is_near(at, k) && k >= at.low && (k - at.low) >> at.shift == 0;
  };
  each_near<Bits>(job, s, at, [&](u32 k, u32) {
    if (inside(k))
      atomicAdd(s.bins + ((k - at.low) >> finer), 1u);
  });
  each_special<Bits>(
      job, s, at,
      [&](i64, const Unit& u) {
        if (inside(u.key) && lane_id() == 0)
          atomicAdd(s.bins + ((u.key - at.low) >> finer), u.count);
      },
      [&](i64, const Part& p, i64 base, u32 live) {
        each_key<Bits>(p, base, live, [&](int, u32 k, bool on) {
          count_in(s.bins, (k - at.low) >> finer, on && inside(k));
        });
      });
}

// Counts of each block: elements over the key, `at.low` (<< 32), and those that equal it. Of all
// blocks there are fewer than 2^32, so no sum of ties reaches the other.
template <class Bits>
__device__ void count_blocks(const Job& job, Shared& s, const Stretch& at) {
  u32 exact = at.low;
  auto one = [&](u32 k) { return k > exact ? 1ull << 32 : (u64)(k == exact); };
  each_near<Bits>(job, s, at, [&](u32 k, u32 place) {
    if (k >= exact)
      atomicAdd(job.counts + at.first + place / 2048, one(k));
  });
  each_special<Bits>(
      job, s, at,
      [&](i64 unit, const Unit& u) {
        if (u.key >= exact && is_near(at, u.key) && lane_id() == 0)
          atomicAdd(job.counts + unit / 2, one(u.key) * u.count);
      },
      [&](i64 unit, const Part& p, i64 base, u32 live) {
        u64 sum = 0;
        each_key<Bits>(p, base, live,
                       [&](int, u32 k, bool on) { sum += on && is_near(at, k) ? one(k) : 0; });
        sum = warp_sum(sum);
        if (lane_id() == 0 && sum)
          atomicAdd(job.counts + unit / 2, sum);
      });
  // Atomics take place in the L2 cache.
  __threadfence();
  __syncthreads();
  u64 sum = 0;
  for (i64 i = at.first + threadIdx.x; i < at.last; i += THREADS)
    sum += LOAD_L2(job.counts + i);
  sum = block_sum(s, sum);
  if (threadIdx.x == 0)
    job.totals[blockIdx.x] = sum;
}

// The rank index, and how many ties lie before each block. Of several parts a rank counts from the
// first one: `settle` takes off what lies before.
__device__ void place(const Job& job, Shared& s, const Stretch& at, u64 allowed) {
  u64 before = 0;
  for (u32 i = threadIdx.x; i < blockIdx.x; i += THREADS)
    before += LOAD_L2(job.totals + i);
  before = block_sum(s, before);
  for (i64 start = at.first; start < at.last; start += THREADS) {
    i64 block = start + threadIdx.x;
    u64 here = block < at.last ? LOAD_L2(job.counts + block) : 0;
    u64 earlier = before + block_before(s, here), through = earlier + here;
    before += s.total;
    __syncthreads();
    if (block >= at.last)
      continue;
    u64 ties_before = (u32)earlier, ties = (u32)through;
    job.ties_before[block] = ties_before;
    int which = part_of(job, block);
    const Part& p = job.part[which];
    if (block == p.first) {
      job.bases[which] = (earlier >> 32) + least(ties_before, allowed);
      p.rank[0] = 0;
    }
    p.rank[block - p.first + 1] = (i64)((through >> 32) + least(ties, allowed));
    // Of all blocks at most one has ties of both kinds.
    if (ties_before < allowed && ties > allowed)
      s.torn = block;
  }
}

// The `some` lowest bits that are set in x.
__device__ u32 lowest(u32 x, u32 some) {
  u32 rest = x;
  for (; some && rest; some--)
    rest &= rest - 1;
  return x ^ rest;
}

// Into the words that hold what is over the near ones: those over the key, and the first ties.
template <class Bits>
__device__ void settle(const Job& job, Shared& s, const Stretch& at, u64 allowed) {
  u32 exact = at.low, lane = lane_id();
  u32* torn = s.bins; // the ties of the torn block
  auto kept = [&](i64 block) { return job.ties_before[block] < allowed && block != s.torn; };
  each_near<Bits>(job, s, at, [&](u32 k, u32 place) {
    i64 block = at.first + place / 2048;
    if (k == exact && block == s.torn)
      atomicOr(torn + place % 2048 / 32, 1u << (place & 31));
    else if (k > exact || (k == exact && kept(block)))
      keep(job, at, place);
  });
  each_special<Bits>(
      job, s, at,
      [&](i64 unit, const Unit& u) {
        if (u.key < exact || !is_near(at, u.key))
          return;
        const Part& p = job.part[part_of(job, unit / 2)];
        u32 bits = job.marks[unit * 32 + lane];
        if (u.key == exact && unit / 2 == s.torn)
          torn[(unit & 1) * 32 + lane] = bits;
        else if (bits && (u.key > exact || kept(unit / 2)))
          p.words[(unit - p.first * 2) * 32 + lane] |= bits;
      },
      [&](i64 unit, const Part& p, i64 base, u32 live) {
        u32 row = 0, equal = 0;
        each_key<Bits>(p, base, live, [&](int j, u32 k, bool on) {
          u32 over = __ballot_sync(kFull, on && is_near(at, k) && k > exact);
          u32 same = __ballot_sync(kFull, on && k == exact);
          if (lane == (u32)j)
            row = over, equal = same;
        });
        if (unit / 2 == s.torn)
          torn[(unit & 1) * 32 + lane] = equal;
        else if (kept(unit / 2))
          row |= equal;
        if (row)
          p.words[base / 32 + lane] |= row;
      });
  __threadfence();
  __syncthreads();
  if (s.torn >= 0 && threadIdx.x < 32) {
    const Part& p = job.part[part_of(job, s.torn)];
    u64 left = allowed - job.ties_before[s.torn];
    for (int half = 0; half < 2; half++) {
      u32 equal = torn[half * 32 + lane], count = (u32)__popc(equal), earlier = warp_before(count);
      u32 mine = left > earlier ? (u32)least(left - earlier, 32) : 0;
      if (equal && mine)
        atomicOr(p.words + (s.torn - p.first) * 64 + half * 32 + lane, lowest(equal, mine));
      left -= least(left, warp_sum(count));
    }
  }
  if (job.parts < 2)
    return;
  for (i64 block = at.first + threadIdx.x; block < at.last; block += THREADS) {
    int which = part_of(job, block);
    const Part& p = job.part[which];
    p.rank[block - p.first + 1] -= (i64)LOAD_L2(job.bases + which);
  }
}

template <class Bits>
__device__ void select(const Job& job, Shared& s) {
  Stretch at;
  at.first = job.blocks * blockIdx.x / gridDim.x;
  at.last = job.blocks * (blockIdx.x + 1) / gridDim.x;
  at.missed = false;
  // The sample takes 7 us on an H200: the first units come meanwhile. Later ones by themselves:
  // with a unit ahead 83.2 us where it took 80.7 without.
  if (at.first * 2 + (threadIdx.x >> 5) < at.last * 2)
    fetch_ahead<Bits>(job, at.first * 2 + (threadIdx.x >> 5));
  if (job.counts)
    for (i64 i = at.first + threadIdx.x; i < at.last; i += THREADS)
      job.counts[i] = 0;
  u32 bin = 0, times = 0;
  int level = 0;
  bracket<Bits>(job, s, at.low, at.top, at.shift);
  read<Bits>(job, s, at);
  flush(job, s, level);
  grid_sync(job.state, ++times);
  u64 above = LOAD_L2((const u64*)(job.state + 2));
  u64 wanted = job.keep > above ? job.keep - above : 0;
  at.missed = !narrow(job, s, level, wanted, bin);
  if (at.missed)
    at.low = 0, at.top = kFull, at.shift = Keys<Bits>::kBits, wanted = job.keep;
  else
    at.low += bin << at.shift;
  at.near_low = at.low;
  at.near_top = (u32)least(at.top, (u64)at.low + (1ull << at.shift) - 1);
  u32 finer = at.shift > 11 ? at.shift - 11 : 0;
  sift<Bits>(job, s, at, finer);
  while (at.shift) {
    flush(job, s, ++level);
    grid_sync(job.state, ++times);
    narrow(job, s, level, wanted, bin);
    at.low += bin << finer;
    at.shift = finer;
    if (finer == 0)
      break;
    finer = at.shift > 11 ? at.shift - 11 : 0;
    recount<Bits>(job, s, at, finer);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *job.key = at.low;
  if (!job.counts)
    return;
  __syncthreads();
  if (threadIdx.x < 64)
    s.bins[threadIdx.x] = 0;
  if (threadIdx.x == 0)
    s.torn = -1;
  count_blocks<Bits>(job, s, at);
  grid_sync(job.state, ++times);
  place(job, s, at, wanted);
  if (job.parts > 1)
    grid_sync(job.state, ++times);
  else
    __syncthreads();
  settle<Bits>(job, s, at, wanted);
}

} // namespace

extern "C" __global__ void LAUNCHED select_32(const GRID_CONSTANT Job job) {
  SHARED(Shared, s);
  select<u32>(job, s);
}

extern "C" __global__ void LAUNCHED select_16(const GRID_CONSTANT Job job) {
  SHARED(Shared, s);
  select<u16>(job, s);
}
