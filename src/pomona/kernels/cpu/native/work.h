// How a kernel's items are shared among threads: each has its own, and takes those of others when none of its own is
// left. So it can fetch into its cache what it will want: threads need not share one. Included by isa.cpp only.
#pragma once
#include <sched.h>

#include "api.h"
#include "tile_registers.h"

namespace {

constexpr int kMostQueues = 64;  // with more threads, some share theirs

// Until so many are done, whichever threads do them.
inline void wait_for(const int64_t& num_done, int64_t num) {
  for (int spins = 0; __atomic_load_n(&num_done, __ATOMIC_ACQUIRE) < num; spins++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > 4000) sched_yield();
  }
}

template <class F>
struct Items {
  struct alignas(64) Queue {
    int64_t num_taken;  // of the items queue, queue + num_queues, and so on
  };
  const F* run;
  int64_t num_items;
  int num_queues;  // no more than there are threads, which each begin with one
  int64_t num_done = 0;
  Queue queues[kMostQueues];

  Items(const F& f, int64_t num, int num_threads)
      : run(&f), num_items(num), num_queues(num_threads < kMostQueues ? num_threads : kMostQueues) {
    for (int queue = 0; queue < num_queues; queue++) queues[queue].num_taken = 0;
  }

  void take(int thread) {
    int64_t taken = 0;
    for (int i = 0; i < num_queues; i++) {
      const int queue = (thread + i) % num_queues;
      int64_t* num_taken = &queues[queue].num_taken;
      while (queue + __atomic_load_n(num_taken, __ATOMIC_RELAXED) * num_queues < num_items) {
        const int64_t item = queue + __atomic_fetch_add(num_taken, 1, __ATOMIC_RELAXED) * num_queues;
        if (item >= num_items) break;
        (*run)(item);
        taken++;
      }
    }
    if (taken) __atomic_fetch_add(&num_done, taken, __ATOMIC_RELEASE);
  }
  // Until every item is done. A taken item is being run, so this ends.
  void wait() const { wait_for(num_done, num_items); }
};

// f(item) for every item, on up to num_threads threads.
template <class F>
void for_items(int64_t num_items, int num_threads, const F& f) {
  const int threads = static_cast<int>(min64(num_threads, num_items));
  if (threads <= 1) {
    const TileRegisters registers;
    for (int64_t item = 0; item < num_items; item++) f(item);
    return;
  }
  Items<F> items(f, num_items, threads);
  pomona::run_threads(
      threads,
      [](void* state, int thread) {
        const TileRegisters registers;
        static_cast<Items<F>*>(state)->take(thread);
      },
      &items);
}

// Items of one kind, of which there may be none. The next kind begins when all of them are done; or, if they are the
// first kind and not awaited, when none is left to be taken: then what needs them has to wait by itself.
template <class F>
struct Kind {
  int64_t num_items;
  const F& run;
  bool is_awaited = true;
};
template <class F>
Kind(int64_t, const F&, bool = true) -> Kind<F>;

// All of the first kind, then all of the second, then all of the third, in one go: threads are not sent home between.
template <class F, class G, class H>
void for_kinds(int num_threads, Kind<F> first, Kind<G> second, Kind<H> third) {
  if (num_threads <= 1) {
    const TileRegisters registers;
    for (int64_t item = 0; item < first.num_items; item++) first.run(item);
    for (int64_t item = 0; item < second.num_items; item++) second.run(item);
    for (int64_t item = 0; item < third.num_items; item++) third.run(item);
    return;
  }
  struct All {
    Items<F> first;
    Items<G> second;
    Items<H> third;
    bool is_first_awaited;
  } all{{first.run, first.num_items, num_threads},
        {second.run, second.num_items, num_threads},
        {third.run, third.num_items, num_threads},
        first.is_awaited};
  pomona::run_threads(
      num_threads,
      [](void* state, int thread) {
        const TileRegisters registers;
        All* all = static_cast<All*>(state);
        all->first.take(thread);
        if (all->is_first_awaited) all->first.wait();
        all->second.take(thread);
        if (all->third.num_items == 0) return;
        all->second.wait();
        all->third.take(thread);
      },
      &all);
}

// Threads take items in turn: this gives each of them items side by side, so that it reads on where it was.
INLINE int64_t side_by_side(int64_t item, int64_t num_items, int threads) {
  const int64_t thread = item % threads;
  return thread * (num_items / threads) + min64(thread, num_items % threads) + item / threads;
}

// The inverse: whose turn a place is.
INLINE int64_t turn_of(int64_t place, int64_t num_items, int64_t threads) {
  const int64_t longest = num_items / threads + 1, num_longest = num_items % threads;
  if (place < longest * num_longest) return place % longest * threads + place / longest;
  const int64_t rest = place - longest * num_longest;
  return rest % (longest - 1) * threads + num_longest + rest / (longest - 1);
}

// Small work is done by the caller alone: waking another thread costs about as much as this many cycles.
constexpr int64_t kThreadCycles = 8000;
INLINE int threads_for(int num_threads, int64_t cycles) { return cycles < kThreadCycles ? 1 : num_threads; }

}  // namespace
