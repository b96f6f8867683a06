// Checks that every CPU and CUDA implementation calls before it reads or writes anything.
// Messages name the op and the argument, and say what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "scalar.h"

namespace tangentfast {

inline std::string indexed(const char* name, size_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

// A dense float64/32/16/bfloat16 tensor on `device`.
inline void check_tensor(const char* op, const std::string& name, const at::Tensor& tensor,
                         at::Device device) {
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, op, ": ", name, " has layout ",
                    tensor.layout(), ", expected a dense (strided) tensor");
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf ||
                       dtype == at::kBFloat16,
                   op, ": ", name, " has dtype ", dtype,
                   ", expected float64, float32, float16 or bfloat16");
  TORCH_CHECK_VALUE(tensor.device() == device, op, ": ", name, " is on ", tensor.device(),
                    ", expected ", device);
}

inline void check_same_shape(const char* op, const std::string& name, const at::Tensor& tensor,
                             const std::string& other_name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.sizes() == other.sizes(), op, ": ", name, " has shape ",
                    tensor.sizes(), ", ", other_name, " has ", other.sizes());
}

inline void check_sizes(const char* op, const std::string& name, const at::Tensor& tensor,
                        at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, op, ": ", name, " has shape ", tensor.sizes(),
                    ", expected ", sizes);
}

inline void check_same_dtype(const char* op, const std::string& name, const at::Tensor& tensor,
                             const std::string& other_name, const at::Tensor& other) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), op, ": ", name, " has dtype ",
                   tensor.scalar_type(), ", ", other_name, " has ", other.scalar_type());
}

// counts[i] consecutive entries of a list of `total` belong to row i.
inline void check_counts(const char* op, at::IntArrayRef counts, size_t rows, size_t total) {
  TORCH_CHECK_VALUE(counts.size() == rows, op, ": counts has ", counts.size(),
                    " entries, expected ", rows);
  int64_t sum = 0;
  for (const int64_t count : counts) {
    TORCH_CHECK_VALUE(count >= 0, op, ": counts holds ", count, ", expected none below 0");
    sum += count;
  }
  TORCH_CHECK_VALUE(sum == static_cast<int64_t>(total), op, ": counts sum to ", sum,
                    ", expected the number of vectors, ", total);
}

inline Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Type::f64;
    case at::kHalf: return Type::f16;
    case at::kBFloat16: return Type::bf16;
    default: return Type::f32;
  }
}

}  // namespace tangentfast
