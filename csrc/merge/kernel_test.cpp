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

void check_merge(Type base_type, size_t size, int64_t begin, int64_t end, size_t count) {
  Array base = random_array(base_type, size);
  std::vector<Array> vectors;
  std::vector<Term> terms;
  bool wide = base_type == Type::f64;
  for (size_t k = 0; k < count; ++k) {
    // Runs of 3 of a type, or one long run: all widths of axpy_terms occur as `count` grows.
    const Type type = count > 6 ? Type::f32 : kTypes[(k / 3 + size + 1) % 4];
    wide |= type == Type::f64;
    vectors.push_back(random_array(type, size));
  }
  for (size_t k = 0; k < count; ++k) {
    terms.push_back({vectors[k].data(), vectors[k].type, 0.1 * (k + 1) - 0.25});
  }
  const Array before = base;
  merge_kernel({base.data(), base_type, wide, static_cast<int64_t>(size), terms.data(),
                static_cast<int64_t>(count)}, begin, end);
  for (size_t i = 0; i < size; ++i) {
    const bool inside = static_cast<int64_t>(i) >= begin && static_cast<int64_t>(i) < end;
    double expected = before[i];
    for (size_t k = 0; inside && k < count; ++k) {
      if (wide) {
        expected += terms[k].alpha * vectors[k][i];
      } else {
        const float alpha = static_cast<float>(terms[k].alpha);
        const float product = alpha * static_cast<float>(vectors[k][i]);
        expected = static_cast<float>(expected) + product;
      }
    }
    if (inside) expected = rounded(expected, base_type);
    CHECK(base[i] == expected, "merge type %d size %zu count %zu at %zu: %a, expected %a",
          int(base_type), size, count, i, base[i], expected);
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
    for (const size_t size : {0, 1, 7, 31, 64, 2047, 2048, 5001}) {
      for (const size_t count : {0, 1, 2, 5, 6, 7, 19}) {
        check_merge(type, size, 0, size, count);
        if (size > 7) check_merge(type, size, 3, size - 2, count);
      }
    }
  }
  for (const size_t size : {0, 1, 15, 16, 17, 255, 256, 257, 3000}) {
    for (const size_t count : {1, 2, 5, 8}) check_gram(size, count);
  }
  return FAILED();
}
