// Drives the thread pool from several callers at once, with nesting, exceptions, empty and tiny
// jobs, and a fork; run under ThreadSanitizer by tools/sanitize.sh.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/pool.h"

using fedmap::parallel_for;

namespace {

void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "pool_stress: %s\n", what);
    std::_Exit(1);
  }
}

void call(int seed) {
  std::vector<int64_t> results(257);
  for (int round = 0; round < 3000; ++round) {
    const int threads = 1 + (seed + round) % 7;
    const int64_t tasks = (seed * 31 + round * 17) % 257;
    parallel_for(tasks, threads, [&](int64_t task, int slot) {
      require(0 <= slot && slot < threads, "a slot out of range");
      results[task] = task * round; // each element belongs to one task
      if (task == 3)
        parallel_for(5, 4, [&](int64_t inner) { results[task] += inner; });
    });
    for (int64_t task = 0; task < tasks; ++task)
      require(results[task] == task * round + (task == 3 ? 10 : 0), "a task was lost");
    bool caught = false;
    try {
      parallel_for(64, threads, [](int64_t task) {
        if (task == 40)
          throw std::runtime_error("expected");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    require(caught, "an exception was lost");
  }
}

int64_t sum(int threads) {
  std::atomic<int64_t> total{0};
  parallel_for(1000, threads, [&](int64_t task) { total += task; });
  return total.load();
}

} // namespace

int main() {
  require(sum(4) == 499500, "a wrong sum");
  std::vector<std::thread> callers;
  for (int seed = 0; seed < 4; ++seed)
    callers.emplace_back(call, seed);
  for (std::thread& caller : callers)
    caller.join();
  const pid_t child = fork();
  if (child == 0)
    std::_Exit(sum(1) == 499500 ? 0 : 1); // ThreadSanitizer starts no thread after a fork
  int status = 1;
  waitpid(child, &status, 0);
  require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the forked child failed");
  require(sum(3) == 499500, "a wrong sum after the fork");
  std::puts("pool_stress: passed");
  std::fflush(stdout);
  std::_Exit(0);
}
