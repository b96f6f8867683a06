#include "kernel.h"

#include <algorithm>

#include "../isa.h"
#include "formula.h"

namespace tangentfast {
namespace {

// One block of accumulators and one of the vector being added stay in a 32 KB L1 cache.
constexpr int64_t kBlock = 2048;
constexpr int kLanes = 16;  // fixed whatever the ISA, so that the sums have one order
constexpr int64_t kGramBlock = 256;  // 8 vectors of 2 KB: half of L1 (512 is twice as slow)

template <class V, class Acc>
TF_INLINE void load_block(const void* data, int64_t begin, int64_t n, Acc* acc) {
  const V* v = static_cast<const V*>(data) + begin;
  for (int64_t i = 0; i < n; ++i) acc[i] = load<Acc>(v[i]);
}

// `width` terms of one type, added in their order. Memory runs at full speed only when several
// streams are read at once: eight make the whole merge twice as fast as one after the other.
template <int width, class V, class Acc>
TF_INLINE void axpy_terms(const Term* terms, int64_t begin, int64_t n, Acc* __restrict acc) {
  const V* v[width];
  Acc alpha[width];
  for (int k = 0; k < width; ++k) {
    v[k] = static_cast<const V*>(terms[k].data) + begin;
    alpha[k] = static_cast<Acc>(terms[k].alpha);
  }
  for (int64_t i = 0; i < n; ++i) {
    Acc sum = acc[i];
    for (int k = 0; k < width; ++k) sum = axpy(sum, alpha[k], load<Acc>(v[k][i]));
    acc[i] = sum;
  }
}

template <class V, class Acc>
TF_INLINE void axpy_block(const Term* terms, int64_t count, int64_t begin, int64_t n, Acc* acc) {
  for (; count >= 8; terms += 8, count -= 8) axpy_terms<8, V>(terms, begin, n, acc);
  if (count & 4) axpy_terms<4, V>(terms, begin, n, acc), terms += 4;
  if (count & 2) axpy_terms<2, V>(terms, begin, n, acc), terms += 2;
  if (count & 1) axpy_terms<1, V>(terms, begin, n, acc);
}

// How many terms from the first on have its type.
TF_INLINE int64_t run_length(const Term* terms, int64_t count) {
  int64_t length = 1;
  while (length < count && terms[length].type == terms[0].type) ++length;
  return length;
}

template <class V, class Acc>
TF_INLINE void store_block(const Acc* acc, void* data, int64_t begin, int64_t n) {
  V* v = static_cast<V*>(data) + begin;
  for (int64_t i = 0; i < n; ++i) store(acc[i], v[i]);
}

// A lambda would not inherit the target attribute of the function it is written in.
#define TF_SWITCH(type, function, ...)                            \
  switch (type) {                                                 \
    case Type::f64: function<double>(__VA_ARGS__); break;         \
    case Type::f32: function<float>(__VA_ARGS__); break;          \
    case Type::f16: function<Half>(__VA_ARGS__); break;           \
    case Type::bf16: function<BFloat16>(__VA_ARGS__); break;      \
  }

template <class Acc>
TF_INLINE void add_terms(const MergeItem& item, int64_t at, int64_t n, Acc* acc) {
  for (int64_t k = 0, run = 0; k < item.count; k += run) {
    const Term* terms = item.terms + k;
    run = run_length(terms, item.count - k);
    TF_SWITCH(terms->type, axpy_block, terms, run, at, n, acc)
  }
}

template <class Acc>
TF_INLINE void merge_range(const MergeItem& item, Type acc_type, int64_t begin, int64_t end) {
  alignas(64) Acc acc[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    if (item.type == acc_type) {  // the base is its own accumulator: a tenth faster
      add_terms(item, at, n, static_cast<Acc*>(item.base) + at);
      continue;
    }
    TF_SWITCH(item.type, load_block, item.base, at, n, acc)
    add_terms(item, at, n, acc);
    TF_SWITCH(item.type, store_block, acc, item.base, at, n)
  }
}

TF_INLINE void merge_body(const MergeItem& item, int64_t begin, int64_t end) {
  if (item.wide) {
    merge_range<double>(item, Type::f64, begin, end);
  } else {
    merge_range<float>(item, Type::f32, begin, end);
  }
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

TF_DISPATCH(merge_kernel, merge_body, (const MergeItem& item, int64_t begin, int64_t end),
            (item, begin, end))

TF_DISPATCH(gram_kernel, gram_body,
            (const Vector* vectors, int64_t count, int64_t begin, int64_t end, double* scratch,
             double* out),
            (vectors, count, begin, end, scratch, out))

}  // namespace tangentfast
