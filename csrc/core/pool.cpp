#include "core/pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fedmap {
namespace {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// torch.set_flush_denormal sets MXCSR of the calling thread alone, and threads started later
// inherit it: without this the bits would depend on which thread ran a task.
class DefaultFloatEnvironment {
 public:
#if defined(__x86_64__)
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~DefaultFloatEnvironment() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
};

thread_local bool inside_task = false;

struct Job {
  pool::Task task;
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::mutex failure_mutex;
  std::exception_ptr failure;

  void share(int slot) {
    DefaultFloatEnvironment environment;
    const bool nested = std::exchange(inside_task, true);
    try {
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
        task(context, t, slot);
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure)
        failure = std::current_exception();
    }
    inside_task = nested;
  }
};

// Between two kernels of a training step lie some tens of microseconds of Python; sleeping and
// being woken costs about as much.
constexpr int kSpins = 2000;

class Worker {
 public:
  explicit Worker(int slot) : slot_(slot) {
    std::thread thread([this] { loop(); });
    handle_ = thread.native_handle();
    thread.detach();
  }

  void offer(Job* job) {
    inbox_.store(job);
    if (asleep_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      leave_to_caller();
      wake_.notify_one();
    }
  }

  // Takes the job back if it was not begun, else waits for its end: afterwards the worker holds no
  // reference to it.
  void settle(Job* job) {
    if (inbox_.compare_exchange_strong(job, nullptr))
      return;
    for (int spins = 0; inbox_.load(std::memory_order_acquire) != nullptr; ++spins) {
      if (spins < kSpins)
        relax();
      else
        std::this_thread::yield();
    }
  }

 private:
  Job* begun() { return reinterpret_cast<Job*>(this); }

  [[noreturn]] void loop() {
    for (;;) {
      Job* job = await();
      if (!inbox_.compare_exchange_strong(job, begun()))
        continue;
      job->share(slot_);
      inbox_.store(nullptr, std::memory_order_release);
    }
  }

  // Having been woken it looks for a while, as a waking may take longer than the job it was for:
  // the next one finds it ready.
  Job* await() {
    for (;;) {
      for (int spins = 0; spins < kSpins; ++spins) {
        if (Job* job = inbox_.load(std::memory_order_relaxed))
          return job;
        relax();
      }
      std::unique_lock<std::mutex> lock(mutex_);
#if defined(__linux__)
      cpu_ = sched_getcpu();
#endif
      asleep_.store(true);
      if (!inbox_.load())
        wake_.wait(lock);
      asleep_.store(false);
    }
  }

  // Linux may wake a thread where it last ran although the caller, which goes on working, runs
  // there now and other CPUs idle; it is moved only milliseconds later. On two virtual CPUs most
  // jobs of 1 ms had one thread.
  void leave_to_caller() {
#if defined(__linux__)
    const int cpu = sched_getcpu();
    cpu_set_t others;
    if (cpu_ != cpu || cpu < 0 || sched_getaffinity(0, sizeof others, &others) != 0)
      return;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) > 0)
      pthread_setaffinity_np(handle_, sizeof others, &others);
#endif
  }

  const int slot_;
  std::thread::native_handle_type handle_;
  int cpu_ = -1; // where it went to sleep
  alignas(64) std::atomic<Job*> inbox_{nullptr};
  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Pool {
 public:
  bool acquire() { return !busy_.exchange(true, std::memory_order_acquire); }
  void release() { busy_.store(false, std::memory_order_release); }
  int workers() const { return count_.load(std::memory_order_relaxed); }

  void run(Job& job, int helpers) {
    try {
      while (workers() < helpers) {
        workers_.push_back(std::make_unique<Worker>(workers() + 1));
        count_.fetch_add(1, std::memory_order_relaxed);
      }
    } catch (const std::exception&) {
      // No more threads or memory to be had: those that run do the work.
      helpers = workers();
    }
    for (int i = 0; i < helpers; ++i)
      workers_[i]->offer(&job);
    job.share(0);
    for (int i = 0; i < helpers; ++i)
      workers_[i]->settle(&job);
  }

 private:
  std::atomic<bool> busy_{false};
  std::atomic<int> count_{0};
  std::vector<std::unique_ptr<Worker>> workers_;
};

// Never destroyed: its threads wait on its condition variables until the process is gone, and
// destroying those hangs the exit of the interpreter.
std::atomic<Pool*> current{nullptr};

Pool& instance() {
  if (Pool* pool = current.load(std::memory_order_acquire))
    return *pool;
  static std::once_flag once;
  // A forked child has none of the threads: it makes a pool of its own, and leaks its copy.
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); }); });
  Pool* made = new Pool;
  Pool* expected = nullptr;
  if (!current.compare_exchange_strong(expected, made)) {
    delete made;
    return *expected;
  }
  return *made;
}

} // namespace

namespace pool {

void run(int64_t tasks, int threads, Task task, void* context) {
  if (tasks <= 0)
    return;
  Job job{task, context, tasks, {}, {}, {}};
  int helpers = static_cast<int>(std::min<int64_t>(tasks, threads_for(INT64_MAX, threads))) - 1;
  Pool* shared = helpers > 0 && !inside_task ? &instance() : nullptr;
  if (shared && shared->acquire()) {
    shared->run(job, helpers);
    shared->release();
  } else {
    job.share(0);
  }
  if (job.failure)
    std::rethrow_exception(job.failure);
}

int workers() {
  Pool* pool = current.load(std::memory_order_acquire);
  return pool ? pool->workers() : 0;
}

} // namespace pool

int threads_for(int64_t bytes, int threads, int64_t grain) {
  static const int hardware = std::max(1u, std::thread::hardware_concurrency());
  return static_cast<int>(std::min<int64_t>(threads > 0 ? threads : hardware, 1 + bytes / grain));
}

} // namespace fedmap
