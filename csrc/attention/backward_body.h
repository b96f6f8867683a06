// attention_backward_kernel for one instruction set; see each_isa.h.
#include "../vector.h"
#include "rows.h"

template <class T, class A>
struct BackwardScratch {
  using Kind = KindOf<T, A>;

  A *q, *grad, *p, *ds, *out;           // one block
  A *q_panels, *grad_panels;            // the same rows as right operands
  NumberOf<Kind> *k_turned, *v_turned;  // one head, as it is multiplied with rows
  A *k, *dk, *dv;
  int64_t bytes;

  BackwardScratch(const AttentionBackward& c, void* memory) {
    const int64_t rows = block_rows(c.keys), keys = padded<A>(c.keys);
    const int64_t depth = padded<A>(c.depth), values = padded<A>(c.value_depth);
    Parts parts{static_cast<char*>(memory)};
    const auto steps = [](int64_t n) { return (n + Kind::numbers - 1) / Kind::numbers; };
    parts.take(q, rows * c.depth + rows);  // and a zero for pairs of an odd depth
    parts.take(grad, rows * c.value_depth + rows);
    parts.take(p, rows * keys);
    parts.take(ds, rows * keys);
    parts.take(out, rows * depth);
    parts.take(q_panels, rows * depth);
    parts.take(grad_panels, rows * values);
    parts.take(k_turned, keys * steps(c.depth));
    parts.take(v_turned, keys * steps(c.value_depth));
    parts.take(k, depth * c.keys);
    parts.take(dk, c.keys * depth);
    parts.take(dv, c.keys * values);
    bytes = parts.bytes;
  }
};

// Sum of the products of two rows.
template <class A, class T>
static inline A dot(int64_t n, const T* x, const T* y) {
  constexpr int lanes = Lanes<A>::count;
  Vec<A> sums{};
  int64_t p = 0;
  for (; p + lanes <= n; p += lanes) {
    sums = madd(widen_vector<A>(x + p), widen_vector<A>(y + p), sums);
  }
  A sum = sum_lanes<A>(sums);
  for (; p < n; ++p) sum += load<A>(x[p]) * load<A>(y[p]);
  return sum;
}

// p <- exp(p - lse) in its first `seen` entries and 0 behind; ds <- scale p (ds - delta).
template <class A>
static inline void softmax_row_backward(A* p, A* ds, A lse, A delta, A scale, int64_t seen,
                                        int64_t width) {
  constexpr int lanes = Lanes<A>::count;
  for (int64_t j = seen; j < width; ++j) p[j] = -__builtin_inf();
  for (int64_t j = 0; j < width; j += lanes) {
    const Vec<A> e = exp_nonpositive(load_vector(p + j) - lse);
    store_vector(p + j, e);
    store_vector(ds + j, scale * e * (load_vector(ds + j) - delta));
  }
}

template <class T, class A>
static void run(const AttentionBackward& c, int64_t n, int64_t g, void* memory) {
  using Kind = KindOf<T, A>;
  const BackwardScratch<T, A> s(c, memory);
  const int64_t step = block_rows(c.keys), depth = padded<A>(c.depth);
  const int64_t values = padded<A>(c.value_depth);
  const A scale = static_cast<A>(c.scale);
  pack_lines<Kind, kPanel<A>>(c.keys, c.depth, at<T>(c.k, n, g, 0), c.k.row, 1, s.k_turned);
  pack_lines<Kind, kPanel<A>>(c.keys, c.value_depth, at<T>(c.v, n, g, 0), c.v.row, 1, s.v_turned);
  pack_lines<Whole<A>, kPanel<A>>(c.depth, c.keys, at<T>(c.k, n, g, 0), 1, c.k.row, s.k);
  for (int64_t i = 0; i < c.keys * depth; ++i) s.dk[i] = 0;
  for (int64_t i = 0; i < c.keys * values; ++i) s.dv[i] = 0;
  for (int64_t h = g * c.group; h < (g + 1) * c.group; ++h) {
    for (int64_t first = 0; first < c.queries; first += step) {
      const int64_t rows = c.queries - first < step ? c.queries - first : step;
      const int64_t seen = c.causal && first + rows < c.keys ? first + rows : c.keys;
      const int64_t width = padded<A>(seen);
      const T *const q = at<T>(c.q, n, h, first), *const grad = at<T>(c.grad, n, h, first);
      const auto q_rows = rows_of(rows, c.depth, q, c.q.row, s.q);
      const auto grad_rows = rows_of(rows, c.value_depth, grad, c.grad.row, s.grad);
      multiply_rows<Kind>(rows, seen, c.depth, q_rows, s.k_turned, s.p, width, false);
      multiply_rows<Kind>(rows, seen, c.value_depth, grad_rows, s.v_turned, s.ds, width, false);
      for (int64_t i = 0; i < rows; ++i) {
        A* const row = s.p + i * width;
        const int64_t own = c.causal && first + i + 1 < seen ? first + i + 1 : seen;
        scale_add(own, scale, c.mask.data ? at<A>(c.mask, n, h, first + i) : nullptr, c.mask_column,
                  row);
        prefetch<T>(c.q, n, h + 1, first + i, c.depth);
        prefetch<T>(c.k, n, g + 1, first + i, c.depth);
        prefetch<T>(c.v, n, g + 1, first + i, c.value_depth);
        prefetch<T>(c.grad, n, h + 1, first + i, c.value_depth);
        prefetch<T>(c.o, n, h + 1, first + i, c.value_depth);
        const A delta = dot<A>(c.value_depth, at<T>(c.o, n, h, first + i), grad + i * c.grad.row);
        softmax_row_backward(row, s.ds + i * width, *at<A>(c.lse, n, h, first + i), delta, scale,
                             own, width);
      }
      pack_lines<Whole<A>, kPanel<A>>(c.value_depth, rows, grad, 1, c.grad.row, s.grad_panels);
      multiply<Whole<A>, true>(seen, c.value_depth, rows, s.p, width, s.grad_panels,
                               rows * kPanel<A>, s.dv, values, true);
      pack_lines<Whole<A>, kPanel<A>>(c.depth, rows, q, 1, c.q.row, s.q_panels);
      multiply<Whole<A>, true>(seen, c.depth, rows, s.ds, width, s.q_panels, rows * kPanel<A>, s.dk,
                               depth, true);
      multiply<Whole<A>>(rows, c.depth, seen, s.ds, width, s.k, c.keys * kPanel<A>, s.out, depth,
                         false);
      narrow(rows, c.depth, s.out, depth, const_cast<T*>(at<T>(c.dq, n, h, first)), c.dq.row);
    }
  }
  narrow(c.keys, c.depth, s.dk, depth, const_cast<T*>(at<T>(c.dk, n, g, 0)), c.dk.row);
  narrow(c.keys, c.value_depth, s.dv, values, const_cast<T*>(at<T>(c.dv, n, g, 0)), c.dv.row);
}

static int64_t scratch_bytes(const AttentionBackward& c) {
  switch (c.type) {
    case Type::f64: return BackwardScratch<double, double>(c, nullptr).bytes;
    case Type::f32: return BackwardScratch<float, float>(c, nullptr).bytes;
    case Type::f16: return BackwardScratch<Half, float>(c, nullptr).bytes;
    case Type::bf16: break;
  }
  return BackwardScratch<BFloat16, float>(c, nullptr).bytes;
}

static void attention_backward(const AttentionBackward& c, int64_t n, int64_t g, void* scratch) {
  switch (c.type) {
    case Type::f64: return run<double, double>(c, n, g, scratch);
    case Type::f32: return run<float, float>(c, n, g, scratch);
    case Type::f16: return run<Half, float>(c, n, g, scratch);
    case Type::bf16: return run<BFloat16, float>(c, n, g, scratch);
  }
}
