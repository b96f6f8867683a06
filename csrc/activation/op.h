// The types of the activation op of csrc/schema.cpp, for every device and for autograd.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "formula.h"

namespace tangentfast {

// dx, dbias, dgate, dgate_bias of each tangent, one after the other.
using ActivationTangents = c10::List<std::optional<at::Tensor>>;
constexpr size_t kActivationRow = 4;

// y, dys
using ActivationResult = std::tuple<at::Tensor, std::vector<at::Tensor>>;
// x, bias, gate, gate_bias, kind, tangents
using ActivationOp = ActivationResult(const at::Tensor&, const std::optional<at::Tensor>&,
                                      const std::optional<at::Tensor>&,
                                      const std::optional<at::Tensor>&, c10::string_view,
                                      const ActivationTangents&);

inline Activation activation_named(c10::string_view kind) {
  if (kind == "gelu") return Activation::gelu;
  if (kind == "gelu_tanh") return Activation::gelu_tanh;
  if (kind == "quick_gelu") return Activation::quick_gelu;
  if (kind == "silu") return Activation::silu;
  TORCH_CHECK_VALUE(kind == "sigmoid", "activation_jvp: kind is '", kind,
                    "', expected gelu, gelu_tanh, quick_gelu, silu or sigmoid");
  return Activation::sigmoid;
}

}  // namespace tangentfast
