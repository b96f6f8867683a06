// The layer-norm and RMS-norm loops over raw memory: no torch, no threads, no allocation.
#pragma once

#include <cstdint>

#include "../scalar.h"

namespace tangentfast::layer_norm {

// Rows are contiguous and stored as `Item::type`; statistics are double when that is f64 and
// float otherwise.
struct Tangent {
  const void* dx;       // [rows, size] or null
  const void* dweight;  // [size] or null
  const void* dbias;    // [size] or null
  void* dy;             // [rows, size]
};

struct Item {
  Type type;
  Type weights;   // of weight, bias, dweight, dbias: as statistics, or on a GPU as `type`
  bool centered;  // layer norm; RMS norm otherwise
  int64_t size;
  double eps;
  const void* x;       // [rows, size]
  const void* weight;  // [size], ones where the layer has none; null on a GPU
  const void* bias;    // [size], zeros where the layer has none; null on a GPU
  void* y;             // [rows, size]
  void* mean;          // [rows], null for RMS norm
  void* rstd;          // [rows]
  const Tangent* tangents;
  int64_t count;
};

// Rows begin <= r < end. scratch: 2 * size floats or doubles.
void norm_jvp_kernel(const Item& item, int64_t begin, int64_t end, void* scratch);

}  // namespace tangentfast::layer_norm
