// How a kernel's items are shared among threads: whoever is free takes the next one. Included by isa.cpp only.
#pragma once
#include <sched.h>

#include "api.h"
#include "vec.h"

namespace {

template <class F>
struct Items {
  const F* run;
  int64_t num_items;
  int64_t next;
  int64_t num_done;

  void take() {
    int64_t taken = 0;
    for (;; taken++) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= num_items) break;
      (*run)(item);
    }
    if (taken) __atomic_fetch_add(&num_done, taken, __ATOMIC_RELEASE);
  }
  // Until every item is done, whichever thread took it. A taken item is being run, so this ends.
  void wait() {
    for (int spins = 0; __atomic_load_n(&num_done, __ATOMIC_ACQUIRE) < num_items; spins++) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins > 4000) sched_yield();
    }
  }
};

// f(item) for every item, on up to num_threads threads.
template <class F>
void for_items(int64_t num_items, int num_threads, const F& f) {
  if (num_threads <= 1 || num_items <= 1) {
    for (int64_t item = 0; item < num_items; item++) f(item);
    return;
  }
  Items<F> items{&f, num_items, 0, 0};
  pomona::run_threads(
      static_cast<int>(min64(num_threads, num_items)), [](void* state, int) { static_cast<Items<F>*>(state)->take(); },
      &items);
}

// first(item) for all of the first kind, then second(item) for all of the second, in one go.
template <class F, class G>
void for_items_twice(int64_t num_first, int64_t num_second, int num_threads, const F& first, const G& second) {
  if (num_threads <= 1) {
    for (int64_t item = 0; item < num_first; item++) first(item);
    for (int64_t item = 0; item < num_second; item++) second(item);
    return;
  }
  struct Both {
    Items<F> first;
    Items<G> second;
  } both{{&first, num_first, 0, 0}, {&second, num_second, 0, 0}};
  pomona::run_threads(
      num_threads,
      [](void* state, int) {
        Both* both = static_cast<Both*>(state);
        both->first.take();
        both->first.wait();
        both->second.take();
      },
      &both);
}

// Small work is done by the caller alone: waking another thread costs about as much as this many cycles.
constexpr int64_t kThreadCycles = 8000;
INLINE int threads_for(int num_threads, int64_t cycles) { return cycles < kThreadCycles ? 1 : num_threads; }

}  // namespace
