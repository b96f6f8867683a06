// The products kernel against loops written out in double: every type, ragged sizes, both layouts.
#include "linear/kernel.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "testing.h"
#include "testing_array.h"

using namespace tangentfast;
using namespace tangentfast::linear;

struct Size {
  int64_t rows, columns, depth;
};

// A matrix stored row by row, or column by column.
struct Stored {
  Array numbers;
  int64_t row, column;

  Stored(Type type, int64_t rows, int64_t columns, bool turned)
      : numbers(random_array(type, rows * columns)),
        row(turned ? 1 : columns),
        column(turned ? rows : 1) {}

  Matrix matrix() { return {numbers.data(), row, column}; }
  double at(int64_t i, int64_t j) const { return numbers[i * row + j * column]; }
};

void* memory(int64_t bytes) { return std::aligned_alloc(64, (bytes + 64) / 64 * 64); }

void run(Products& call, int64_t parts) {
  const ProductsPlan plan = products_plan(call);
  call.parts = std::min(parts, plan.row_blocks);
  call.panels = memory(plan.panel_bytes);
  void* const scratch = memory(plan.scratch_bytes);
  for (int64_t i = 0; i < plan.packing; ++i) products_pack(call, i);
  for (int64_t i = plan.column_blocks * call.parts; i-- > 0;) products_block(call, i, scratch);
  std::free(call.panels);
  std::free(scratch);
}

// y = x w + b and dy = dx w + x dw, as in a linear layer.
void test(Type type, const Size& n, bool left_turned, bool right_turned, double tolerance,
          bool narrow = false) {
  Stored x(type, n.rows, n.depth, left_turned), dx(type, n.rows, n.depth, !left_turned);
  Stored w(type, n.depth, n.columns, right_turned), dw(type, n.depth, n.columns, !right_turned);
  Array b = random_array(type, n.columns);
  Array y = random_array(type, n.rows * n.columns), dy(y), again(y), dagain(y);
  const Matrix lefts[] = {x.matrix(), dx.matrix()}, rights[] = {w.matrix(), dw.matrix()};
  const Term terms[] = {{1, 0, 1}, {0, 0, 0}, {1, 1, 0}};
  Sum sums[] = {{b.data(), y.data()}, {nullptr, dy.data()}};
  Products call{type, narrow, n.rows, n.columns, n.depth, lefts, 2, rights, 2, sums, 2, terms, 3};
  run(call, 1);
  const double bar = tolerance * std::sqrt(static_cast<double>(n.depth));
  // Two operands with 8 binary digits: each is off by at most 2^-8 of it.
  const double rough = narrow ? 0x1p-7 + 0x1p-16 : 0;
  for (int64_t i = 0; i < n.rows; ++i) {
    for (int64_t j = 0; j < n.columns; ++j) {
      double want = b[j], dwant = 0, size = 0, dsize = 0;
      for (int64_t p = 0; p < n.depth; ++p) {
        const double term = x.at(i, p) * w.at(p, j);
        const double left = dx.at(i, p) * w.at(p, j), right = x.at(i, p) * dw.at(p, j);
        want += term;
        dwant += left + right;
        size += std::abs(term);
        dsize += std::abs(left) + std::abs(right);
      }
      const double got = y[i * n.columns + j], dgot = dy[i * n.columns + j];
      CHECK(std::abs(got - want) <= bar * (1 + std::abs(want)) + rough * size, "y[%d][%d] is %g, expected %g",
            int(i), int(j), got, want);
      CHECK(std::abs(dgot - dwant) <= bar * (1 + std::abs(dwant)) + rough * dsize, "dy[%d][%d] is %g, expected %g",
            int(i), int(j), dgot, dwant);
    }
  }
  // However the rows are shared out, a result has the same bits.
  sums[0].out = again.data();
  sums[1].out = dagain.data();
  run(call, 3);
  for (int64_t i = 0; i < n.rows * n.columns; ++i) {
    CHECK(y[i] == again[i] && dy[i] == dagain[i], "parts differ at %d", int(i));
  }
}

// Products are exact and sums of few of them, so that rounding the operands is all there is: the
// largest bfloat16 below one, odd depths, and what has no size.
void test_narrow_exactly() {
  const float infinity = INFINITY, values[] = {1.0f, 1.00390625f, 1.01171875f, -3.0f, infinity, NAN};
  const float rounded[] = {1.0f, 1.0f, 1.015625f, -3.0f, infinity, NAN};  // ties to even
  for (int64_t depth : {1, 2, 3, 33}) {
    for (int v = 0; v < 6; ++v) {
      std::vector<float> x(40 * depth), w(depth * 40, 2.0f), y(40 * 40);
      for (int64_t i = 0; i < 40; ++i) x[i * depth + depth - 1] = values[v];
      const Matrix left{x.data(), depth, 1}, right{w.data(), 40, 1};
      const Term term{0, 0, 0};
      const Sum sum{nullptr, y.data()};
      Products call{Type::f32, true, 40, 40, depth, &left, 1, &right, 1, &sum, 1, &term, 1};
      run(call, 1);
      const float want = 2 * rounded[v];
      CHECK(y[0] == want || (y[0] != y[0] && want != want), "narrow %g, depth %d: %g, expected %g",
            values[v], int(depth), y[0], want);
      CHECK(std::memcmp(&y[0], &y[40 * 40 - 1], 4) == 0, "first and last differ at %d", v);
    }
  }
}

int main() {
  test_narrow_exactly();
  const Size sizes[] = {{1, 1, 1}, {7, 97, 5}, {100, 33, 300}, {389, 200, 257}, {6, 16, 512}};
  for (const Size& n : sizes) {
    for (const bool left : {false, true}) {
      for (const bool right : {false, true}) {
        test(Type::f64, n, left, right, 1e-14);
        test(Type::f32, n, left, right, 3e-6);
        test(Type::f16, n, left, right, 1e-3);
        test(Type::bf16, n, left, right, 8e-3);
        test(Type::f32, n, left, right, 3e-6, true);
      }
    }
  }
  return FAILED();
}
