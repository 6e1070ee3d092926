#include "common/threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace ubp {
namespace {

struct Job {
  void (*task)(void*, int64_t, int);
  void* context;
  int64_t items;
  std::atomic<int64_t> next{0};
  // Of the caller: how it rounds, and whether it flushes denormal numbers to zero. Helpers compute in the
  // same mode, or results would depend on their number.
  std::fenv_t mode;
};

void work(Job& job, int worker) {
  for (int64_t item = job.next++; item < job.items; item = job.next++) job.task(job.context, item, worker);
}

class Pool {
 public:
  // Several callers share nothing: who finds the others' threads busy works alone meanwhile.
  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> one_call_at_a_time(call_mutex_, std::try_to_lock);
    if (!one_call_at_a_time) {
      work(job, 0);
      return;
    }
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      helpers_wanted_ = threads - 1;
      helpers_running_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    work(job, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return helpers_running_ == 0; });
    job_ = nullptr;
  }

 private:
  void grow(int helpers) {
    while (static_cast<int>(threads_.size()) < helpers) {
      const int worker = static_cast<int>(threads_.size()) + 1;
      threads_.emplace_back([this, worker] { serve(worker); });
      threads_.back().detach();  // they sleep until the process ends
    }
  }

  void serve(int worker) {
    uint64_t seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock,
                   [&] { return generation_ != seen && (worker > helpers_wanted_ || job_ != nullptr); });
        seen = generation_;
        if (worker > helpers_wanted_) continue;
        job = job_;
      }
      std::fesetenv(&job->mode);
      work(*job, worker);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--helpers_running_ == 0) done_.notify_one();
    }
  }

  std::mutex call_mutex_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int helpers_wanted_ = 0, helpers_running_ = 0;
  uint64_t generation_ = 0;
};

std::atomic<Pool*> current_pool{nullptr};

// A forked child inherits the pool's memory but none of its threads, perhaps with a mutex held: it forgets
// that pool, while it still has one thread, and makes its own at the first call. The old one is never freed,
// its mutexes may be locked for good.
Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
  static_cast<void>(registered);
  Pool* known = current_pool.load();
  if (known != nullptr) return *known;
  Pool* fresh = new Pool;
  if (current_pool.compare_exchange_strong(known, fresh)) return *fresh;
  delete fresh;  // another thread was first; this one has no threads yet
  return *known;
}

}  // namespace

void yield_thread() { std::this_thread::yield(); }

void throw_out_of_memory() { throw std::bad_alloc(); }

void parallel_for(int64_t items, int threads, void (*task)(void*, int64_t, int), void* context) {
  threads = static_cast<int>(std::min<int64_t>(threads, items));
  Job job{task, context, items, {}, {}};
  if (threads <= 1) {
    work(job, 0);
    return;
  }
  std::fegetenv(&job.mode);
  pool().run(job, threads);
}

}  // namespace ubp
