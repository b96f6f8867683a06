#include "kernel.h"

#include <algorithm>

#include "../isa.h"

namespace tangentfast::activation {
namespace {

constexpr int64_t kBlock = 512;  // a handful of blocks of doubles or floats stay in L1

template <Activation kind, bool narrow, class Acc>
TF_INLINE void values_and_slopes(const Acc* x, int64_t n, Acc* __restrict value,
                                 Acc* __restrict slope) {
  for (int64_t i = 0; i < n; ++i) {
    const Dual<Acc> f = value_and_slope<kind, narrow>(x[i]);
    value[i] = f.value;
    slope[i] = f.slope;
  }
}

template <bool narrow, class Acc>
TF_INLINE void activate(Activation kind, const Acc* x, int64_t n, Acc* value, Acc* slope) {
  switch (kind) {
    case Activation::gelu: return values_and_slopes<Activation::gelu, narrow>(x, n, value, slope);
    case Activation::gelu_tanh:
      return values_and_slopes<Activation::gelu_tanh, narrow>(x, n, value, slope);
    case Activation::silu: return values_and_slopes<Activation::silu, narrow>(x, n, value, slope);
  }
}

template <class T, class Acc>
TF_INLINE const Acc* read(const Rows& rows, int64_t row, int64_t column, int64_t n, Acc* scratch) {
  return widened(static_cast<const T*>(rows.data) + row * rows.stride + column, n, scratch);
}

// n elements of one row from `column` on; `offset` is where they are in y.
template <class T, class Acc>
TF_INLINE void activation_block(const Item& item, int64_t row, int64_t column, int64_t n,
                                int64_t offset) {
  alignas(64) Acc value[kBlock], slope[kBlock], scratch[kBlock];
  activate<sizeof(T) == 2>(item.kind, read<T>(item.x, row, column, n, scratch), n, value, slope);
  T* __restrict const y = static_cast<T*>(item.y) + offset;
  for (int64_t i = 0; i < n; ++i) store(value[i], y[i]);
  for (int64_t k = 0; k < item.count; ++k) {
    const Acc* const dx = read<T>(item.tangents[k].dx, row, column, n, scratch);
    T* __restrict const dy = static_cast<T*>(item.tangents[k].dy) + offset;
    for (int64_t i = 0; i < n; ++i) store(slope[i] * dx[i], dy[i]);
  }
}

template <class T, class Acc>
TF_INLINE void activation_range(const Item& item, int64_t begin, int64_t end) {
  int64_t row = begin / item.columns, column = begin % item.columns;
  for (int64_t i = begin, n = 0; i < end; i += n) {
    n = std::min({kBlock, end - i, item.columns - column});
    activation_block<T, Acc>(item, row, column, n, i);
    column += n;
    if (column == item.columns) column = 0, ++row;
  }
}

TF_INLINE void activation_body(const Item& item, int64_t begin, int64_t end) {
  switch (item.type) {
    case Type::f64: return activation_range<double, double>(item, begin, end);
    case Type::f32: return activation_range<float, float>(item, begin, end);
    case Type::f16: return activation_range<Half, float>(item, begin, end);
    case Type::bf16: return activation_range<BFloat16, float>(item, begin, end);
  }
}

}  // namespace

TF_DISPATCH(activation_jvp_kernel, activation_body,
            (const Item& item, int64_t begin, int64_t end), (item, begin, end))

}  // namespace tangentfast::activation
