// Blocks of tensors whose elements do not lie in the order of the base's.
#pragma once

#include <algorithm>

#include "kernel.h"

namespace tangentfast {

// Elements [at, at + n) of a tensor of words, in the order of the item's sizes: into `block`, or
// `back` from there.
template <bool back, class W>
TF_INLINE void move_words(const MergeItem& item, const int64_t* strides, void* data, int64_t at,
                          int64_t n, void* block) {
  const int64_t last = item.dims - 1, step = strides[last];
  int64_t index[kMostDims], offset = 0;
  for (int64_t d = last; d >= 0; --d) {
    index[d] = at % item.sizes[d];
    at /= item.sizes[d];
    offset += index[d] * strides[d];
  }
  for (W* words = static_cast<W*>(block); n > 0;) {
    const int64_t run = std::min(n, item.sizes[last] - index[last]);
    W* const row = static_cast<W*>(data) + offset;
    if (back) {
      for (int64_t i = 0; i < run; ++i) row[i * step] = words[i];
    } else {
      for (int64_t i = 0; i < run; ++i) words[i] = row[i * step];
    }
    n -= run;
    words += run;
    index[last] += run;
    offset += run * step;
    for (int64_t d = last; d > 0 && index[d] == item.sizes[d]; --d) {
      offset += strides[d - 1] - index[d] * strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Tensor 0 is the base, 1 the first term, and so on.
template <bool back>
TF_INLINE void move_block(const MergeItem& item, int64_t tensor, int64_t at, int64_t n, void* block) {
  const Type type = tensor ? item.terms[tensor - 1].type : item.type;
  void* const data = tensor ? const_cast<void*>(item.terms[tensor - 1].data) : item.base;
  const int64_t* const strides = item.strides + tensor * item.dims;
  switch (size_of(type)) {
    case 8: return move_words<back, uint64_t>(item, strides, data, at, n, block);
    case 4: return move_words<back, uint32_t>(item, strides, data, at, n, block);
    default: return move_words<back, uint16_t>(item, strides, data, at, n, block);
  }
}

}  // namespace tangentfast
