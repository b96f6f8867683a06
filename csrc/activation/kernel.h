// The loops of activations over raw memory: no torch, no threads, no allocation.
//   y = f(x)      dy = f'(x) dx
#pragma once

#include <cstdint>

#include "formula.h"

namespace tangentfast::activation {

// [rows, columns] of numbers, contiguous within a row.
struct Rows {
  const void* data;
  int64_t stride;
};

struct Tangent {
  Rows dx;
  void* dy;  // [rows * columns]
};

struct Item {
  Type type;  // of everything
  Activation kind;
  int64_t columns;
  Rows x;
  void* y;  // [rows * columns]
  const Tangent* tangents;
  int64_t count;
};

// Elements begin <= i < end of rows * columns.
void activation_jvp_kernel(const Item& item, int64_t begin, int64_t end);

}  // namespace tangentfast::activation
