// The sample, the bracket, and the one read of the values.

#pragma once

#include "select_job.h"

namespace {

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

// Adds to a histogram. What shares a bin with the first lane is added at once, and of the rest what
// shares one with the first lane of it, as ties do: atomics on one address take turns.
__device__ void count_in(u32* bins, u32 bin, bool on) {
  u32 left = __ballot_sync(kFull, on);
  for (int turn = 0; turn < 2 && left; turn++) {
    u32 leader = __ffs(left) - 1;
    u32 common = __shfl_sync(kFull, bin, leader);
    u32 same = __ballot_sync(kFull, on && bin == common);
    if (lane_id() == leader)
      atomicAdd(bins + common, (u32)__popc(same));
    left &= ~same;
  }
  if ((left >> lane_id()) & 1)
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
      least = warp_min(least), most = warp_max(most);
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

} // namespace
