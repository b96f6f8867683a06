// Blocks of rows in memory, for the bodies of the attention kernels.
using namespace tangentfast::attention;

// Query rows at a time: P and dS of a block stay in a 1 MB L2 cache.
static inline int64_t block_rows(int64_t keys) {
  const int64_t rows = 131072 / (keys > 0 ? keys : 1);
  return rows < 2 * kTileRows ? 2 * kTileRows : rows > 96 ? 96 : rows;
}

template <class T>
static inline const T* at(const Operand& x, int64_t n, int64_t h, int64_t row) {
  return static_cast<const T*>(x.data) + n * x.batch + h * x.head + row * x.row;
}

template <class A, class T>
static inline void widen(int64_t rows, int64_t columns, const T* x, int64_t stride, A scale, A* y) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t p = 0; p < columns; ++p) y[i * columns + p] = load<A>(x[i * stride + p]) * scale;
  }
}

template <class A>
static inline void add_row(int64_t n, const A* x, int64_t column, A* y) {
  if (column == 1) {
    for (int64_t j = 0; j < n; ++j) y[j] += x[j];
  } else {
    for (int64_t j = 0; j < n; ++j) y[j] += x[j * column];
  }
}
