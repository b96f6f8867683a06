#include "kernel.h"

#include <algorithm>

#include "../isa.h"

namespace tangentfast {
namespace {

constexpr int64_t kBlock = 512;  // a handful of blocks of doubles or floats stay in L1

template <class T>
TF_INLINE const T* at(const Rows& rows, int64_t row, int64_t column) {
  return static_cast<const T*>(rows.data) + row * rows.stride + column;
}

// a + b, either of which may be absent; null where both are.
template <class T, class Acc>
TF_INLINE const Acc* sum_of(const Rows& a, const Rows& b, int64_t row, int64_t column, int64_t n,
                            Acc* __restrict scratch) {
  if (!a.data && !b.data) return nullptr;
  if (!a.data) return widened(at<T>(b, row, column), n, scratch);
  if (!b.data) return widened(at<T>(a, row, column), n, scratch);
  const T* const left = at<T>(a, row, column);
  const T* const right = at<T>(b, row, column);
  for (int64_t i = 0; i < n; ++i) scratch[i] = load<Acc>(left[i]) + load<Acc>(right[i]);
  return scratch;
}

template <Activation kind, class Acc>
TF_INLINE void values_and_slopes(const Acc* x, int64_t n, Acc* __restrict value,
                                 Acc* __restrict slope) {
  for (int64_t i = 0; i < n; ++i) {
    const Dual<Acc> f = activation<kind>(x[i]);
    value[i] = f.value;
    slope[i] = f.slope;
  }
}

template <class Acc>
TF_INLINE void activate(Activation kind, const Acc* x, int64_t n, Acc* value, Acc* slope) {
  switch (kind) {
    case Activation::gelu: return values_and_slopes<Activation::gelu>(x, n, value, slope);
    case Activation::gelu_tanh:
      return values_and_slopes<Activation::gelu_tanh>(x, n, value, slope);
    case Activation::quick_gelu:
      return values_and_slopes<Activation::quick_gelu>(x, n, value, slope);
    case Activation::silu: return values_and_slopes<Activation::silu>(x, n, value, slope);
    case Activation::sigmoid: return values_and_slopes<Activation::sigmoid>(x, n, value, slope);
  }
}

template <class T, class Acc>
TF_INLINE void store_product(const Acc* a, const Acc* b, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) store(a[i] * b[i], out[i]);
}

// a b + c d
template <class T, class Acc>
TF_INLINE void store_products(const Acc* a, const Acc* b, const Acc* c, const Acc* d, int64_t n,
                              T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) store(a[i] * b[i] + c[i] * d[i], out[i]);
}

// n elements of one row from `column` on; `offset` is where they are in y.
template <class T, class Acc>
TF_INLINE void activation_block(const ActivationItem& item, int64_t row, int64_t column, int64_t n,
                                int64_t offset) {
  alignas(64) Acc value[kBlock], slope[kBlock], first[kBlock], second[kBlock];
  const Acc* const x = sum_of<T>(item.in.x, item.in.bias, row, column, n, first);
  activate(item.kind, x, n, value, slope);
  T* const y = static_cast<T*>(item.y) + offset;
  const Acc* const gate = sum_of<T>(item.in.gate, item.in.gate_bias, row, column, n, second);
  if (gate) {
    store_product(value, gate, n, y);
    for (int64_t i = 0; i < n; ++i) slope[i] *= gate[i];
  } else {
    for (int64_t i = 0; i < n; ++i) store(value[i], y[i]);
  }
  for (int64_t k = 0; k < item.count; ++k) {
    const ActivationInput& t = item.tangents[k].of;
    T* const dy = static_cast<T*>(item.tangents[k].dy) + offset;
    const Acc* const dx = sum_of<T>(t.x, t.bias, row, column, n, first);
    const Acc* const dgate = sum_of<T>(t.gate, t.gate_bias, row, column, n, second);
    if (dx && dgate) {
      store_products(slope, dx, value, dgate, n, dy);
    } else if (dx) {
      store_product(slope, dx, n, dy);
    } else if (dgate) {
      store_product(value, dgate, n, dy);
    } else {
      std::fill(dy, dy + n, T{});
    }
  }
}

template <class T, class Acc>
TF_INLINE void activation_range(const ActivationItem& item, int64_t begin, int64_t end) {
  int64_t row = begin / item.columns, column = begin % item.columns;
  for (int64_t i = begin, n = 0; i < end; i += n) {
    n = std::min({kBlock, end - i, item.columns - column});
    activation_block<T, Acc>(item, row, column, n, i);
    column += n;
    if (column == item.columns) column = 0, ++row;
  }
}

TF_INLINE void activation_body(const ActivationItem& item, int64_t begin, int64_t end) {
  switch (item.type) {
    case Type::f64: return activation_range<double, double>(item, begin, end);
    case Type::f32: return activation_range<float, float>(item, begin, end);
    case Type::f16: return activation_range<Half, float>(item, begin, end);
    case Type::bf16: return activation_range<BFloat16, float>(item, begin, end);
  }
}

}  // namespace

TF_DISPATCH(activation_jvp_kernel, activation_body,
            (const ActivationItem& item, int64_t begin, int64_t end), (item, begin, end))

}  // namespace tangentfast
