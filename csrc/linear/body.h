// The products kernel for one instruction set; see each_isa.h.
#include "../vector.h"

constexpr int64_t kDepth = 256;          // of panels: a right one stays in the L1 cache
constexpr int64_t kTiles = 16;           // of rows at a time
constexpr int64_t kRows = kTiles * kTileRows;
constexpr int64_t kColumns = 96;         // of a task: with the panels of kRows rows in the L2 cache

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// Panels of a left operand lie depth block by depth block, so that a block is read in one run.
template <class A>
static A* left_panels(const Products& c, int64_t i, int64_t row, int64_t p) {
  const int64_t rows = ceil_div(c.rows, kRows) * kRows;
  return static_cast<A*>(c.panels) + i * rows * c.depth + p * rows +
         row * at_most(c.depth - p, kDepth);
}

template <class A>
static int64_t right_size(const Products& c) {
  return padded<A>(at_most(c.columns, kColumns)) * c.depth;
}

template <class A>
static ProductsPlan plan_of(const Products& c) {
  const int64_t size = sizeof(A), blocks = ceil_div(c.rows, kRows);
  return {ceil_div(c.columns, kColumns), blocks, c.left_count * blocks * kRows * c.depth * size,
          c.left_count * blocks, (kRows * kColumns + c.right_count * right_size<A>(c)) * size};
}

// Panels `width` wide of n lines, each of `depth` numbers: the lines lie `line` apart, the numbers
// of each `along`, and one of the two is 1.
template <int width, class T, class A>
static void pack_lines(int64_t n, int64_t depth, const T* x, int64_t line, int64_t along,
                       A* panels) {
  if (along == 1) {
    pack_transposed<A, width>(n, depth, x, line, panels);
  } else {
    pack<A, width>(depth, n, x, along, panels);
  }
}

template <class T, class A>
static void pack_task(const Products& c, int64_t task) {
  const int64_t blocks = ceil_div(c.rows, kRows), i = task / blocks, row = task % blocks * kRows;
  const Matrix& x = c.lefts[i];
  for (int64_t p = 0; p < c.depth; p += kDepth) {
    pack_lines<kTileRows>(at_most(c.rows - row, kRows), at_most(c.depth - p, kDepth),
                          static_cast<const T*>(x.data) + row * x.row + p * x.column, x.row,
                          x.column, left_panels<A>(c, i, row, p));
  }
}

// sums[rows][kColumns] += left right, `depth` deep; beside each tile some of the next right panel is
// fetched.
template <class A>
static void multiply_block(int64_t rows, int64_t columns, int64_t depth, const A* left,
                           const A* right, int64_t stride, A* sums) {
  constexpr int64_t line = 64 / sizeof(A), ahead = kDepth * kPanel<A> / line / kTiles;
  for (int64_t j = 0; j < columns; j += kPanel<A>, right += stride) {
    const A* next = right + stride;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      for (int64_t l = 0; l < ahead; ++l, next += line) __builtin_prefetch(next);
      tile<A, kTileRows, true>(depth, left + i * depth, kTileRows, right, sums + i * kColumns + j,
                               kColumns, true);
    }
  }
}

template <class T, class A>
static void block_task(const Products& c, int64_t task, A* sums) {
  const int64_t j = task / c.parts * kColumns, columns = at_most(c.columns - j, kColumns);
  const int64_t blocks = ceil_div(c.rows, kRows), part = task % c.parts;
  const int64_t end = blocks * (part + 1) / c.parts * kRows, size = right_size<A>(c);
  A* const rights = sums + kRows * kColumns;
  for (int64_t r = 0; r < c.right_count; ++r) {
    const Matrix& x = c.rights[r];
    pack_lines<kPanel<A>>(columns, c.depth, static_cast<const T*>(x.data) + j * x.column, x.column,
                          x.row, rights + r * size);
  }
  for (int64_t i = blocks * part / c.parts * kRows; i < end; i += kRows) {
    const int64_t rows = at_most(c.rows - i, kRows);
    for (int64_t s = 0; s < c.sum_count; ++s) {
      const T* const bias = static_cast<const T*>(c.sums[s].bias);
      A start[kColumns] = {};
      for (int64_t l = 0; bias && l < columns; ++l) start[l] = load<A>(bias[j + l]);
      for (int64_t row = 0; row < ceil_div(rows, kTileRows) * kTileRows; ++row) {
        __builtin_memcpy(sums + row * kColumns, start, sizeof(start));
      }
      for (int64_t t = 0; t < c.term_count; ++t) {
        if (c.terms[t].sum != s) continue;
        for (int64_t p = 0; p < c.depth; p += kDepth) {
          multiply_block(rows, columns, at_most(c.depth - p, kDepth),
                         left_panels<A>(c, c.terms[t].left, i, p),
                         rights + c.terms[t].right * size + p * kPanel<A>, c.depth * kPanel<A>,
                         sums);
        }
      }
      narrow(rows, columns, sums, kColumns, static_cast<T*>(c.sums[s].out) + i * c.columns + j,
             c.columns);
    }
  }
}

static ProductsPlan plan(const Products& c) {
  return c.type == Type::f64 ? plan_of<double>(c) : plan_of<float>(c);
}

static void pack_one(const Products& c, int64_t task) {
  switch (c.type) {
    case Type::f64: return pack_task<double, double>(c, task);
    case Type::f32: return pack_task<float, float>(c, task);
    case Type::f16: return pack_task<Half, float>(c, task);
    case Type::bf16: return pack_task<BFloat16, float>(c, task);
  }
}

static void block(const Products& c, int64_t task, void* scratch) {
  switch (c.type) {
    case Type::f64: return block_task<double>(c, task, static_cast<double*>(scratch));
    case Type::f32: return block_task<float>(c, task, static_cast<float*>(scratch));
    case Type::f16: return block_task<Half>(c, task, static_cast<float*>(scratch));
    case Type::bf16: return block_task<BFloat16>(c, task, static_cast<float*>(scratch));
  }
}
