// Panels of the operands of a product, and the product of two of them, for each way to compute one.
// A panel holds `width` lines beside each other, step by step: a step is one number of each line, or
// a pair of them, where the instruction set multiplies pairs.

// Computed in A as it is.
template <class A>
struct Whole {
  using Number = A;
  using Sum = A;
  static constexpr int numbers = 1;
  static inline Vec<A> add(const A* x, Vec<A> y, Vec<A> sum) { return madd(splat(*x), y, sum); }
  template <class T>
  static inline A step(const T* x, int64_t, int64_t) {
    return load<A>(*x);
  }
};

#if TF_ISA == 513
// Pairs of bfloat16, the first in the lower half. VDPBF16PS adds the product of the upper halves, then
// that of the lower ones, each in one rounding to nearest; it takes subnormal numbers as zero and
// gives them as zero, an error under 2^-126 a term.
struct Pairs {
  using Number = uint32_t;
  using Sum = float;
  static constexpr int numbers = 2;
  template <class T>  // a pair, or the first of two numbers that lie beside each other
  static inline Vec<float> add(const T* x, Vec<uint32_t> y, Vec<float> sum) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)y);
  }
  template <class T>
  static inline uint32_t step(const T* x, int64_t along, int64_t left) {
    const uint32_t second = left > 1 ? to_bfloat16(to_float(x[along])).bits : 0;
    return to_bfloat16(to_float(*x)).bits | second << 16;
  }
};
using Exact16 = Pairs;
using Rounded16 = Pairs;
#else
// Floats that are rounded to bfloat16: a product of two is exact.
struct Rounded16 : Whole<float> {
  template <class T>
  static inline float step(const T* x, int64_t, int64_t) {
    return to_float(to_bfloat16(to_float(*x)));
  }
};
using Exact16 = Whole<float>;
#endif

template <class K>
using NumberOf = typename K::Number;
template <class K>
using SumOf = typename K::Sum;

// c[rows][2 vectors] = a panel, of `depth` steps, added to what is there if `add`. a holds `rows`
// rows, lda apart, or, if `turned`, as many numbers of K at every step. `ahead`: what is as many
// numbers further on is fetched.
template <class K, int rows, bool turned, int ahead = 0, class T>
static inline void tile(int64_t depth, const T* a, int64_t lda, const NumberOf<K>* panel,
                        SumOf<K>* c, int64_t ldc, bool add) {
  constexpr int n = Lanes<SumOf<K>>::count;
  Vec<SumOf<K>> sums[rows][2];
  for (int i = 0; i < rows; ++i) {
    sums[i][0] = add ? load_vector(c + i * ldc) : Vec<SumOf<K>>{};
    sums[i][1] = add ? load_vector(c + i * ldc + n) : Vec<SumOf<K>>{};
  }
#pragma GCC unroll 4
  for (int64_t p = 0; p < depth; ++p) {
    if (ahead) __builtin_prefetch(a + p * lda + ahead);
    const auto left = load_vector(panel + p * 2 * n), right = load_vector(panel + p * 2 * n + n);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const T* const x = turned ? a + p * lda + i : a + i * lda + p * K::numbers;
      sums[i][0] = K::add(x, left, sums[i][0]);
      sums[i][1] = K::add(x, right, sums[i][1]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    store_vector(c + i * ldc, sums[i][0]);
    store_vector(c + i * ldc + n, sums[i][1]);
  }
}

template <class K, int rows, bool turned, class T>
static inline void last_tile(int64_t rest, int64_t depth, const T* a, int64_t lda,
                             const NumberOf<K>* panel, SumOf<K>* c, int64_t ldc, bool add) {
  if constexpr (rows > 0) {
    if (rest == rows) return tile<K, rows, turned>(depth, a, lda, panel, c, ldc, add);
    last_tile<K, rows - 1, turned>(rest, depth, a, lda, panel, c, ldc, add);
  }
}

// c[rows][padded columns] (+)= a b, of `depth` steps, b in panels `stride` elements apart; a is as
// in `tile`.
template <class K, bool turned = false, class T>
static inline void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda,
                            const NumberOf<K>* b, int64_t stride, SumOf<K>* c, int64_t ldc,
                            bool add) {
  const int64_t step = turned ? 1 : lda;
  for (int64_t j = 0; j < columns; j += kPanel<SumOf<K>>, b += stride) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
      tile<K, kTileRows, turned>(depth, a + i * step, lda, b, c + i * ldc + j, ldc, add);
    }
    last_tile<K, kTileRows - 1, turned>(rows - i, depth, a + i * step, lda, b, c + i * ldc + j, ldc,
                                        add);
  }
}

#if TF_ISA >= 2
// A square of 32-bit numbers in registers, turned: rows become columns.
static inline void turn(__m256 (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x20);
    t[j + 4] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// `square` numbers of a line in the form of K, as bits in a vector.
template <class K, class T>
static inline __m256 read_line(const T* x, __m256) {
  if constexpr (std::is_same_v<K, Whole<float>> && std::is_same_v<T, float>) {
    return _mm256_loadu_ps(x);
  } else {
    NumberOf<K> numbers[8];
    for (int i = 0; i < 8; ++i) numbers[i] = K::step(x + i * K::numbers, 1, K::numbers);
    return _mm256_loadu_ps(reinterpret_cast<const float*>(numbers));
  }
}
#endif

#if TF_ISA == 513
template <>
inline __m256 read_line<Pairs, float>(const float* x, __m256) {
  return _mm256_castsi256_ps((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x)));
}
template <>
inline __m256 read_line<Pairs, BFloat16>(const BFloat16* x, __m256) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(x));
}
#endif

#if TF_ISA >= 512
template <int numbers>
struct Register {
  using V = __m256;
};
template <>
struct Register<16> {
  using V = __m512;
};

static inline void turn(__m512 (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {  // r[4 g + j] holds column 4 l + j of rows 4 g .. 4 g + 3 in lane l
    const __m512 even = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xdd);
    const __m512 even_below = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);
    const __m512 odd_below = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even, even_below, 0x88);
    t[j + 8] = _mm512_shuffle_f32x4(even, even_below, 0xdd);
    t[j + 4] = _mm512_shuffle_f32x4(odd, odd_below, 0x88);
    t[j + 12] = _mm512_shuffle_f32x4(odd, odd_below, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

template <class K, class T>
static inline __m512 read_line(const T* x, __m512) {
  const __m256 low = read_line<K>(x, __m256{}), high = read_line<K>(x + 8 * K::numbers, __m256{});
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
#endif

#if TF_ISA >= 2
static inline void write_line(uint32_t* to, __m256 v) {
  _mm256_storeu_ps(reinterpret_cast<float*>(to), v);
}
static inline void write_line(float* to, __m256 v) { _mm256_storeu_ps(to, v); }
#endif
#if TF_ISA >= 512
static inline void write_line(uint32_t* to, __m512 v) { _mm512_storeu_ps(to, v); }
static inline void write_line(float* to, __m512 v) { _mm512_storeu_ps(to, v); }
#endif

#if TF_ISA >= 2
// The first steps of a panel whose lines are contiguous, in whole squares; returns how many. Where
// a square is wider than the panel, what is too much is written over by the next step.
template <class K, int width, class T>
static inline int64_t pack_squares(int64_t n, int64_t depth, const T* x, int64_t line,
                                   NumberOf<K>* panel) {
#if TF_ISA >= 512
  using V = typename Register<width % 16 == 0 ? 16 : 8>::V;
#else
  using V = __m256;
#endif
  constexpr int square = sizeof(V) / 4;
  const int64_t end = depth / K::numbers - (square > width);
  int64_t p = 0;
  for (; p + square <= end; p += square) {
    for (int first = 0; first < width; first += square) {
      V r[square];
      for (int i = 0; i < square; ++i) {
        r[i] = first + i < n && first + i < width
                   ? read_line<K>(x + (first + i) * line + p * K::numbers, V{})
                   : V{};
      }
      turn(r);
      for (int i = 0; i < square; ++i) write_line(panel + (p + i) * width + first, r[i]);
    }
  }
  return p;
}
#endif

#if TF_ISA == 513
// 16 numbers of x, then 16 of y, as bfloat16; zeros outside `lanes`.
static inline __m512i both(__mmask16 lanes, const float* x, const float* y) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(lanes, y),
                                      _mm512_maskz_loadu_ps(lanes, x));
}
static inline __m512i both(__mmask16 lanes, const BFloat16* x, const BFloat16* y) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(lanes, x)),
                            _mm256_maskz_loadu_epi16(lanes, y), 1);
}

static inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0);
}

// Panels of `count` steps of `lines` lines that lie beside each other.
template <int width, class T>
static inline void pack_pairs(int64_t lines, int64_t count, const T* x, int64_t along,
                              uint32_t* panel) {
  const __m512i order = _mm512_or_si512(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_slli_epi32(
          _mm512_set_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16), 16));
  for (int64_t p = 0; p < count; ++p, x += 2 * along, panel += width) {
    for (int i = 0; i < width; i += 16) {
      const __m512i pairs = _mm512_permutexvar_epi16(
          order, both(first_lanes(lines - i), x + i, x + along + i));
      _mm512_mask_storeu_epi32(panel + i, first_lanes(width - i), pairs);
    }
  }
}
#endif

// Panels of n lines of `depth` numbers each: the lines lie `line` apart, the numbers of each
// `along`, and one of the two is 1. The last panel is filled up with zeros.
template <class K, int width, class T>
static void pack_lines(int64_t n, int64_t depth, const T* x, int64_t line, int64_t along,
                       NumberOf<K>* panel) {
  const int64_t count = (depth + K::numbers - 1) / K::numbers;
  for (int64_t j = 0; j < n; j += width, panel += count * width) {
    const int64_t lines = n - j < width ? n - j : width;
    const T* const from = x + j * line;
    int64_t p = 0;
#if TF_ISA >= 2
    if constexpr (sizeof(NumberOf<K>) == 4) {
      if (along == 1) p = pack_squares<K, width>(lines, depth, from, line, panel);
    }
#endif
#if TF_ISA == 513
    if constexpr (K::numbers == 2) {
      if (line == 1) {
        p = depth / 2;
        pack_pairs<width>(lines, p, from, along, panel);
      }
    }
#endif
    for (; p < count; ++p) {
      const T* const step = from + p * K::numbers * along;
      const int64_t left = depth - p * K::numbers;
      NumberOf<K>* const to = panel + p * width;
      if (lines == width && line == 1 && left >= K::numbers) {  // a loop of fixed length
        for (int i = 0; i < width; ++i) to[i] = K::step(step + i, along, K::numbers);
        continue;
      }
      for (int64_t i = 0; i < lines; ++i) to[i] = K::step(step + i * line, along, left);
      for (int64_t i = lines; i < width; ++i) to[i] = 0;
    }
  }
}
