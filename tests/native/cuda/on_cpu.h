// CUDA C++ on a CPU, as far as csrc/cuda asks: every thread of a grid is a fiber, which gives way
// where it waits for others. Include it before a .cu file. Warps are of 32 lanes, and all of them
// take part in each exchange.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace on_cpu {

struct Index {
  unsigned x;
};

// A place where so many fibers meet, each with a value that all then see.
struct Meeting {
  unsigned wanted = 0, here = 0, times = 0;
  std::vector<unsigned long long> given, seen;

  void resize(unsigned n) {
    wanted = n;
    given.resize(n);
    seen.resize(n);
  }
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Index thread, block;
  Meeting *warp, *team;
  void* shared;
  bool done = false;
};

inline Fiber* now = nullptr;
inline ucontext_t scheduler;
inline Index grid;
inline std::function<void()> kernel;
inline unsigned long long loads = 0; // of what no one writes, since the launch

inline void give_way() {
  swapcontext(&now->context, &scheduler);
}

// All fibers of the meeting arrive; what each gave is in `seen` until all arrive again.
inline const unsigned long long* meet(Meeting& m, unsigned place, unsigned long long value) {
  m.given[place] = value;
  unsigned mine = m.times;
  if (++m.here == m.wanted) {
    m.seen = m.given;
    m.here = 0;
    m.times++;
  }
  while (m.times == mine)
    give_way();
  return m.seen.data();
}

inline void enter() {
  kernel();
  now->done = true;
  give_way();
}

// Runs `body` on `blocks` blocks of `threads`; `seed` shuffles who goes first.
inline void launch(unsigned blocks, unsigned threads, std::size_t shared_bytes, unsigned seed,
                   std::function<void()> body) {
  kernel = std::move(body);
  grid = {blocks};
  loads = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Meeting> teams(blocks), warps(blocks * (threads / 32));
  std::vector<std::vector<std::uint64_t>> shared(blocks);
  for (unsigned b = 0; b < blocks; b++) {
    teams[b].resize(threads);
    shared[b].assign(shared_bytes / 8 + 1, 0xA5A5A5A5A5A5A5A5ull); // as on a device: of any content
    for (unsigned t = 0; t < threads; t++) {
      auto f = std::make_unique<Fiber>();
      f->stack.resize(1 << 16);
      f->thread = {t};
      f->block = {b};
      f->team = &teams[b];
      f->warp = &warps[b * (threads / 32) + t / 32];
      f->warp->resize(32);
      f->shared = shared[b].data();
      getcontext(&f->context);
      f->context.uc_stack.ss_sp = f->stack.data();
      f->context.uc_stack.ss_size = f->stack.size();
      f->context.uc_link = nullptr;
      makecontext(&f->context, enter, 0);
      fibers.push_back(std::move(f));
    }
  }
  std::size_t left = fibers.size();
  unsigned random = seed * 2654435761u + 1;
  while (left) {
    std::size_t turn = (random = random * 1664525u + 1013904223u) % fibers.size();
    for (std::size_t i = 0; i < fibers.size(); i++) {
      Fiber& f = *fibers[(i + turn) % fibers.size()];
      if (f.done)
        continue;
      now = &f;
      swapcontext(&scheduler, &f.context);
      left -= f.done;
    }
  }
}

inline unsigned lane() {
  return now->thread.x & 31;
}

template <class T>
T exchange(T x, unsigned from) {
  unsigned long long bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = meet(*now->warp, lane(), bits)[from & 31];
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

} // namespace on_cpu

#define __device__
#define __global__
#define GRID_CONSTANT
#define LAUNCHED
#define SHARED(type, name) type& name = *static_cast<type*>(on_cpu::now->shared)
#define LOAD_ONCE(place) (on_cpu::loads++, *(place))
#define LOAD_L2(place) (*(place))
#define PREFETCH(place) ((void)(place))
#define GRID_WAIT() on_cpu::give_way()
#define threadIdx (on_cpu::now->thread)
#define blockIdx (on_cpu::now->block)
#define gridDim (on_cpu::grid)

inline void __syncthreads() {
  on_cpu::meet(*on_cpu::now->team, on_cpu::now->thread.x, 0);
}
inline void __syncwarp() {
  on_cpu::meet(*on_cpu::now->warp, on_cpu::lane(), 0);
}
inline void __threadfence() {}

inline unsigned __ballot_sync(unsigned, bool on) {
  const auto* seen = on_cpu::meet(*on_cpu::now->warp, on_cpu::lane(), on);
  unsigned out = 0;
  for (int i = 0; i < 32; i++)
    out |= unsigned(seen[i]) << i;
  return out;
}

inline bool __all_sync(unsigned all, bool on) {
  return __ballot_sync(all, on) == all;
}

template <class T>
T __shfl_sync(unsigned, T x, unsigned from) {
  return on_cpu::exchange(x, from);
}

template <class T>
T __shfl_xor_sync(unsigned, T x, unsigned with) {
  return on_cpu::exchange(x, on_cpu::lane() ^ with);
}

template <class T>
T __shfl_up_sync(unsigned, T x, unsigned by) {
  return on_cpu::exchange(x, on_cpu::lane() < by ? on_cpu::lane() : on_cpu::lane() - by);
}

inline float __uint_as_float(unsigned x) {
  float out;
  std::memcpy(&out, &x, 4);
  return out;
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(unsigned x) {
  return __builtin_ffs(int(x));
}

template <class T>
T atomicAdd(T* to, T x) {
  T old = *to;
  *to += x;
  return old;
}
inline unsigned atomicOr(unsigned* to, unsigned x) {
  return *to |= x;
}
inline unsigned atomicMax(unsigned* to, unsigned x) {
  return *to = x > *to ? x : *to;
}
inline unsigned atomicMin(unsigned* to, unsigned x) {
  return *to = x < *to ? x : *to;
}
