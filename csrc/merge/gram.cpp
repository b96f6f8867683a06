#include "kernel.h"

#include <algorithm>

#include "../isa.h"
#include "formula.h"

namespace tangentfast {
namespace {

constexpr int kLanes = 16;  // fixed whatever the ISA, so that the sums have one order
constexpr int64_t kGramBlock = 256;  // 8 vectors of 2 KB: half of L1 (512 is twice as slow)

template <class V>
TF_INLINE void load_block(const void* data, int64_t begin, int64_t n, double* row) {
  const V* v = static_cast<const V*>(data) + begin;
  for (int64_t i = 0; i < n; ++i) row[i] = load<double>(v[i]);
}

// A lambda would not inherit the target attribute of the function it is written in.
#define TF_SWITCH(type, function, ...)                            \
  switch (type) {                                                 \
    case Type::f64: function<double>(__VA_ARGS__); break;         \
    case Type::f32: function<float>(__VA_ARGS__); break;          \
    case Type::f16: function<Half>(__VA_ARGS__); break;           \
    case Type::bf16: function<BFloat16>(__VA_ARGS__); break;      \
  }

// sum[l] += sum over p of x[p + l] y[p + l], p = 0, kLanes, 2 kLanes, ... < n.
TF_INLINE void dot_lanes(const double* x, const double* y, int n, double* sum) {
  double lane[kLanes];  // a copy that nothing aliases, hence registers
  for (int l = 0; l < kLanes; ++l) lane[l] = sum[l];
  for (int p = 0; p < n; p += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] = axpy(lane[l], x[p + l], y[p + l]);
  }
  for (int l = 0; l < kLanes; ++l) sum[l] = lane[l];
}

TF_INLINE void gram_body(const Vector* vectors, int64_t count, int64_t begin, int64_t end,
                         double* scratch, double* out) {
  double* sums = scratch;  // [count (count + 1) / 2, kLanes]
  double* block = scratch + count * (count + 1) / 2 * kLanes;  // [count, kGramBlock]
  std::fill(sums, block, 0.0);
  for (int64_t at = begin; at < end; at += kGramBlock) {
    const int64_t n = std::min(kGramBlock, end - at);
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    double* sum = sums;
    for (int64_t i = 0; i < count; ++i) {
      double* row = block + i * kGramBlock;
      TF_SWITCH(vectors[i].type, load_block, vectors[i].data, at, n, row)
      std::fill(row + n, row + padded, 0.0);
      for (int64_t j = 0; j <= i; ++j, sum += kLanes) {
        dot_lanes(row, block + j * kGramBlock, padded, sum);
      }
    }
  }
  const double* sum = sums;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j <= i; ++j, sum += kLanes) {
      double total = 0;
      for (int64_t l = 0; l < kLanes; ++l) total += sum[l];
      out[i * count + j] = total;
    }
  }
}

#undef TF_SWITCH

}  // namespace

int64_t gram_scratch(int64_t count) {
  return count * (count + 1) / 2 * kLanes + count * kGramBlock;
}

TF_DISPATCH(gram_kernel, gram_body,
            (const Vector* vectors, int64_t count, int64_t begin, int64_t end, double* scratch,
             double* out),
            (vectors, count, begin, end, scratch, out))

}  // namespace tangentfast
