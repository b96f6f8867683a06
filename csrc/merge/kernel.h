// The merge and gram loops over raw memory: no torch, no threads, no allocation.
#pragma once

#include <cstdint>

#include "../scalar.h"

namespace tangentfast {

struct Term {
  const void* data;  // [numel], sharing no memory with the base
  Type type;
  double alpha;  // rounded to float when the sum is a float
};

enum class Sum : int32_t { f32, f64, twice };  // see formula.h

// The sum for a base and terms of these types.
inline Sum sum_of(Type base, const Term* terms, int64_t count) {
  if (base == Type::f64) return Sum::twice;
  bool half = size_of(base) == 2;
  for (int64_t k = 0; half && k < count; ++k) half = size_of(terms[k].type) == 2;
  return half ? Sum::f32 : Sum::f64;
}

struct MergeItem {
  void* base;  // [numel]
  Type type;
  Sum sum;
  int64_t numel;
  const Term* terms;  // [count]
  int64_t count;
  // Elements lie one after the other, in one order in all tensors, when dims is 0. Else element
  // (i_0, i_1, ...) of sizes [dims] lies at the inner product with strides [1 + count][dims], of the
  // base and then of each term.
  int64_t dims;
  const int64_t *sizes, *strides;
};

constexpr int64_t kMostDims = 64;  // of a tensor

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
