// Vectors of one instruction set, and their exponential. Included by the bodies that each_isa.h
// compiles, in a namespace of their own; no include guard on purpose.

template <class A>
struct Lanes {
  typedef A V __attribute__((vector_size(TF_VECTOR_BYTES)));
  static constexpr int count = TF_VECTOR_BYTES / sizeof(A);
};
template <class A>
using Vec = typename Lanes<A>::V;

template <class A>
static inline Vec<A> load_vector(const A* p) {
  Vec<A> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
static inline void store_vector(A* p, Vec<A> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class A>
static inline Vec<A> splat(A x) {
  return x - Vec<A>{};
}

// a b + c in one rounding where the instruction set has it.
#if TF_ISA >= 512
static inline Vec<float> madd(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
static inline Vec<double> madd(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
constexpr int kTileRows = 8;  // 16 of 32 registers hold sums
#elif TF_ISA == 2
static inline Vec<float> madd(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
static inline Vec<double> madd(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
constexpr int kTileRows = 6;  // 12 of 16
#else
template <class V>
static inline V madd(V a, V b, V c) {
  return a * b + c;
}
constexpr int kTileRows = 4;
#endif

#if TF_ISA >= 512
template <class A>
static inline A sum_lanes(Vec<A> v) {
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_ps(v);
  else return _mm512_reduce_add_pd(v);
}

template <class A>
static inline A max_lanes(Vec<A> v) {
  if constexpr (sizeof(A) == 4) return _mm512_reduce_max_ps(v);
  else return _mm512_reduce_max_pd(v);
}
#else
template <class A>
static inline A sum_lanes(Vec<A> v) {
  A total = 0;
  for (int i = 0; i < Lanes<A>::count; ++i) total += v[i];
  return total;
}

template <class A>
static inline A max_lanes(Vec<A> v) {
  A most = v[0];
  for (int i = 1; i < Lanes<A>::count; ++i) most = v[i] > most ? v[i] : most;
  return most;
}
#endif

// exp(x) for x <= 0; 0 below the smallest normal number. x = n ln 2 + r with |r| <= ln 2 / 2 (Cody
// and Waite 1980), exp(r) by its Taylor polynomial of degree 7, whose remainder is under 6e-9.
static inline Vec<float> exp_nonpositive(Vec<float> x) {
  typedef int32_t Bits __attribute__((vector_size(TF_VECTOR_BYTES)));
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: the addition rounds to an integer
  const Vec<float> shifted = madd(x, splat(1.44269504088896341f), magic);
  const Vec<float> n = shifted - magic;
  Vec<float> r = madd(n, splat(-0.693145751953125f), x);
  r = madd(n, splat(-1.42860682030941723e-6f), r);
  Vec<float> p = splat(1.0f / 5040);
  p = madd(p, r, splat(1.0f / 720));
  p = madd(p, r, splat(1.0f / 120));
  p = madd(p, r, splat(1.0f / 24));
  p = madd(p, r, splat(1.0f / 6));
  p = madd(p, r, splat(0.5f));
  p = madd(p, r, splat(1.0f));
  p = madd(p, r, splat(1.0f));
  const Bits power = ((Bits)shifted - 0x4b400000 + 127) << 23;
  return x < -87.0f ? Vec<float>{} : p * (Vec<float>)power;
}

static inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

static inline float log_scalar(float x) { return __builtin_logf(x); }
static inline double log_scalar(double x) { return __builtin_log(x); }

// A right operand of the product is held in panels of kPanel columns, [depth][kPanel] each, the last
// one padded with zeros; a result has as many columns as its panels.
template <class A>
constexpr int kPanel = 2 * Lanes<A>::count;

template <class A>
static inline int64_t padded(int64_t columns) {
  return (columns + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
}

template <class A, class T>
static inline void narrow(int64_t rows, int64_t columns, const A* x, int64_t stride, T* y,
                          int64_t y_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t p = 0; p < columns; ++p) store(x[i * stride + p], y[i * y_stride + p]);
  }
}
