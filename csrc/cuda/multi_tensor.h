// Work on many tensors in few launches: which tensors go together, and what a block does of them.
// Nothing of CUDA is needed here, so that the tests on the CPU cover it.
//
// The tables travel by value, as kernel parameters: no allocation, no copy, no lifetime to mind, and
// a CUDA graph keeps its own. 32,764 bytes since CUDA 12.1, on every GPU that this torch supports;
// about 180 tensors of 8 vectors each, so two or three launches for a large vision transformer.
#pragma once

#include <cstdint>

#include "../scalar.h"

namespace tangentfast {

constexpr size_t kParameterBytes = 32764;
constexpr int kAccessBytes = 16;  // the widest load of a thread

// The first element, of `width`, from which on all of an item's tensors can be read `width` elements
// at a time; -1 where their alignments differ.
template <class Addresses>
int aligned_from(const Addresses& addresses, int64_t count, int width) {
  for (int head = 0; head < width; ++head) {
    bool aligned = true;
    for (int64_t k = 0; k < count; ++k) {
      const auto [data, type] = addresses(k);
      const uintptr_t at = reinterpret_cast<uintptr_t>(data) + head * size_of(type);
      aligned = aligned && at % (width * size_of(type)) == 0;
    }
    if (aligned) return head;
  }
  return -1;
}

inline int64_t chunks_of(int64_t numel, int64_t chunk) { return (numel + chunk - 1) / chunk; }

// The last entry that begins at or before `chunk`; entries[0].first_chunk is 0.
template <class Entry>
TF_INLINE int entry_of(const Entry* entries, int count, int64_t chunk) {
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) / 2;
    if (entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// A chunk [begin, end) of an item, of which [from, to) is read in whole steps of `width`.
struct Span {
  int64_t begin, from, to, end;
};

// Chunk `index` of `numel` elements. The boundaries are at head + index * chunk, where chunk is a
// multiple of width, so that every chunk is aligned; the first one takes the head along.
TF_INLINE Span span_of(int64_t numel, int head, int width, int64_t chunk, int64_t index) {
  Span span;
  const int64_t from = head + index * chunk, end = from + chunk;
  span.begin = index ? from : 0;
  span.end = end < numel ? end : numel;
  span.from = from < span.end ? from : span.end;
  span.to = span.from + (span.end - span.from) / width * width;
  return span;
}

}  // namespace tangentfast
