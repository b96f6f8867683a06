// Blocks of rows in memory, and the products of rows with rows, for the bodies of the attention
// kernels.
#include "../linear/panels.h"

// Query rows at a time: P and dS of a block stay in a 1 MB L2 cache.
static inline int64_t block_rows(int64_t keys) {
  const int64_t rows = 131072 / (keys > 0 ? keys : 1);
  return rows < 2 * kTileRows ? 2 * kTileRows : rows > 96 ? 96 : rows;
}

template <class T>
static inline const T* at(const Operand& x, int64_t n, int64_t h, int64_t row) {
  return static_cast<const T*>(x.data) + n * x.batch + h * x.head + row * x.row;
}

// Parts of one allocation, each at a multiple of 64 bytes of it.
struct Parts {
  char* begin;
  int64_t bytes = 0;

  template <class Part>
  void take(Part*& part, int64_t n) {
    part = reinterpret_cast<Part*>(begin + bytes);
    bytes += (n * static_cast<int64_t>(sizeof(Part)) + 63) / 64 * 64;
  }
};

// Asks for a row of the next head while this one is computed: rows of 64 numbers lie far apart, and
// waiting for them is a third of the time of 50 keys in float. Nothing is read where there is none.
template <class T>
static inline void prefetch(const Operand& x, int64_t n, int64_t h, int64_t row, int64_t columns) {
  if (!x.data) return;
  const char* const from = reinterpret_cast<const char*>(at<T>(x, n, h, row));
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// y <- scale y + x; x may be null.
template <class A>
static inline void scale_add(int64_t n, A scale, const A* x, int64_t column, A* y) {
  if (!x) {
    for (int64_t j = 0; j < n; ++j) y[j] *= scale;
  } else if (column == 1) {
    for (int64_t j = 0; j < n; ++j) y[j] = y[j] * scale + x[j];
  } else {
    for (int64_t j = 0; j < n; ++j) y[j] = y[j] * scale + x[j * column];
  }
}

#if TF_ISA >= 2
template <>
inline __m256 read_line<Whole<float>, Half>(const Half* x, __m256) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
template <>
inline __m256 read_line<Whole<float>, BFloat16>(const BFloat16* x, __m256) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
#endif

// As many numbers as a vector has, widened.
template <class A, class T>
static inline Vec<A> widen_vector(const T* x) {
  if constexpr (std::is_same_v<A, T>) {
    return load_vector(x);
#if TF_ISA >= 2
  } else if constexpr (sizeof(T) == 2) {
    return read_line<Whole<float>>(x, Vec<A>{});
#endif
  } else {
    A wide[Lanes<A>::count];
    for (int i = 0; i < Lanes<A>::count; ++i) wide[i] = load<A>(x[i]);
    return load_vector(wide);
  }
}

// How rows of T are multiplied with each other: bfloat16 as it is, where pairs of it can be.
template <class T, class A>
using KindOf = std::conditional_t<std::is_same_v<T, BFloat16>, Exact16, Whole<A>>;

// Rows as the left operand of a product, of their own type or of the one computed in.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

template <class A>
static inline Rows<A> rows_of(int64_t, int64_t, const A* x, int64_t stride, A*) {
  return {x, stride};
}

template <class A, class T>
static inline Rows<A> rows_of(int64_t rows, int64_t depth, const T* x, int64_t stride, A* copy) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* const from = x + i * stride;
    A* const to = copy + i * depth;
    int64_t p = 0;
    for (; p + Lanes<A>::count <= depth; p += Lanes<A>::count) {
      store_vector(to + p, widen_vector<A>(from + p));
    }
    for (; p < depth; ++p) to[p] = load<A>(from[p]);
  }
  return {copy, depth};
}

#if TF_ISA == 513
// Only rows of odd length are copied: to a zero in the last pair.
static inline Rows<BFloat16> rows_of(int64_t rows, int64_t depth, const BFloat16* x, int64_t stride,
                                     float* copy) {
  if (depth % 2 == 0) return {x, stride};
  BFloat16* const to = reinterpret_cast<BFloat16*>(copy);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t p = 0; p < depth; ++p) to[i * (depth + 1) + p] = x[i * stride + p];
    to[i * (depth + 1) + depth] = BFloat16{0};
  }
  return {to, depth + 1};
}
#endif

// c[rows][padded columns] (+)= left right, whose panels are `depth` numbers deep.
template <class K, class T>
static inline void multiply_rows(int64_t rows, int64_t columns, int64_t depth, Rows<T> left,
                                 const NumberOf<K>* right, SumOf<K>* c, int64_t ldc, bool add) {
  const int64_t steps = (depth + K::numbers - 1) / K::numbers;
  multiply<K>(rows, columns, steps, left.data, left.stride, right, steps * kPanel<SumOf<K>>, c, ldc,
              add);
}
