// Sums of matrix products over raw memory: no torch, no threads, no allocation.
//   C = bias + sum over its terms of A B
// Every A is first copied into panels, in the order in which they are read; then a block of columns
// of every C is one task, which copies each B's block into panels once for all C that need it (Goto
// and van de Geijn 2008, doi:10.1145/1356052.1356053). Copies have the type that is computed in.
#pragma once

#include <cstdint>

#include "../scalar.h"

namespace tangentfast::linear {

// Strides in elements; one of them is 1.
struct Matrix {
  const void* data;
  int64_t row, column;
};

struct Term {
  int64_t sum, left, right;  // indices of C, A and B
};

struct Sum {
  const void* bias;  // [columns], null: zero
  void* out;         // [rows][columns]
};

struct Products {
  Type type;    // computed in double for f64, float for the rest
  bool narrow;  // f32: operands are rounded to bfloat16; sums stay float
  int64_t rows, columns, depth;
  const Matrix* lefts;  // [rows][depth]
  int64_t left_count;
  const Matrix* rights;  // [depth][columns]
  int64_t right_count;
  const Sum* sums;
  int64_t sum_count;
  const Term* terms;
  int64_t term_count;
  int64_t parts = 1;       // tasks that share a block of columns, each with some of the rows
  void* panels = nullptr;  // of the lefts; aligned to 64
};

struct ProductsPlan {
  int64_t column_blocks, row_tiles;  // row_tiles: the most parts that are of use
  int64_t panel_bytes;
  int64_t packing;        // tasks of the first phase
  int64_t scratch_bytes;  // of one task of the second; aligned to 64
};

ProductsPlan products_plan(const Products& call);

// task < packing
void products_pack(const Products& call, int64_t task);

// task < column_blocks * parts. A result does not depend on the parts.
void products_block(const Products& call, int64_t task, void* scratch);

}  // namespace tangentfast::linear
