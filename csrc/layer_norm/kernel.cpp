#include "kernel.h"

#include "../isa.h"
#include "formula.h"

namespace tangentfast::layer_norm {
namespace {

// Lanes of a sum, fixed whatever the ISA, so that sums have one order; 128 bytes hide the latency
// of addition on all of them.
template <class Acc>
constexpr int kLanes = 128 / sizeof(Acc);

template <class Acc>
struct Sums {
  Acc a, ab;
};

template <int lanes, class Acc>
TF_INLINE Acc fold(Acc* lane) {
  for (int l = 0; l < lanes / 2; ++l) lane[l] += lane[l + lanes / 2];
  if constexpr (lanes > 2) fold<lanes / 2>(lane);
  return lane[0];
}

// What is summed over a row: first(i) and first(i) second(i).
template <class Acc>
struct Deviations {
  const Acc* x;
  Acc from;
  TF_INLINE Acc first(int64_t i) const { return x[i] - from; }
  TF_INLINE Acc second(int64_t i) const { return x[i] - from; }
};

template <class Acc>
struct Pairs {
  const Acc *a, *b;
  TF_INLINE Acc first(int64_t i) const { return a[i]; }
  TF_INLINE Acc second(int64_t i) const { return b[i]; }
};

template <class Acc, class Terms>
TF_INLINE Sums<Acc> row_sums(const Terms& terms, int64_t n) {
  constexpr int lanes = kLanes<Acc>;
  Acc sum[lanes], dot[lanes];
  for (int l = 0; l < lanes; ++l) sum[l] = dot[l] = 0;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int l = 0; l < lanes; ++l) {
      sum[l] += terms.first(i + l);
      dot[l] += terms.first(i + l) * terms.second(i + l);
    }
  }
  for (int l = 0; i + l < n; ++l) {
    sum[l] += terms.first(i + l);
    dot[l] += terms.first(i + l) * terms.second(i + l);
  }
  return {fold<lanes>(sum), fold<lanes>(dot)};
}

template <class Acc>
TF_INLINE Acc row_sum(const Acc* x, int64_t n) {
  constexpr int lanes = kLanes<Acc>;
  Acc sum[lanes];
  for (int l = 0; l < lanes; ++l) sum[l] = 0;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int l = 0; l < lanes; ++l) sum[l] += x[i + l];
  }
  for (int l = 0; i + l < n; ++l) sum[l] += x[i + l];
  return fold<lanes>(sum);
}

template <class T>
TF_INLINE const T* at(const void* data, int64_t offset) {
  return static_cast<const T*>(data) + offset;
}

template <class T>
TF_INLINE T* at(void* data, int64_t offset) {
  return static_cast<T*>(data) + offset;
}

template <class Acc>
TF_INLINE Statistics<Acc> statistics(const Acc* x, int64_t n, bool centered, Acc eps) {
  const Acc near = centered ? row_sum(x, n) / n : 0;
  const Sums<Acc> sums = row_sums<Acc>(Deviations<Acc>{x, near}, n);
  return norm_statistics(near, sums.a, sums.ab, n, centered, eps);
}

template <class T, class Acc>
TF_INLINE void value_row(const Acc* x, const Statistics<Acc>& s, const Acc* w, const Acc* b,
                         int64_t n, Acc* __restrict x_hat, T* __restrict y) {
  for (int64_t i = 0; i < n; ++i) {
    x_hat[i] = normalized(x[i], s);
    store(norm_value(x_hat[i], w[i], b[i]), y[i]);
  }
}

template <int terms, class T, class Acc>
TF_INLINE void tangent_row(const Acc* dx, Acc mean_dx, Acc along, const Acc* x_hat, Acc rstd,
                           const Acc* w, const Acc* dw, const Acc* db, int64_t n,
                           T* __restrict dy) {
  for (int64_t i = 0; i < n; ++i) {
    store(norm_tangent(terms, terms & kFromInput ? dx[i] : 0, mean_dx, along, x_hat[i], rstd, w[i],
                       terms & kFromWeight ? dw[i] : 0, terms & kFromBias ? db[i] : 0),
          dy[i]);
  }
}

template <class T, class Acc>
TF_INLINE void norm_rows(const Item& item, int64_t begin, int64_t end, Acc* scratch) {
  const int64_t n = item.size;
  Acc* const x_hat = scratch;
  Acc* const wide = scratch + n;
  const Acc* const w = at<Acc>(item.weight, 0);
  const Acc* const b = at<Acc>(item.bias, 0);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = row * n;
    const Acc* const x = widened(at<T>(item.x, offset), n, wide);
    const Statistics<Acc> s = statistics(x, n, item.centered, static_cast<Acc>(item.eps));
    if (item.mean) *at<Acc>(item.mean, row) = s.near + s.rest;
    *at<Acc>(item.rstd, row) = s.rstd;
    value_row(x, s, w, b, n, x_hat, at<T>(item.y, offset));

    for (int64_t k = 0; k < item.count; ++k) {
      const Tangent& t = item.tangents[k];
      const Acc* const dw = at<Acc>(t.dweight, 0);
      const Acc* const db = at<Acc>(t.dbias, 0);
      T* const dy = at<T>(t.dy, offset);
      const Acc* dx = nullptr;
      Acc mean_dx = 0, along = 0;
      if (t.dx) {
        dx = widened(at<T>(t.dx, offset), n, wide);
        const Sums<Acc> sums = row_sums<Acc>(Pairs<Acc>{dx, x_hat}, n);
        if (item.centered) mean_dx = sums.a / n;
        along = sums.ab / n;
      }
#define TF_TANGENT_ROW(terms) \
  case terms: tangent_row<terms>(dx, mean_dx, along, x_hat, s.rstd, w, dw, db, n, dy); break;
      switch ((dx ? kFromInput : 0) | (dw ? kFromWeight : 0) | (db ? kFromBias : 0)) {
        TF_TANGENT_ROW(0)
        TF_TANGENT_ROW(1)
        TF_TANGENT_ROW(2)
        TF_TANGENT_ROW(3)
        TF_TANGENT_ROW(4)
        TF_TANGENT_ROW(5)
        TF_TANGENT_ROW(6)
        TF_TANGENT_ROW(7)
      }
#undef TF_TANGENT_ROW
    }
  }
}

TF_INLINE void norm_body(const Item& item, int64_t begin, int64_t end, void* scratch) {
  switch (item.type) {
    case Type::f64: return norm_rows<double>(item, begin, end, static_cast<double*>(scratch));
    case Type::f32: return norm_rows<float>(item, begin, end, static_cast<float*>(scratch));
    case Type::f16: return norm_rows<Half>(item, begin, end, static_cast<float*>(scratch));
    case Type::bf16: return norm_rows<BFloat16>(item, begin, end, static_cast<float*>(scratch));
  }
}

}  // namespace

TF_DISPATCH(norm_jvp_kernel, norm_body,
            (const Item& item, int64_t begin, int64_t end, void* scratch),
            (item, begin, end, scratch))

}  // namespace tangentfast::layer_norm
