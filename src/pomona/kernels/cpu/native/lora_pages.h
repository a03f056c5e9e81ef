// Where a site's part of an adapter page lies: A and B of every slice, side by side. Included by isa.cpp only.
#pragma once
#include "api.h"
#include "vec.h"

namespace {

struct SitePages {
  const char* first_byte;  // of page 0
  int64_t page_bytes, num_bytes;

  SitePages(const pomona::LoraSite& site, int64_t element_bytes) {
    const char *low = static_cast<const char*>(site.a[0]), *high = low;
    for (int64_t i = 0; i < site.num_slices; i++) {
      const char *a = static_cast<const char*>(site.a[i]), *b = static_cast<const char*>(site.b[i]);
      low = a < low ? a : low;
      low = b < low ? b : low;
      const char* a_end = a + site.rows_per_page * site.in_features * element_bytes;
      const char* b_end = b + site.rows_per_page * site.out_features[i] * element_bytes;
      high = a_end > high ? a_end : high;
      high = b_end > high ? b_end : high;
    }
    first_byte = low;
    page_bytes = site.a_page_stride[0] * element_bytes;
    num_bytes = high - low;
  }
};

// A byte of the page at `index` of a step's page tables, where it is to be read. That may be outside the pool, where
// arithmetic on a pointer into the pool is not defined: hence as a number, of which nothing is assumed.
inline const char* shifted(const pomona::LoraStep& step, int64_t index, const char* byte) {
  if (step.page_shifts == nullptr) return byte;
  return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(byte) + step.page_shifts[index]);
}

}  // namespace
