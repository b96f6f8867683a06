// attention_jvp_kernel for one instruction set; see each_isa.h.
#include "../vector.h"
#include "rows.h"

template <class T, class A>
struct Scratch {
  using Kind = KindOf<T, A>;

  A *q, *dq, *p, *ds, *o;  // one block
  NumberOf<Kind> *k, *dk;  // panels of one head, of its keys as they are multiplied with rows
  A *v, *dv;               // and of its values; dk and dv of each tangent
  int64_t k_size, v_size, bytes;

  Scratch(const Attention& c, void* memory) {
    const int64_t rows = block_rows(c.keys), keys = padded<A>(c.keys);
    const int64_t values = padded<A>(c.value_depth);
    Parts parts{static_cast<char*>(memory)};
    k_size = keys * ((c.depth + Kind::numbers - 1) / Kind::numbers);
    v_size = values * c.keys;
    parts.take(q, rows * c.depth + rows);  // and a zero for pairs of an odd depth
    parts.take(dq, rows * c.depth + rows);
    parts.take(p, rows * keys);
    parts.take(ds, rows * keys);
    parts.take(o, rows * values);
    parts.take(k, k_size);
    parts.take(v, v_size);
    parts.take(dk, k_size * c.count);
    parts.take(dv, v_size * c.count);
    bytes = parts.bytes;
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

// ds <- scale p (ds - sum p ds)
template <class A>
static inline void softmax_row_jvp(const A* p, A scale, A* ds, int64_t width) {
  constexpr int lanes = Lanes<A>::count;
  Vec<A> sums{};
  for (int64_t j = 0; j < width; j += lanes) {
    sums = madd(load_vector(p + j), load_vector(ds + j), sums);
  }
  const A mean = sum_lanes<A>(sums);
  for (int64_t j = 0; j < width; j += lanes) {
    store_vector(ds + j, scale * load_vector(p + j) * (load_vector(ds + j) - mean));
  }
}

template <class T, class A>
static void run(const Attention& c, int64_t n, int64_t h, int64_t begin, int64_t end,
                void* memory) {
  using Kind = KindOf<T, A>;
  const Scratch<T, A> s(c, memory);
  const int64_t kv = h / c.group, step = block_rows(c.keys), values = padded<A>(c.value_depth);
  const int64_t last = c.causal && end < c.keys ? end : c.keys;  // keys that any row here sees
  const int64_t v_panel = last * kPanel<A>;
  const A scale = static_cast<A>(c.scale);
  const auto pack_keys = [&](const Operand& k, NumberOf<Kind>* panels) {
    pack_lines<Kind, kPanel<A>>(last, c.depth, at<T>(k, n, kv, 0), k.row, 1, panels);
  };
  const auto pack_values = [&](const Operand& v, A* panels) {
    pack_lines<Whole<A>, kPanel<A>>(c.value_depth, last, at<T>(v, n, kv, 0), 1, v.row, panels);
  };
  pack_keys(c.k, s.k);
  pack_values(c.v, s.v);
  for (int64_t t = 0; t < c.count; ++t) {
    const AttentionTangent& d = c.tangents[t];
    if (d.dk.data) pack_keys(d.dk, s.dk + t * s.k_size);
    if (d.dv.data) pack_values(d.dv, s.dv + t * s.v_size);
  }
  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = end - first < step ? end - first : step;
    const int64_t seen = c.causal && first + rows < last ? first + rows : last;
    const int64_t width = padded<A>(seen);
    const auto q = rows_of(rows, c.depth, at<T>(c.q, n, h, first), c.q.row, s.q);
    multiply_rows<Kind>(rows, seen, c.depth, q, s.k, s.p, width, false);
    for (int64_t i = 0; i < rows; ++i) {
      A* const row = s.p + i * width;
      const int64_t own = c.causal && first + i + 1 < seen ? first + i + 1 : seen;
      scale_add(own, scale, c.mask.data ? at<A>(c.mask, n, h, first + i) : nullptr, c.mask_column,
                row);
      prefetch<T>(c.q, n, h + 1, first + i, c.depth);
      prefetch<T>(c.k, n, kv + 1, first + i, c.depth);
      prefetch<T>(c.v, n, kv + 1, first + i, c.value_depth);
      const A lse = softmax_row(row, own, width);
      if (c.lse.data) *const_cast<A*>(at<A>(c.lse, n, h, first + i)) = lse;
    }
    if (c.o.data) {
      multiply<Whole<A>>(rows, c.value_depth, seen, s.p, width, s.v, v_panel, s.o, values, false);
      narrow(rows, c.value_depth, s.o, values, const_cast<T*>(at<T>(c.o, n, h, first)), c.o.row);
    }
    for (int64_t t = 0; t < c.count; ++t) {
      const AttentionTangent& d = c.tangents[t];
      bool some = false;
      if (d.dq.data) {
        const auto dq = rows_of(rows, c.depth, at<T>(d.dq, n, h, first), d.dq.row, s.dq);
        multiply_rows<Kind>(rows, seen, c.depth, dq, s.k, s.ds, width, false);
        some = true;
      }
      if (d.dk.data) {
        multiply_rows<Kind>(rows, seen, c.depth, q, s.dk + t * s.k_size, s.ds, width, some);
        some = true;
      }
      if (d.dmask.data) {
        if (!some) {
          for (int64_t j = 0; j < rows * width; ++j) s.ds[j] = 0;
        }
        for (int64_t i = 0; i < rows; ++i) {
          scale_add(seen, scale, at<A>(d.dmask, n, h, first + i), d.dmask_column, s.ds + i * width);
        }
        some = true;
      }
      if (some) {
        for (int64_t i = 0; i < rows; ++i) {
          prefetch<T>(d.dq, n, h + 1, first + i, c.depth);
          prefetch<T>(d.dk, n, kv + 1, first + i, c.depth);
          prefetch<T>(d.dv, n, kv + 1, first + i, c.value_depth);
          softmax_row_jvp(s.p + i * width, d.dmask.data ? A(1) : scale, s.ds + i * width, width);
        }
        multiply<Whole<A>>(rows, c.value_depth, seen, s.ds, width, s.v, v_panel, s.o, values,
                           false);
      }
      if (d.dv.data) {
        multiply<Whole<A>>(rows, c.value_depth, seen, s.p, width, s.dv + t * s.v_size, v_panel, s.o,
                           values, some);
      }
      narrow(rows, c.value_depth, s.o, values, const_cast<T*>(at<T>(d.out, n, h, first)),
             d.out.row);
    }
  }
}

static int64_t scratch_bytes(const Attention& c) {
  switch (c.type) {
    case Type::f64: return Scratch<double, double>(c, nullptr).bytes;
    case Type::f32: return Scratch<float, float>(c, nullptr).bytes;
    case Type::f16: return Scratch<Half, float>(c, nullptr).bytes;
    case Type::bf16: break;
  }
  return Scratch<BFloat16, float>(c, nullptr).bytes;
}

static void attention_jvp(const Attention& c, int64_t n, int64_t h, int64_t begin, int64_t end,
                          void* scratch) {
  switch (c.type) {
    case Type::f64: return run<double, double>(c, n, h, begin, end, scratch);
    case Type::f32: return run<float, float>(c, n, h, begin, end, scratch);
    case Type::f16: return run<Half, float>(c, n, h, begin, end, scratch);
    case Type::bf16: return run<BFloat16, float>(c, n, h, begin, end, scratch);
  }
}
