// The thread pool that every kernel runs on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace fedmap {

namespace pool {

using Task = void (*)(void* context, int64_t task, int slot);

// Runs task(context, t, slot) for t in [0, tasks) on at most `threads` threads, the caller being
// one; `slot` < threads tells which. Tasks are handed out in increasing order.
void run(int64_t tasks, int threads, Task task, void* context);

// Worker threads started so far in this process.
int workers();

} // namespace pool

// The threads to use: `threads` as asked (the hardware's count when it is not positive), but one
// for every `grain` bytes at most. Waking a worker costs several microseconds; 128 KiB is about
// what one core streams from memory meanwhile.
int threads_for(int64_t bytes, int threads, int64_t grain = 128 << 10);

// Calls f(task) or f(task, slot) for each task in [0, tasks), in parallel, and returns when all are
// done. Each share runs with the default floating-point environment (no flushing of subnormals,
// round to nearest), restored afterwards. Runs inline when threads == 1, when called from inside a
// task and while another thread uses the pool. What a task throws is thrown here, once.
template <class F>
void parallel_for(int64_t tasks, int threads, F&& f) {
  using Body = std::remove_reference_t<F>;
  pool::run(
      tasks, threads,
      [](void* context, int64_t task, int slot) {
        Body& body = *static_cast<Body*>(context);
        if constexpr (std::is_invocable_v<Body&, int64_t, int>)
          body(task, slot);
        else {
          (void)slot;
          body(task);
        }
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// The piece to cut n elements into, for a kernel that streams memory: a multiple of `unit`, as
// large as `most` if that leaves several for each thread. Threads whose pieces lie close together
// slow each other down: on Zen 4 a step over 26 M float32 took 7.2 ms in pieces of 32 Ki, 5.6 in
// 256 Ki.
inline int64_t piece_of(int64_t n, int64_t most, int64_t unit, int threads) {
  return std::max<int64_t>(1, std::min(most, n / (4 * threads)) / unit) * unit;
}

// Cuts [0, n) into pieces of `piece` elements (a multiple of what the kernel must not split) and
// calls f(begin, end) for each, in parallel.
template <class F>
void parallel_ranges(int64_t n, int64_t piece, int threads, F&& f) {
  parallel_for((n + piece - 1) / piece, threads, [&](int64_t task) {
    int64_t begin = task * piece;
    f(begin, std::min(n, begin + piece));
  });
}

} // namespace fedmap
