// Threads and scratch memory. Kernels run on the OpenMP threads that torch already keeps: the address of GOMP_parallel
// in torch's own runtime is handed in at start-up, so that there is one pool of threads in the process and never two
// that spin against each other on the same cores. Without that address everything runs on the calling thread.
#include <stdlib.h>
#include <string.h>

#include "api.h"

namespace pomona {

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

struct Region {
  Body body;
  void* state;
  int next_thread;
};

void enter(void* data) {
  Region* region = static_cast<Region*>(data);
  region->body(region->state, __atomic_fetch_add(&region->next_thread, 1, __ATOMIC_RELAXED));
}

struct Buffer {
  void* data = nullptr;
  int64_t num_bytes = 0;
  ~Buffer() { free(data); }
};

thread_local Buffer buffers[kNumPurposes + 1];

void reserve(Buffer& buffer, int64_t num_bytes) {
  free(buffer.data);
  buffer.num_bytes = (num_bytes + num_bytes / 2 + 4095) / 4096 * 4096;
  buffer.data = aligned_alloc(64, static_cast<size_t>(buffer.num_bytes));
  if (buffer.data == nullptr) abort();
}

}  // namespace

void run_threads(int num_threads, Body body, void* state) {
  Region region{body, state, 0};
  if (num_threads <= 1 || gomp_parallel == nullptr)
    enter(&region);
  else
    gomp_parallel(enter, &region, static_cast<unsigned>(num_threads), 0);
}

void* scratch(Purpose purpose, int64_t num_bytes) {
  Buffer& buffer = buffers[purpose];
  if (buffer.num_bytes < num_bytes) reserve(buffer, num_bytes);
  return buffer.data;
}

const void* zeros(int64_t num_bytes) {
  Buffer& buffer = buffers[kNumPurposes];
  if (buffer.num_bytes < num_bytes) {
    reserve(buffer, num_bytes);
    memset(buffer.data, 0, static_cast<size_t>(buffer.num_bytes));
  }
  return buffer.data;
}

}  // namespace pomona

extern "C" __attribute__((visibility("default"))) void pomona_use_gomp(void* parallel) {
  pomona::gomp_parallel = reinterpret_cast<pomona::GompParallel>(parallel);
}
