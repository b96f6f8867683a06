// The loops of activations over raw memory: no torch, no threads, no allocation.
//   y = f(x + b) (g + c)      dy = f'(x + b) (g + c) (dx + db) + f(x + b) (dg + dc)
// where the gate g + c is optional, and b, c are biases, one row for all.
#pragma once

#include <cstdint>

#include "formula.h"

namespace tangentfast {

// [rows, columns] of numbers, contiguous within a row; the same row for all when the stride is 0.
struct Rows {
  const void* data;  // null where absent
  int64_t stride;
};

struct ActivationInput {
  Rows x, bias, gate, gate_bias;
};

struct ActivationTangent {
  ActivationInput of;  // dx, dbias, dgate, dgate_bias
  void* dy;            // [rows * columns]
};

struct ActivationItem {
  Type type;  // of everything
  Activation kind;
  int64_t columns;
  ActivationInput in;
  void* y;  // [rows * columns]
  const ActivationTangent* tangents;
  int64_t count;
};

// Elements begin <= i < end of rows * columns.
void activation_jvp_kernel(const ActivationItem& item, int64_t begin, int64_t end);

}  // namespace tangentfast
