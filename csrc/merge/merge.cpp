#include "kernel.h"

#include <algorithm>

#include "../isa.h"
#include "formula.h"
#include "strided.h"

namespace tangentfast {
namespace {

constexpr int64_t kMost = 12;         // terms read side by side: the hardware follows about as many
constexpr int64_t kRoom = 32 * 1024;  // bytes of sums that wait for the next run
constexpr int64_t kGathered = 512;    // elements of a block that is brought together first

// `width` terms of type V, added in their order. Memory runs at full speed only when several streams
// are read at once: eight make the whole merge twice as fast as one after the other.
template <int width, class V, class S>
struct Run {
  using A = typename S::Number;
  const V* v[width];
  A alpha[width];

  TF_INLINE Run(const Term* terms, int64_t at) {
    for (int k = 0; k < width; ++k) {
      v[k] = static_cast<const V*>(terms[k].data) + at;
      alpha[k] = static_cast<A>(terms[k].alpha);
    }
  }

  TF_INLINE void add(int64_t i, S& sum) const {
    for (int k = 0; k < width; ++k) sum.add(alpha[k], load<A>(v[k][i]));
  }
};

// Asks for the line of each term that holds element i, ahead of its use: without it a run of many
// terms waits for memory, and a new run begins in memory that the hardware did not foresee.
template <int width, class V>
TF_INLINE void ask_for(const Term* terms, int64_t i) {
#if defined(__GNUC__)
  for (int k = 0; k < width; ++k) __builtin_prefetch(static_cast<const V*>(terms[k].data) + i);
#endif
}

template <class V>
constexpr int64_t kLine = 64 / sizeof(V);

// A run that begins the sums of a block, or goes on with them.
template <bool first, class R, class S>
TF_INLINE void add_elements(const R& run, int64_t begin, int64_t end, S* __restrict sums) {
  for (int64_t i = begin; i < end; ++i) {
    S sum;
    if (!first) sum = sums[i];
    run.add(i, sum);
    sums[i] = sum;
  }
}

// Meanwhile it asks for what is read after it: elements of `next` from `next_at` on.
template <int width, bool first, class V, class S>
TF_INLINE void add_run(const Term* terms, int64_t at, int64_t n, S* sums, const Term* next,
                       int64_t next_at) {
  const Run<width, V, S> run(terms, at);
  int64_t i = 0;
  for (; i + kLine<V> <= n; i += kLine<V>) {
    ask_for<width, V>(next, next_at + i);
    add_elements<first>(run, i, i + kLine<V>, sums);
  }
  add_elements<first>(run, i, n, sums);
}

// A run that is the whole sum, which needs no memory.
template <class R, class V, class S>
TF_INLINE void merge_elements(const R& run, int64_t begin, int64_t end, V* __restrict base, S) {
  for (int64_t i = begin; i < end; ++i) {
    S sum;
    run.add(i, sum);
    store(sum.plus(load<typename S::Number>(base[i])), base[i]);
  }
}

template <int width, class V, class S>
TF_INLINE void only_run(const Term* terms, int64_t at, int64_t n, V* base) {
  const Run<width, V, S> run(terms, at);
  int64_t i = 0;
  for (; width > 4 && i + kLine<V> <= n; i += kLine<V>) {
    ask_for<width, V>(terms, at + i + 4 * kLine<V>);
    merge_elements(run, i, i + kLine<V>, base, S());
  }
  merge_elements(run, i, n, base, S());
}

// What is merged most has runs of every width, so that two of them are alike; the rest has those of
// powers of 2, which take less to compile.
template <class V, class S>
constexpr bool kAnyWidth = sizeof(V) == 4 && sizeof(S) == sizeof(double);

template <class V, class S>
TF_INLINE void add_terms(const Term* terms, int64_t width, int64_t at, int64_t n, S* sums,
                         bool first, const Term* next, int64_t next_at) {
#define TF_RUN(w)                                                              \
  case w:                                                                      \
    return first ? add_run<w, true, V>(terms, at, n, sums, next, next_at)      \
                 : add_run<w, false, V>(terms, at, n, sums, next, next_at);
  switch (width) { TF_RUN(8) TF_RUN(4) TF_RUN(2) TF_RUN(1) }
  if constexpr (kAnyWidth<V, S>) {
    switch (width) { TF_RUN(7) TF_RUN(6) TF_RUN(5) TF_RUN(3) }
  }
#undef TF_RUN
}

// The whole sum of a base and terms that are all of type V.
template <class V, class S>
TF_INLINE void merge_terms(const Term* terms, int64_t width, int64_t at, int64_t n, void* base) {
  V* const b = static_cast<V*>(base) + at;
#define TF_RUN(w) \
  case w: return only_run<w, V, S>(terms, at, n, b);
  switch (width) {
    TF_RUN(1) TF_RUN(2) TF_RUN(3) TF_RUN(4) TF_RUN(5) TF_RUN(6)
    TF_RUN(7) TF_RUN(8) TF_RUN(9) TF_RUN(10) TF_RUN(11) TF_RUN(12)
  }
#undef TF_RUN
}

template <class B, class S>
TF_INLINE void finish(const S* __restrict sums, int64_t at, int64_t n, void* base) {
  B* const b = static_cast<B*>(base) + at;
  for (int64_t i = 0; i < n; ++i) store(sums[i].plus(load<typename S::Number>(b[i])), b[i]);
}

// How many terms from the first on have its type, `most` at most.
TF_INLINE int64_t run_length(const Term* terms, int64_t most) {
  int64_t length = 1;
  while (length < most && terms[length].type == terms[0].type) ++length;
  return length;
}

// The types that a sum can meet: beside halves alone there are no wider ones, and only a base of
// doubles has the pair. A lambda would not inherit the target attribute of its function.
#define TF_HALVES(type, function, S, ...)                            \
  switch (type) {                                                    \
    case Type::f16: function<Half, S>(__VA_ARGS__); break;           \
    default: function<BFloat16, S>(__VA_ARGS__);                     \
  }
#define TF_ALL(type, function, S, ...)                               \
  switch (type) {                                                    \
    case Type::f64: function<double, S>(__VA_ARGS__); break;         \
    case Type::f32: function<float, S>(__VA_ARGS__); break;          \
    case Type::f16: function<Half, S>(__VA_ARGS__); break;           \
    case Type::bf16: function<BFloat16, S>(__VA_ARGS__); break;      \
  }
using Single = Plain<float>;
using Double = Plain<double>;

TF_INLINE void add(const Term* t, int64_t w, int64_t at, int64_t n, Single* sums, bool first,
                   const Term* next, int64_t next_at) {
  TF_HALVES(t->type, add_terms, Single, t, w, at, n, sums, first, next, next_at)
}
TF_INLINE void add(const Term* t, int64_t w, int64_t at, int64_t n, Double* sums, bool first,
                   const Term* next, int64_t next_at) {
  TF_ALL(t->type, add_terms, Double, t, w, at, n, sums, first, next, next_at)
}
TF_INLINE void add(const Term* t, int64_t w, int64_t at, int64_t n, Twice* sums, bool first,
                   const Term* next, int64_t next_at) {
  TF_ALL(t->type, add_terms, Twice, t, w, at, n, sums, first, next, next_at)
}

TF_INLINE void end(Type type, const Single* sums, int64_t at, int64_t n, void* base) {
  TF_HALVES(type, finish, Single, sums, at, n, base)
}
TF_INLINE void end(Type type, const Double* sums, int64_t at, int64_t n, void* base) {
  if (type == Type::f32) return finish<float>(sums, at, n, base);
  TF_HALVES(type, finish, Double, sums, at, n, base)
}
TF_INLINE void end(Type, const Twice* sums, int64_t at, int64_t n, void* base) {
  finish<double>(sums, at, n, base);
}

TF_INLINE void whole(const Single*, Type type, const Term* t, int64_t w, int64_t at, int64_t n,
                     void* base) {
  TF_HALVES(type, merge_terms, Single, t, w, at, n, base)
}
TF_INLINE void whole(const Double*, Type, const Term* t, int64_t w, int64_t at, int64_t n,
                     void* base) {
  merge_terms<float, Double>(t, w, at, n, base);
}
TF_INLINE void whole(const Twice*, Type, const Term* t, int64_t w, int64_t at, int64_t n,
                     void* base) {
  merge_terms<double, Twice>(t, w, at, n, base);
}

// Room for a block of the base and of the terms read side by side.
struct Gathered {
  double base[kGathered], data[kMost][kGathered];
  Term terms[kMost];
};

// The terms [k, k + width) of a block, where they lie or brought together.
TF_INLINE const Term* terms_of(const MergeItem& item, int64_t k, int64_t width, int64_t at, int64_t n,
                               Gathered* gathered) {
  if (!gathered) return item.terms + k;
  for (int64_t j = 0; j < width; ++j) {
    Term& term = gathered->terms[j] = item.terms[k + j];
    if (in_order(item, 1 + k + j)) {
      term.data = static_cast<const char*>(term.data) + at * size_of(term.type);
    } else {
      move_block<false>(item, 1 + k + j, at, n, gathered->data[j]);
      term.data = gathered->data[j];
    }
  }
  return gathered->terms;
}

// How many of `run` terms of a type are read side by side.
template <class S>
TF_INLINE int64_t run_width(Type type, int64_t run) {
  if (kAnyWidth<float, S> && type == Type::f32) {
    const int64_t runs = (run + 7) / 8;
    return (run + runs - 1) / runs;
  }
  int64_t width = 8;
  while (width > run) width /= 2;
  return width;
}

template <class S>
TF_INLINE void merge_block(const MergeItem& item, int64_t at, int64_t n, S* sums,
                           Gathered* gathered) {
  const int64_t from = gathered ? 0 : at;
  void* const base = gathered ? gathered->base : item.base;
  if (gathered) move_block<false>(item, 0, at, n, base);
  if (item.count <= kMost && item.terms[0].type == item.type &&
      run_length(item.terms, item.count) == item.count) {
    const Term* const terms = terms_of(item, 0, item.count, at, n, gathered);
    whole(sums, item.type, terms, item.count, from, n, base);
  } else {
    for (int64_t k = 0, width = 0; k < item.count; k += width) {
      const int64_t run = run_length(item.terms + k, item.count - k);
      width = run_width<S>(item.terms[k].type, run);
      const Term* const terms = terms_of(item, k, width, at, n, gathered);
      const bool last = k + width == item.count;
      const Term* const next = item.terms + (last ? 0 : std::min(k + width, item.count - width));
      add(terms, width, from, n, sums, k == 0, next, last ? at + n : at);
    }
    end(item.type, sums, from, n, base);
  }
  if (gathered) move_block<true>(item, 0, at, n, base);
}

template <class S>
TF_INLINE void merge_range(const MergeItem& item, int64_t begin, int64_t end) {
  alignas(64) char room[kRoom];
  Gathered gathered;
  const int64_t block = item.dims ? kGathered : kRoom / sizeof(S);
  for (int64_t at = begin; at < end; at += block) {
    merge_block(item, at, std::min(block, end - at), reinterpret_cast<S*>(room),
                item.dims ? &gathered : nullptr);
  }
}

TF_INLINE void merge_body(const MergeItem& item, int64_t begin, int64_t end) {
  if (item.count == 0) return;
  switch (item.sum) {
    case Sum::f32: return merge_range<Single>(item, begin, end);
    case Sum::f64: return merge_range<Double>(item, begin, end);
    case Sum::twice: return merge_range<Twice>(item, begin, end);
  }
}

}  // namespace

TF_DISPATCH(merge_kernel, merge_body, (const MergeItem& item, int64_t begin, int64_t end),
            (item, begin, end))

}  // namespace tangentfast
