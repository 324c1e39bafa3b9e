// From the histograms to the key, and from the candidates to words and ranks.

#pragma once

#include "select_read.h"

namespace {

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

// Settles what is above the near ones, lists these, and counts them in bins of 2^finer keys. Units
// that were read again are uniform from here on if their near ones are.
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
        u32 row = 0, near = 0, low = kFull, high = 0;
        each_key<Bits>(p, base, live, [&](int j, u32 k, bool on) {
          bool close = on && is_near(at, k);
          u32 over = __ballot_sync(kFull, on && k > at.near_top && k <= at.top);
          u32 those = __ballot_sync(kFull, close);
          if (lane == (u32)j)
            row = over, near = those;
          if (close)
            low = k < low ? k : low, high = k > high ? k : high;
          count_in(s.bins, (k - at.low) >> finer, close);
        });
        // Of a few values over and over, one is near at most: the unit is read no more.
        low = warp_min(low), high = warp_max(high);
        if (!at.missed && low >= high) {
          u32 count = warp_sum((u32)__popc(near));
          job.marks[unit * 32 + lane] = near;
          if (lane == 0)
            job.units[unit] = Unit{count ? kUniform : 0, count, low};
        }
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

} // namespace
