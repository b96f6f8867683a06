// The merge and gram loops over raw memory: no torch, no threads, no allocation.
#pragma once

#include <cstdint>

#include "../scalar.h"

namespace tangentfast {

struct Term {
  const void* data;  // [numel], sharing no memory with the base
  Type type;
  double alpha;  // rounded to float when the accumulation is float
};

struct MergeItem {
  void* base;  // [numel]
  Type type;
  bool wide;  // accumulate in double: the base or a term is f64
  int64_t numel;
  const Term* terms;  // [count]
  int64_t count;
};

// base[i] <- round(base[i] + sum_k alpha_k terms[k][i]) for begin <= i < end.
void merge_kernel(const MergeItem& item, int64_t begin, int64_t end);

struct Vector {
  const void* data;  // [numel]
  Type type;
};

// Tensors of one shape whose inner products are wanted.
struct GramRow {
  size_t first;  // of its vectors
  int64_t count, numel;
};

// out[i * count + j] = sum over begin <= n < end of v_i[n] v_j[n] for j <= i, in double and in an
// order that depends on begin and end alone; the other entries of out stay as they are.
// scratch: [gram_scratch(count)] doubles.
void gram_kernel(const Vector* vectors, int64_t count, int64_t begin, int64_t end, double* scratch,
                 double* out);

int64_t gram_scratch(int64_t count);

}  // namespace tangentfast
