// The types of the layer-norm ops of csrc/schema.cpp, for every device and for autograd.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace tangentfast {

// dx, dresidual, dweight, dbias of each tangent, one after the other.
using NormTangents = c10::List<std::optional<at::Tensor>>;
constexpr size_t kNormRow = 4;

struct NormRow {
  std::optional<at::Tensor> dx, dresidual, dweight, dbias;
};

inline NormRow norm_row(const NormTangents& tangents, size_t first) {
  return {tangents.get(first), tangents.get(first + 1), tangents.get(first + 2),
          tangents.get(first + 3)};
}

// y, mean, rstd, dys, sums
using LayerNormResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;
// y, rstd, dys, sums
using RmsNormResult =
    std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;

using LayerNormOp = LayerNormResult(const at::Tensor&, const std::optional<at::Tensor>&,
                                    at::IntArrayRef, const std::optional<at::Tensor>&,
                                    const std::optional<at::Tensor>&, double, const NormTangents&);
using RmsNormOp = RmsNormResult(const at::Tensor&, const std::optional<at::Tensor>&,
                                at::IntArrayRef, const std::optional<at::Tensor>&, double,
                                const NormTangents&);

}  // namespace tangentfast
