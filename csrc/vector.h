// Vectors of one instruction set, their exponential, and a small matrix product. Included by the
// bodies that each_isa.h compiles, in a namespace of their own; no include guard on purpose.

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

// c[rows][2 vectors] = a panel, added to what is there if `add`; a is [rows][depth], or its transpose
// if `turned`.
template <class A, int rows, bool turned>
static inline void tile(int64_t depth, const A* a, int64_t lda, const A* panel, A* c, int64_t ldc,
                        bool add) {
  constexpr int n = Lanes<A>::count;
  Vec<A> sums[rows][2];
  for (int i = 0; i < rows; ++i) {
    sums[i][0] = add ? load_vector(c + i * ldc) : Vec<A>{};
    sums[i][1] = add ? load_vector(c + i * ldc + n) : Vec<A>{};
  }
#pragma GCC unroll 4
  for (int64_t p = 0; p < depth; ++p) {
    const Vec<A> left = load_vector(panel + p * 2 * n);
    const Vec<A> right = load_vector(panel + p * 2 * n + n);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec<A> x = splat(turned ? a[p * lda + i] : a[i * lda + p]);
      sums[i][0] = madd(x, left, sums[i][0]);
      sums[i][1] = madd(x, right, sums[i][1]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    store_vector(c + i * ldc, sums[i][0]);
    store_vector(c + i * ldc + n, sums[i][1]);
  }
}

template <class A, int rows, bool turned>
static inline void last_tile(int64_t left, int64_t depth, const A* a, int64_t lda, const A* panel,
                             A* c, int64_t ldc, bool add) {
  if constexpr (rows > 0) {
    if (left == rows) return tile<A, rows, turned>(depth, a, lda, panel, c, ldc, add);
    last_tile<A, rows - 1, turned>(left, depth, a, lda, panel, c, ldc, add);
  }
}

// c[rows][padded columns] (+)= a b, b in panels `stride` elements apart; a is [rows][depth], or its
// transpose if `turned`.
template <bool turned = false, class A>
static inline void multiply(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t lda,
                            const A* b, int64_t stride, A* c, int64_t ldc, bool add) {
  const int64_t step = turned ? 1 : lda;
  for (int64_t j = 0; j < columns; j += kPanel<A>, b += stride) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
      tile<A, kTileRows, turned>(depth, a + i * step, lda, b, c + i * ldc + j, ldc, add);
    }
    last_tile<A, kTileRows - 1, turned>(rows - i, depth, a + i * step, lda, b, c + i * ldc + j, ldc,
                                        add);
  }
}

template <class A, class T>
static inline void narrow(int64_t rows, int64_t columns, const A* x, int64_t stride, T* y,
                          int64_t y_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t p = 0; p < columns; ++p) store(x[i * stride + p], y[i * y_stride + p]);
  }
}
