// attention_backward_kernel for one instruction set; see each_isa.h.
#include "../vector.h"
#include "rows.h"

template <class A>
struct BackwardScratch {
  A *q, *grad, *p, *ds, *out, *delta;       // one block
  A *q_panels, *grad_panels;                // the same rows as right operands
  A *k_turned, *k, *v_turned, *dk, *dv;     // one head
  int64_t total;

  BackwardScratch(const AttentionBackward& c, A* at) {
    const int64_t rows = block_rows(c.keys), keys = padded<A>(c.keys);
    const int64_t depth = padded<A>(c.depth), values = padded<A>(c.value_depth);
    A* const start = at;
    const auto take = [&at](int64_t n) {
      A* const mine = at;
      at += (n + 15) / 16 * 16;
      return mine;
    };
    q = take(rows * c.depth);
    grad = take(rows * c.value_depth);
    p = take(rows * keys);
    ds = take(rows * keys);
    out = take(rows * depth);
    delta = take(rows);
    q_panels = take(rows * depth);
    grad_panels = take(rows * values);
    k_turned = take(keys * c.depth);
    k = take(depth * c.keys);
    v_turned = take(keys * c.value_depth);
    dk = take(c.keys * depth);
    dv = take(c.keys * values);
    total = at - start;
  }
};

// p <- exp(p - lse) in its first `seen` entries and 0 behind; ds <- p (ds - delta).
template <class A>
static inline void softmax_row_backward(A* p, A* ds, A lse, A delta, int64_t seen, int64_t width) {
  constexpr int lanes = Lanes<A>::count;
  for (int64_t j = seen; j < width; ++j) p[j] = -__builtin_inf();
  for (int64_t j = 0; j < width; j += lanes) {
    const Vec<A> e = exp_nonpositive(load_vector(p + j) - lse);
    store_vector(p + j, e);
    store_vector(ds + j, e * (load_vector(ds + j) - delta));
  }
}

template <class T, class A>
static void run(const AttentionBackward& c, int64_t n, int64_t g, A* memory) {
  const BackwardScratch<A> s(c, memory);
  const int64_t step = block_rows(c.keys), depth = padded<A>(c.depth);
  const int64_t values = padded<A>(c.value_depth);
  const A scale = static_cast<A>(c.scale);
  pack_transposed(c.keys, c.depth, at<T>(c.k, n, g, 0), c.k.row, s.k_turned);
  pack(c.keys, c.depth, at<T>(c.k, n, g, 0), c.k.row, s.k);
  pack_transposed(c.keys, c.value_depth, at<T>(c.v, n, g, 0), c.v.row, s.v_turned);
  for (int64_t i = 0; i < c.keys * depth; ++i) s.dk[i] = 0;
  for (int64_t i = 0; i < c.keys * values; ++i) s.dv[i] = 0;
  for (int64_t h = g * c.group; h < (g + 1) * c.group; ++h) {
    for (int64_t first = 0; first < c.queries; first += step) {
      const int64_t rows = c.queries - first < step ? c.queries - first : step;
      const int64_t seen = c.causal && first + rows < c.keys ? first + rows : c.keys;
      const int64_t width = padded<A>(seen);
      widen(rows, c.depth, at<T>(c.q, n, h, first), c.q.row, scale, s.q);
      widen(rows, c.value_depth, at<T>(c.grad, n, h, first), c.grad.row, A(1), s.grad);
      for (int64_t i = 0; i < rows; ++i) {
        const T* const o = at<T>(c.o, n, h, first + i);
        A sum = 0;
        for (int64_t p = 0; p < c.value_depth; ++p) {
          sum += load<A>(o[p]) * s.grad[i * c.value_depth + p];
        }
        s.delta[i] = sum;
      }
      multiply(rows, seen, c.depth, s.q, c.depth, s.k_turned, c.depth * kPanel<A>, s.p, width,
               false);
      multiply(rows, seen, c.value_depth, s.grad, c.value_depth, s.v_turned,
               c.value_depth * kPanel<A>, s.ds, width, false);
      for (int64_t i = 0; i < rows; ++i) {
        A* const row = s.p + i * width;
        const int64_t own = c.causal && first + i + 1 < seen ? first + i + 1 : seen;
        if (c.mask.data) add_row(own, at<A>(c.mask, n, h, first + i), c.mask_column, row);
        softmax_row_backward(row, s.ds + i * width, *at<A>(c.lse, n, h, first + i), s.delta[i],
                             own, width);
      }
      pack(rows, c.value_depth, s.grad, c.value_depth, s.grad_panels);
      multiply<true>(seen, c.value_depth, rows, s.p, width, s.grad_panels, rows * kPanel<A>, s.dv,
                     values, true);
      pack(rows, c.depth, s.q, c.depth, s.q_panels);
      multiply<true>(seen, c.depth, rows, s.ds, width, s.q_panels, rows * kPanel<A>, s.dk, depth,
                     true);
      multiply(rows, c.depth, seen, s.ds, width, s.k, c.keys * kPanel<A>, s.out, depth, false);
      for (int64_t i = 0; i < rows * depth; ++i) s.out[i] *= scale;
      narrow(rows, c.depth, s.out, depth, const_cast<T*>(at<T>(c.dq, n, h, first)), c.dq.row);
    }
  }
  narrow(c.keys, c.depth, s.dk, depth, const_cast<T*>(at<T>(c.dk, n, g, 0)), c.dk.row);
  narrow(c.keys, c.value_depth, s.dv, values, const_cast<T*>(at<T>(c.dv, n, g, 0)), c.dv.row);
}

static int64_t scratch_bytes(const AttentionBackward& c) {
  return c.type == Type::f64
             ? BackwardScratch<double>(c, nullptr).total * static_cast<int64_t>(sizeof(double))
             : BackwardScratch<float>(c, nullptr).total * static_cast<int64_t>(sizeof(float));
}

static void attention_backward(const AttentionBackward& c, int64_t n, int64_t g, void* scratch) {
  switch (c.type) {
    case Type::f64: return run<double>(c, n, g, static_cast<double*>(scratch));
    case Type::f32: return run<float>(c, n, g, static_cast<float*>(scratch));
    case Type::f16: return run<Half>(c, n, g, static_cast<float*>(scratch));
    case Type::bf16: return run<BFloat16>(c, n, g, static_cast<float*>(scratch));
  }
}
