// attention_jvp_kernel for one instruction set; see each_isa.h.
#include "../vector.h"
#include "rows.h"

template <class A>
struct Scratch {
  A *q, *dq, *p, *ds, *o;        // one block
  A *k, *v, *dk, *dv;            // panels of one head; dk and dv of each tangent
  int64_t k_size, v_size, total;

  Scratch(const Attention& c, A* at) {
    const int64_t rows = block_rows(c.keys), keys = padded<A>(c.keys);
    const int64_t values = padded<A>(c.value_depth);
    A* const start = at;
    const auto take = [&at](int64_t n) {
      A* const mine = at;
      at += (n + 15) / 16 * 16;
      return mine;
    };
    k_size = keys * c.depth;
    v_size = values * c.keys;
    q = take(rows * c.depth);
    dq = take(rows * c.depth);
    p = take(rows * keys);
    ds = take(rows * keys);
    o = take(rows * values);
    k = take(k_size);
    v = take(v_size);
    dk = take(k_size * c.count);
    dv = take(v_size * c.count);
    total = at - start;
  }
};

// s <- softmax of its first `seen` entries, 0 behind them up to `width`; returns the log-sum-exp.
template <class A>
static inline A softmax_row(A* s, int64_t seen, int64_t width) {
  constexpr int lanes = Lanes<A>::count;
  const A infinity = __builtin_inf();
  for (int64_t j = seen; j < width; ++j) s[j] = -infinity;
  Vec<A> most = splat(-infinity);
  for (int64_t j = 0; j < width; j += lanes) {
    const Vec<A> x = load_vector(s + j);
    most = x > most ? x : most;
  }
  const A top = max_lanes<A>(most);
  if (top == -infinity) {  // nothing seen, unless it is all NaN, which no comparison finds
    A total = 0;
    for (int64_t j = 0; j < seen; ++j) total += s[j];
    for (int64_t j = 0; j < width; ++j) s[j] = total == total ? 0 : total;
    return total == total ? infinity : total;
  }
  Vec<A> sums{};
  for (int64_t j = 0; j < width; j += lanes) {
    const Vec<A> e = exp_nonpositive(load_vector(s + j) - top);
    sums += e;
    store_vector(s + j, e);
  }
  const A sum = sum_lanes<A>(sums), inverse = 1 / sum;
  for (int64_t j = 0; j < width; j += lanes) store_vector(s + j, load_vector(s + j) * inverse);
  return top + log_scalar(sum);
}

// ds <- p (ds - sum p ds)
template <class A>
static inline void softmax_row_jvp(const A* p, A* ds, int64_t width) {
  constexpr int lanes = Lanes<A>::count;
  Vec<A> sums{};
  for (int64_t j = 0; j < width; j += lanes) {
    sums = madd(load_vector(p + j), load_vector(ds + j), sums);
  }
  const A mean = sum_lanes<A>(sums);
  for (int64_t j = 0; j < width; j += lanes) {
    store_vector(ds + j, load_vector(p + j) * (load_vector(ds + j) - mean));
  }
}

template <class T, class A>
static void run(const Attention& c, int64_t n, int64_t h, int64_t begin, int64_t end, A* memory) {
  const Scratch<A> s(c, memory);
  const int64_t kv = h / c.group, step = block_rows(c.keys), values = padded<A>(c.value_depth);
  const int64_t last = c.causal && end < c.keys ? end : c.keys;  // keys that any row here sees
  const int64_t k_panel = c.depth * kPanel<A>, v_panel = last * kPanel<A>;
  const A scale = static_cast<A>(c.scale);
  pack_transposed(last, c.depth, at<T>(c.k, n, kv, 0), c.k.row, s.k);
  pack(last, c.value_depth, at<T>(c.v, n, kv, 0), c.v.row, s.v);
  for (int64_t t = 0; t < c.count; ++t) {
    const AttentionTangent& d = c.tangents[t];
    if (d.dk.data) {
      pack_transposed(last, c.depth, at<T>(d.dk, n, kv, 0), d.dk.row, s.dk + t * s.k_size);
    }
    if (d.dv.data) {
      pack(last, c.value_depth, at<T>(d.dv, n, kv, 0), d.dv.row, s.dv + t * s.v_size);
    }
  }
  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = end - first < step ? end - first : step;
    const int64_t seen = c.causal && first + rows < last ? first + rows : last;
    const int64_t width = padded<A>(seen);
    widen(rows, c.depth, at<T>(c.q, n, h, first), c.q.row, scale, s.q);
    multiply(rows, seen, c.depth, s.q, c.depth, s.k, k_panel, s.p, width, false);
    for (int64_t i = 0; i < rows; ++i) {
      A* const row = s.p + i * width;
      const int64_t own = c.causal && first + i + 1 < seen ? first + i + 1 : seen;
      if (c.mask.data) add_row(own, at<A>(c.mask, n, h, first + i), c.mask_column, row);
      const A lse = softmax_row(row, own, width);
      if (c.lse.data) *const_cast<A*>(at<A>(c.lse, n, h, first + i)) = lse;
    }
    if (c.o.data) {
      multiply(rows, c.value_depth, seen, s.p, width, s.v, v_panel, s.o, values, false);
      narrow(rows, c.value_depth, s.o, values, const_cast<T*>(at<T>(c.o, n, h, first)), c.o.row);
    }
    for (int64_t t = 0; t < c.count; ++t) {
      const AttentionTangent& d = c.tangents[t];
      bool some = false;
      if (d.dq.data) {
        widen(rows, c.depth, at<T>(d.dq, n, h, first), d.dq.row, scale, s.dq);
        multiply(rows, seen, c.depth, s.dq, c.depth, s.k, k_panel, s.ds, width, false);
        some = true;
      }
      if (d.dk.data) {
        multiply(rows, seen, c.depth, s.q, c.depth, s.dk + t * s.k_size, k_panel, s.ds, width,
                 some);
        some = true;
      }
      if (d.dmask.data) {
        if (!some) {
          for (int64_t j = 0; j < rows * width; ++j) s.ds[j] = 0;
        }
        for (int64_t i = 0; i < rows; ++i) {
          add_row(seen, at<A>(d.dmask, n, h, first + i), d.dmask_column, s.ds + i * width);
        }
        some = true;
      }
      if (some) {
        for (int64_t i = 0; i < rows; ++i) {
          softmax_row_jvp(s.p + i * width, s.ds + i * width, width);
        }
        multiply(rows, c.value_depth, seen, s.ds, width, s.v, v_panel, s.o, values, false);
      }
      if (d.dv.data) {
        multiply(rows, c.value_depth, seen, s.p, width, s.dv + t * s.v_size, v_panel, s.o, values,
                 some);
      }
      narrow(rows, c.value_depth, s.o, values, const_cast<T*>(at<T>(d.out, n, h, first)),
             d.out.row);
    }
  }
}

static int64_t scratch_bytes(const Attention& c) {
  return c.type == Type::f64
             ? Scratch<double>(c, nullptr).total * static_cast<int64_t>(sizeof(double))
             : Scratch<float>(c, nullptr).total * static_cast<int64_t>(sizeof(float));
}

static void attention_jvp(const Attention& c, int64_t n, int64_t h, int64_t begin, int64_t end,
                          void* scratch) {
  switch (c.type) {
    case Type::f64: return run<double>(c, n, h, begin, end, static_cast<double*>(scratch));
    case Type::f32: return run<float>(c, n, h, begin, end, static_cast<float*>(scratch));
    case Type::f16: return run<Half>(c, n, h, begin, end, static_cast<float*>(scratch));
    case Type::bf16: return run<BFloat16>(c, n, h, begin, end, static_cast<float*>(scratch));
  }
}
