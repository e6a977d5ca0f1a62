// Cutting work into tasks that threads take in turn, and handing out scratch memory.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "sizes.h"

namespace lfm2 {

constexpr size_t kAlignment = 64;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Runs task(context, worker) for worker 0 .. workers-1, at once or in turn, and returns when all are done. Workers
// share the work by counters, so fewer threads than workers are right too.
struct ThreadPool {
  int workers;
  void (*run)(const void* host, int workers, void (*task)(void* context, int worker), void* context);
  const void* host;  // for `run`
};

// Everything on the calling thread: for work of a few microseconds, which is what waking another one takes.
constexpr ThreadPool kNoPool = {1, nullptr, nullptr};

// Hands out aligned pieces of the scratch memory; without memory it only counts bytes. What no memory could hold throws
// std::bad_alloc, when it is counted already.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = round_up(times(count, sizeof(T)), kAlignment), at = used_;
    used_ = plus(used_, bytes);
    if (used_ == kTooMany) {
      throw std::bad_alloc();
    }
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }

  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// step(0) .. step(tasks - 1), each once, by all workers. A worker begins with a share of its own, in order, so that what
// it reads lies side by side (processors fetch ahead, but not for who jumps about), and then helps the others.
//
// Throws std::bad_alloc here, once all workers are done, if a step threw it: what leaves a thread of the host's ends
// the process. Steps throw nothing else.
template <typename Step>
void share_out(const ThreadPool& pool, int64_t tasks, const Step& step) {
  constexpr int kMostShares = 64;
  struct alignas(kAlignment) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Shared {
    const Step& step;
    int count;
    std::atomic<bool> no_memory;
    Share shares[kMostShares];

    void work(int worker) {
      for (int i = 0; i < count; ++i) {
        Share& share = shares[(worker + i) % count];
        for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
          step(task);
        }
      }
    }
  };
  const int workers = static_cast<int>(std::min<int64_t>({pool.workers, tasks, kMostShares}));
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) {
      step(task);
    }
    return;
  }
  Shared shared{step, workers, false, {}};
  for (int i = 0; i < workers; ++i) {
    shared.shares[i].next = tasks * i / workers;
    shared.shares[i].end = tasks * (i + 1) / workers;
  }
  const auto work = [](void* context, int worker) {
    auto& all = *static_cast<Shared*>(context);
    try {
      all.work(worker);
    } catch (const std::bad_alloc&) {
      all.no_memory = true;
    }
  };
  pool.run(pool.host, workers, work, &shared);
  work(&shared, 0);  // what a pool that could not run has left
  if (shared.no_memory) {
    throw std::bad_alloc();
  }
}

}  // namespace lfm2
