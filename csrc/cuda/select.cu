// Top-k by magnitude in one cooperative launch: values are read once on the usual path.
//
// Every block takes the same sample, brackets the key of the wanted rank with it, and reads its own
// stretch of the values: it writes the bits above the bracket, collects the candidates within it
// and counts them in a radix histogram. Behind a barrier of the grid every block finds the bin of
// the wanted key; the candidates in it are counted again in finer bins, until the key is known.
// Counts of each block then place the survivors and the ties, never the order of atomics.
//
// A unit of 1024 values whose candidates are one key over and over, as ties are, keeps them as
// bits. Where the bracket missed, or a stretch has too many candidates, values are read again; of a
// few keys over and over, once, since those in the found bin are one.
//
// NVRTC compiles this at first use (fedmap_sparse/cuda_kernels), without any other header. The
// tests compile it as C++ too, a block's threads as fibers (tests/native/cuda/on_cpu.h).

#include "select_settle.h"

namespace {

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
