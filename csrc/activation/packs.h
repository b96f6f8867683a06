// What of an activation can be read 16 bytes at a time; nothing of CUDA, so that the CPU tests it.
#pragma once

#include "kernel.h"

namespace tangentfast::activation {

// How many elements from the first on can be read 16 bytes at a time.
inline int64_t whole_packs(const Item& item, int64_t numel) {
  const int size = size_of(item.type);
  uintptr_t low = 0;  // low bits of addresses and steps, together
  const auto note = [&](const Rows& in, void* out) {
    low |= reinterpret_cast<uintptr_t>(in.data) | reinterpret_cast<uintptr_t>(out);
    if (item.columns != numel) low |= static_cast<uintptr_t>(in.stride * size);
  };
  note(item.x, item.y);
  for (int64_t k = 0; k < item.count; ++k) note(item.tangents[k].dx, item.tangents[k].dy);
  const int pack = 16 / size;
  if (low % 16) return 0;
  if (item.columns == numel) return numel / pack * pack;
  return item.columns % pack ? 0 : numel;
}

}  // namespace tangentfast::activation
