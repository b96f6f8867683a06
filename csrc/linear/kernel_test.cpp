// The products kernel against loops written out in double: every type, ragged sizes, both layouts.
#include "linear/kernel.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "testing.h"
#include "testing_array.h"

using namespace tangentfast;
using namespace tangentfast::linear;

struct Size {
  int64_t rows, columns, depth;
};

// A matrix stored row by row, or column by column, and the operand that it is taken as.
struct Stored {
  Array numbers;
  int64_t row, column;
  std::vector<double> operands;

  Stored(Type type, bool narrow, int64_t rows, int64_t columns, bool turned)
      : numbers(random_array(type, rows * columns)),
        row(turned ? 1 : columns),
        column(turned ? rows : 1) {
    for (int64_t i = 0; i < rows * columns; ++i) {
      operands.push_back(narrow ? rounded(numbers[i], Type::bf16) : numbers[i]);
    }
  }

  Matrix matrix() { return {numbers.data(), row, column}; }
  double at(int64_t i, int64_t j) const { return operands[i * row + j * column]; }
};

void* memory(int64_t bytes) { return std::aligned_alloc(64, (bytes + 64) / 64 * 64); }

void run(Products& call, int64_t parts) {
  const ProductsPlan plan = products_plan(call);
  call.parts = std::min(parts, plan.row_tiles);
  call.panels = memory(plan.panel_bytes);
  void* const scratch = memory(plan.scratch_bytes);
  for (int64_t i = 0; i < plan.packing; ++i) products_pack(call, i);
  for (int64_t i = plan.column_blocks * call.parts; i-- > 0;) products_block(call, i, scratch);
  std::free(call.panels);
  std::free(scratch);
}

// What a sum of n products may be off by, in units of the sum of their sizes: each product and each
// addition is off by half a unit in the last place of a result, which at most n + 1 roundings reach
// (Higham 2002, section 3.1). The sum that we compare with is off by as much in double.
double summation_error(Type type, int64_t n) {
  return static_cast<double>(n + 2) * (type == Type::f64 ? 0x1p-52 : 0x1p-24 * 1.001);
}

// Half a unit in the last place of what a result is rounded to at last.
double output_error(Type type) {
  return type == Type::f16 ? 0x1p-11 : type == Type::bf16 ? 0x1p-8 : 0;
}

// y = x w + b and dy = dx w + x dw, as in a linear layer.
void test(Type type, bool narrow, const Size& n, bool left_turned, bool right_turned) {
  Stored x(type, narrow, n.rows, n.depth, left_turned);
  Stored dx(type, narrow, n.rows, n.depth, !left_turned);
  Stored w(type, narrow, n.depth, n.columns, right_turned);
  Stored dw(type, narrow, n.depth, n.columns, !right_turned);
  Array b = random_array(type, n.columns);
  Array y = random_array(type, n.rows * n.columns), dy(y), again(y), dagain(y);
  const Matrix lefts[] = {x.matrix(), dx.matrix()}, rights[] = {w.matrix(), dw.matrix()};
  const Term terms[] = {{1, 0, 1}, {0, 0, 0}, {1, 1, 0}};
  Sum sums[] = {{b.data(), y.data()}, {nullptr, dy.data()}};
  Products call{type, narrow, n.rows, n.columns, n.depth, lefts, 2, rights, 2, sums, 2, terms, 3};
  run(call, 1);
  const auto check = [&](const char* name, int64_t i, int64_t j, double got, double want,
                         double size, int64_t count) {
    const double bar = summation_error(type, count) * size + output_error(type) * std::abs(want);
    CHECK(std::abs(got - want) <= bar, "type %d, narrow %d: %s[%d][%d] is %g, expected %g",
          int(type), int(narrow), name, int(i), int(j), got, want);
  };
  for (int64_t i = 0; i < n.rows; ++i) {
    for (int64_t j = 0; j < n.columns; ++j) {
      double want = b[j], dwant = 0, size = std::abs(b[j]), dsize = 0;
      for (int64_t p = 0; p < n.depth; ++p) {
        const double term = x.at(i, p) * w.at(p, j);
        const double left = dx.at(i, p) * w.at(p, j), right = x.at(i, p) * dw.at(p, j);
        want += term;
        dwant += left + right;
        size += std::abs(term);
        dsize += std::abs(left) + std::abs(right);
      }
      check("y", i, j, y[i * n.columns + j], want, size, n.depth + 1);
      check("dy", i, j, dy[i * n.columns + j], dwant, dsize, 2 * n.depth);
    }
  }
  // However the rows are shared out, a result has the same bits.
  sums[0].out = again.data();
  sums[1].out = dagain.data();
  for (const int64_t parts : {3, 1000}) {
    run(call, parts);
    for (int64_t i = 0; i < n.rows * n.columns; ++i) {
      CHECK(y[i] == again[i] && dy[i] == dagain[i], "%d parts differ at %d", int(parts), int(i));
    }
  }
}

// One number a line, the last of it, times two: exact, so that the rounding of operands is all there
// is. Ties go to even; infinities, NaN and what overflows bfloat16 pass through.
void test_exactly(Type type, bool narrow, int64_t depth, bool turned) {
  constexpr int64_t lines = 45;
  const double infinity = INFINITY;
  const double values[] = {1,        1 + 0x1p-8, 1 + 3 * 0x1p-8, -3,
                           infinity, -infinity,  NAN,            0x1.ffffp127};
  for (const double value : values) {
    std::vector<double> numbers(lines * depth);
    for (int64_t i = 0; i < lines; ++i) {
      numbers[turned ? (depth - 1) * lines + i : i * depth + depth - 1] = value;
    }
    Array x(type, numbers), twos(type, std::vector<double>(lines * depth, 2));
    Array y = random_array(type, lines * lines), z(y);
    const double stored = x[turned ? (depth - 1) * lines : depth - 1];
    const double operand = narrow ? rounded(stored, Type::bf16) : stored;
    const double want = rounded(2 * operand, type);
    const int64_t line = turned ? 1 : depth, along = turned ? lines : 1;
    const Matrix left{x.data(), line, along}, right{x.data(), along, line};
    const Matrix two_left{twos.data(), depth, 1}, two_right{twos.data(), lines, 1};
    const Term term{0, 0, 0};
    const Sum sums[] = {{nullptr, y.data()}, {nullptr, z.data()}};
    Products call{type, narrow, lines, lines, depth, &left, 1, &two_right, 1, sums, 1, &term, 1};
    run(call, 1);
    call.lefts = &two_left;
    call.rights = &right;
    call.sums = sums + 1;
    run(call, 1);
    for (int64_t i = 0; i < lines * lines; ++i) {
      for (const double got : {y[i], z[i]}) {
        CHECK(got == want || (std::isnan(got) && std::isnan(want)),
              "type %d, narrow %d, depth %d: 2 * %g is %g, expected %g", int(type), int(narrow),
              int(depth), value, got, want);
      }
    }
  }
}

int main() {
  const struct {
    Type type;
    bool narrow;
  } ways[] = {{Type::f64, false}, {Type::f32, false}, {Type::f16, false}, {Type::bf16, false},
              {Type::f32, true},  {Type::bf16, true}};
  const Size sizes[] = {{1, 1, 1}, {7, 97, 5}, {100, 33, 300}, {389, 200, 257}, {6, 16, 1035}};
  for (const auto& way : ways) {
    for (const bool left : {false, true}) {
      for (const Size& n : sizes) {
        for (const bool right : {false, true}) test(way.type, way.narrow, n, left, right);
      }
      for (const int64_t depth : {1, 2, 3, 33, 600}) {
        test_exactly(way.type, way.narrow, depth, left);
      }
    }
  }
  return FAILED();
}
