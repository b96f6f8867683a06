// The merge and gram kernels against loops written out in double, for every mix of types.
#include "merge/kernel.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "isa.h"
#include "testing.h"
#include "testing_array.h"

using namespace tangentfast;

// b + sum of alpha v, as the kernel promises it: rounded once from twice the digits.
double expected_sum(Sum sum, double base, const std::vector<Term>& terms,
                    const std::vector<Array>& vectors, size_t i) {
  if (sum == Sum::twice) {
#if defined(__SIZEOF_FLOAT128__)
    using Exact = __float128;  // 113 bits, more than the pair has
#else
    using Exact = long double;
#endif
    Exact total = 0;
    for (size_t k = 0; k < terms.size(); ++k) total += Exact(terms[k].alpha) * Exact(vectors[k][i]);
    return static_cast<double>(Exact(base) + total);
  }
  double total = -0.0;
  for (size_t k = 0; k < terms.size(); ++k) {
    if (sum == Sum::f64) {
      total += terms[k].alpha * vectors[k][i];
    } else {
      const float product = static_cast<float>(terms[k].alpha) * static_cast<float>(vectors[k][i]);
      total = static_cast<float>(total) + product;
    }
  }
  return sum == Sum::f64 ? base + total : static_cast<float>(base) + static_cast<float>(total);
}

constexpr double kGap = 77;  // what lies between elements, and must stay

// Elements (i, j) of [rows, columns] at i * step + j * stride.
Array spread(const Array& from, int64_t rows, int64_t columns, int64_t step, int64_t stride,
             size_t size) {
  std::vector<double> to(size, kGap);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * step + j * stride] = from[i * columns + j];
  }
  return Array(from.type, to);
}

enum class Lie { flat, turned, gaps };

void check_merge(Type base_type, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                 size_t count, bool alike, Lie lie) {
  const size_t size = rows * columns;
  const Array before = random_array(base_type, size);
  std::vector<Array> vectors, stored;
  for (size_t k = 0; k < count; ++k) {
    // Runs of 3 of a type, or one long run: all widths occur as `count` grows.
    vectors.push_back(random_array(alike ? base_type : kTypes[(k / 3 + size + 1) % 4], size));
  }
  // The base by rows, in gaps of 2 or dense; the vectors by rows and columns in turn.
  const int64_t gap = lie == Lie::gaps ? 2 : 1;
  std::vector<int64_t> layout{rows, columns, columns * gap, gap};
  Array base = spread(before, rows, columns, columns * gap, gap, size * gap);
  std::vector<Term> terms;
  for (size_t k = 0; k < count; ++k) {
    const bool turned = lie != Lie::flat && k % 2 == 0;
    layout.insert(layout.end(), {turned ? 1 : columns, turned ? rows : 1});
    stored.push_back(spread(vectors[k], rows, columns, turned ? 1 : columns, turned ? rows : 1, size));
  }
  for (size_t k = 0; k < count; ++k) {
    terms.push_back({stored[k].data(), stored[k].type, 0.1 * (k + 1) - 0.25});
  }
  const Sum sum = sum_of(base_type, terms.data(), count);
  const bool strided = lie != Lie::flat;
  merge_kernel({base.data(), base_type, sum, rows * columns, terms.data(),
                static_cast<int64_t>(count), strided ? 2 : 0, layout.data(), layout.data() + 2},
               begin, end);
  for (int64_t i = 0; i < rows * columns; ++i) {
    double expected = before[i];
    if (i >= begin && i < end) {
      expected = rounded(expected_sum(sum, expected, terms, vectors, i), base_type);
    }
    const double got = base[i * gap];
    CHECK(gap == 1 || base[i * gap + 1] == kGap, "merge wrote between elements");
    CHECK(got == expected, "merge type %d of %lld x %lld, count %zu, lie %d, at %lld: %a, expected %a",
          int(base_type), (long long)rows, (long long)columns, count, int(lie), (long long)i, got,
          expected);
  }
}

void check_gram(size_t size, size_t count) {
  std::vector<Array> arrays;
  std::vector<Vector> vectors;
  for (size_t k = 0; k < count; ++k) arrays.push_back(random_array(kTypes[k % 4], size));
  for (Array& array : arrays) vectors.push_back({array.data(), array.type});
  const double unset = -12345;
  std::vector<double> out(count * count, unset), scratch(gram_scratch(count), NAN);
  gram_kernel(vectors.data(), count, 0, size, scratch.data(), out.data());
  for (size_t i = 0; i < count; ++i) {
    for (size_t j = 0; j < count; ++j) {
      long double expected = 0, scale = 1;
      for (size_t n = 0; n < size; ++n) {
        expected += static_cast<long double>(arrays[i][n]) * arrays[j][n];
        scale += std::fabs(arrays[i][n] * arrays[j][n]);
      }
      if (j > i) expected = unset;
      CHECK(std::fabs(out[i * count + j] - double(expected)) <= 1e-14 * double(scale),
            "gram size %zu at %zu, %zu: %a, expected %a", size, i, j, out[i * count + j],
            double(expected));
    }
  }
}

int main() {
  std::printf("isa: %s\n", isa_name());
  for (const Type type : kTypes) {
    for (const int64_t size : {0, 1, 7, 31, 64, 2047, 4097, 9001}) {
      for (const size_t count : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 19, 40}) {
        for (const bool alike : {false, true}) {
          check_merge(type, 1, size, 0, size, count, alike, Lie::flat);
          if (size > 7) check_merge(type, 1, size, 3, size - 2, count, alike, Lie::flat);
        }
      }
    }
    for (const int64_t rows : {1, 3, 64}) {
      for (const int64_t columns : {1, 5, 700}) {
        for (const size_t count : {1, 3, 8, 12, 19}) {
          for (const Lie lie : {Lie::turned, Lie::gaps}) {
            const int64_t size = rows * columns;
            check_merge(type, rows, columns, 0, size, count, true, lie);
            check_merge(type, rows, columns, size / 3, size - size / 4, count, false, lie);
          }
        }
      }
    }
  }
  for (const size_t size : {0, 1, 15, 16, 17, 255, 256, 257, 3000}) {
    for (const size_t count : {1, 2, 5, 8}) check_gram(size, count);
  }
  return FAILED();
}
