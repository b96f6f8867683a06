// Numbers in any storage type, for the C++ tests of kernels.
#pragma once

#include <random>
#include <vector>

#include "scalar.h"

namespace tangentfast {

// Numbers stored in one of the four types.
struct Array {
  Type type;
  std::vector<double> f64;
  std::vector<float> f32;
  std::vector<Half> f16;
  std::vector<BFloat16> bf16;

  Array(Type stored_as, const std::vector<double>& values) : type(stored_as) {
    f64 = values;
    for (const double x : values) {
      f32.push_back(static_cast<float>(x));
      f16.emplace_back();
      store(x, f16.back());
      bf16.emplace_back();
      store(x, bf16.back());
    }
  }

  void* data() {
    switch (type) {
      case Type::f64: return f64.data();
      case Type::f32: return f32.data();
      case Type::f16: return f16.data();
      default: return bf16.data();
    }
  }

  double operator[](size_t i) const {
    switch (type) {
      case Type::f64: return f64[i];
      case Type::f32: return f32[i];
      case Type::f16: return to_float(f16[i]);
      default: return to_float(bf16[i]);
    }
  }
};

constexpr Type kTypes[] = {Type::f64, Type::f32, Type::f16, Type::bf16};
inline std::mt19937 generator(1);

inline Array random_array(Type type, size_t size) {
  std::normal_distribution<double> normal;
  std::vector<double> values(size);
  for (double& x : values) x = normal(generator);
  return Array(type, values);
}

inline double rounded(double x, Type type) { return Array(type, {x})[0]; }

}  // namespace tangentfast
