// Blocks of tensors whose elements do not lie in the order of the base's.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernel.h"

namespace tangentfast {

template <bool back, class W>
TF_INLINE void move_line(W* data, int64_t step, W* block, int64_t block_step, int64_t n) {
  if (step == 1 && block_step == 1) {
    memcpy(back ? data : block, back ? block : data, n * sizeof(W));
  } else if (back) {
    for (int64_t i = 0; i < n; ++i) data[i * step] = block[i * block_step];
  } else {
    for (int64_t i = 0; i < n; ++i) block[i * block_step] = data[i * step];
  }
}

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
  const int64_t columns = item.sizes[last];
  for (W* words = static_cast<W*>(block); n > 0;) {
    W* const from = static_cast<W*>(data) + offset;
    int64_t rows = 1, run = std::min(n, columns - index[last]);
    if (last > 0 && run == columns) {  // short rows are moved column by column
      rows = std::min(n / columns, item.sizes[last - 1] - index[last - 1]);
    }
    if (rows > columns) {
      for (int64_t j = 0; j < run; ++j) {
        move_line<back>(from + j * step, strides[last - 1], words + j, columns, rows);
      }
    } else {
      rows = 1;
      move_line<back>(from, step, words, 1, run);
    }
    n -= rows * run;
    words += rows * run;
    if (rows > 1) {
      index[last - 1] += rows - 1;
      offset += (rows - 1) * strides[last - 1];
    }
    index[last] += run;
    offset += run * step;
    for (int64_t d = last; d > 0 && index[d] == item.sizes[d]; --d) {
      offset += strides[d - 1] - index[d] * strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Whether a tensor lies in the order of the item's sizes, without gaps; 0 is the base, 1 the first
// term, and so on.
inline bool in_order(const MergeItem& item, int64_t tensor) {
  const int64_t* const strides = item.strides + tensor * item.dims;
  int64_t step = 1;
  for (int64_t d = item.dims - 1; d >= 0; step *= item.sizes[d--]) {
    if (strides[d] != step) return false;
  }
  return true;
}

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
