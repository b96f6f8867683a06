// The products kernel for one instruction set; see each_isa.h.
#include "../vector.h"
#include "panels.h"

// In steps of a panel, each of one number, or of a pair of them.
constexpr int64_t kDepth = 256;          // of panels: a right one stays in the L1 cache
constexpr int64_t kTiles = 16;           // of kTileRows rows at a time
constexpr int64_t kRows = kTiles * kTileRows;
constexpr int64_t kColumns = 96;         // of a task: with the panels of kRows rows in the L2 cache

// The processor fetches ahead within a page, of which a tile of a left panel fills two: it is told
// of the next one.
template <class K>
constexpr int kAhead = 2048 / sizeof(NumberOf<K>);

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

static int64_t row_tiles(const Products& c) { return ceil_div(c.rows, kTileRows); }

template <class K>
static int64_t steps(const Products& c) {
  return ceil_div(c.depth, K::numbers);
}

// Panels of a left operand lie depth block by depth block, so that a block is read in one run.
template <class K>
static NumberOf<K>* left_panels(const Products& c, int64_t i, int64_t row, int64_t p) {
  const int64_t rows = row_tiles(c) * kTileRows;
  return static_cast<NumberOf<K>*>(c.panels) + i * rows * steps<K>(c) + p * rows +
         row * at_most(steps<K>(c) - p, kDepth);
}

template <class K>
static int64_t right_size(const Products& c) {
  return padded<SumOf<K>>(at_most(c.columns, kColumns)) * steps<K>(c);
}

template <class K>
static ProductsPlan plan_of(const Products& c) {
  const int64_t size = sizeof(NumberOf<K>), tiles = row_tiles(c);
  return {ceil_div(c.columns, kColumns), tiles,
          c.left_count * tiles * kTileRows * steps<K>(c) * size,
          c.left_count * ceil_div(c.rows, kRows),
          (kRows * kColumns + c.right_count * right_size<K>(c)) * size};
}

template <class T, class K>
static void pack_task(const Products& c, int64_t task) {
  const int64_t blocks = ceil_div(c.rows, kRows), i = task / blocks, row = task % blocks * kRows;
  const Matrix& x = c.lefts[i];
  for (int64_t p = 0; p < steps<K>(c); p += kDepth) {
    const int64_t first = p * K::numbers;
    pack_lines<K, kTileRows>(at_most(c.rows - row, kRows),
                             at_most(c.depth - first, kDepth * K::numbers),
                             static_cast<const T*>(x.data) + row * x.row + first * x.column, x.row,
                             x.column, left_panels<K>(c, i, row, p));
  }
}

// sums[rows][kColumns] += left right, `depth` steps deep; beside each tile some of the next right
// panel is fetched, which after the last one is `after`.
template <class K>
static inline void multiply_block(int64_t rows, int64_t columns, int64_t depth,
                                  const NumberOf<K>* left, const NumberOf<K>* right, int64_t stride,
                                  const NumberOf<K>* after, SumOf<K>* sums) {
  using A = SumOf<K>;
  constexpr int64_t line = 64 / sizeof(A), ahead = kDepth * kPanel<A> / line / kTiles;
  for (int64_t j = 0; j < columns; j += kPanel<A>, right += stride) {
    const NumberOf<K>* next = j + kPanel<A> < columns ? right + stride : after;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      for (int64_t l = 0; l < ahead; ++l, next += line) __builtin_prefetch(next);
      tile<K, kTileRows, true, kAhead<K>>(depth, left + i * depth, kTileRows, right,
                                          sums + i * kColumns + j, kColumns, true);
    }
  }
}

template <class T, class K>
static void block_task(const Products& c, int64_t task, void* scratch) {
  using A = SumOf<K>;
  const int64_t j = task / c.parts * kColumns, columns = at_most(c.columns - j, kColumns);
  const int64_t tiles = row_tiles(c), part = task % c.parts, size = right_size<K>(c);
  const int64_t end = at_most(tiles * (part + 1) / c.parts * kTileRows, c.rows);
  A* const sums = static_cast<A*>(scratch);
  NumberOf<K>* const rights = static_cast<NumberOf<K>*>(scratch) + kRows * kColumns;
  for (int64_t r = 0; r < c.right_count; ++r) {
    const Matrix& x = c.rights[r];
    pack_lines<K, kPanel<A>>(columns, c.depth, static_cast<const T*>(x.data) + j * x.column,
                             x.column, x.row, rights + r * size);
  }
  for (int64_t i = tiles * part / c.parts * kTileRows; i < end; i += kRows) {
    const int64_t rows = at_most(end - i, kRows);
    for (int64_t s = 0; s < c.sum_count; ++s) {
      const T* const bias = static_cast<const T*>(c.sums[s].bias);
      A start[kColumns] = {};
      for (int64_t l = 0; bias && l < columns; ++l) start[l] = load<A>(bias[j + l]);
      for (int64_t row = 0; row < ceil_div(rows, kTileRows) * kTileRows; ++row) {
        __builtin_memcpy(sums + row * kColumns, start, sizeof(start));
      }
      for (int64_t t = 0; t < c.term_count; ++t) {
        if (c.terms[t].sum != s) continue;
        const NumberOf<K>* right = rights + c.terms[t].right * size;
        for (int64_t p = 0; p < steps<K>(c); p += kDepth, right += kDepth * kPanel<A>) {
          multiply_block<K>(rows, columns, at_most(steps<K>(c) - p, kDepth),
                            left_panels<K>(c, c.terms[t].left, i, p), right,
                            steps<K>(c) * kPanel<A>, right + kDepth * kPanel<A>, sums);
        }
      }
      narrow(rows, columns, sums, kColumns, static_cast<T*>(c.sums[s].out) + i * c.columns + j,
             c.columns);
    }
  }
}

static ProductsPlan plan(const Products& c) {
  if (c.type == Type::f64) return plan_of<Whole<double>>(c);
  if (c.type == Type::bf16) return plan_of<Exact16>(c);
  return c.narrow && c.type == Type::f32 ? plan_of<Rounded16>(c) : plan_of<Whole<float>>(c);
}

static void pack_one(const Products& c, int64_t task) {
  switch (c.type) {
    case Type::f64: return pack_task<double, Whole<double>>(c, task);
    case Type::f32:
      return c.narrow ? pack_task<float, Rounded16>(c, task)
                      : pack_task<float, Whole<float>>(c, task);
    case Type::f16: return pack_task<Half, Whole<float>>(c, task);
    case Type::bf16: return pack_task<BFloat16, Exact16>(c, task);
  }
}

static void block(const Products& c, int64_t task, void* scratch) {
  switch (c.type) {
    case Type::f64: return block_task<double, Whole<double>>(c, task, scratch);
    case Type::f32:
      return c.narrow ? block_task<float, Rounded16>(c, task, scratch)
                      : block_task<float, Whole<float>>(c, task, scratch);
    case Type::f16: return block_task<Half, Whole<float>>(c, task, scratch);
    case Type::bf16: return block_task<BFloat16, Exact16>(c, task, scratch);
  }
}
