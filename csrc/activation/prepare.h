// What an activation checks and allocates before its loops, on every device.
#pragma once

#include <ATen/Functions.h>
#include <c10/util/string_view.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "kernel.h"

namespace tangentfast::activation {

using Result = std::tuple<at::Tensor, std::vector<at::Tensor>>;  // y, dy

inline Activation activation_named(c10::string_view kind) {
  if (kind == "gelu") return Activation::gelu;
  if (kind == "gelu_tanh") return Activation::gelu_tanh;
  TORCH_CHECK_VALUE(kind == "silu", "activation_jvp: kind is '", kind,
                    "', expected gelu, gelu_tanh or silu");
  return Activation::silu;
}

// The step from row to row where `tensor` is rows of contiguous numbers at equal steps; else -1.
inline int64_t row_stride(const at::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.is_contiguous()) return last < 0 ? 1 : tensor.size(last);
  if (tensor.size(last) != 1 && tensor.stride(last) != 1) return -1;
  int64_t stride = -1, expected = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (stride < 0) {
      stride = tensor.stride(d);
    } else if (tensor.stride(d) != expected) {
      return -1;
    }
    expected = tensor.stride(d) * tensor.size(d);
  }
  return stride < 0 ? tensor.size(last) : stride;
}

// Checks, allocates, and calls loop(item, number of elements) for the numbers.
template <class Loop>
Result activation_jvp(const at::Tensor& x, c10::string_view kind, at::TensorList dx,
                      at::Device device, const Loop& loop) {
  constexpr char op[] = "activation_jvp";
  Item item{};
  item.kind = activation_named(kind);
  check_tensor(op, "x", x, device);
  for (size_t k = 0; k < dx.size(); ++k) {
    check_tensor(op, indexed("dx", k), dx[k], device);
    check_same_dtype(op, indexed("dx", k), dx[k], "x", x);
    check_same_shape(op, indexed("dx", k), dx[k], "x", x);
  }
  item.type = type_of(x);
  const int64_t columns = x.dim() ? x.size(-1) : 1;
  bool whole = true;  // all is contiguous, and read as a single row
  std::vector<at::Tensor> copies;
  const auto rows = [&](const at::Tensor& tensor) -> Rows {
    const int64_t stride = row_stride(tensor);
    if (stride < 0) {
      copies.push_back(tensor.contiguous());
      return {copies.back().const_data_ptr(), columns};
    }
    whole = whole && stride == columns;
    return {tensor.const_data_ptr(), stride};
  };
  const auto empty = [&] { return at::empty(x.sizes(), x.options()); };
  const at::Tensor y = empty();
  item.x = rows(x);
  item.y = y.mutable_data_ptr();
  std::vector<at::Tensor> dy;
  std::vector<Tangent> tangents;
  for (const at::Tensor& tangent : dx) {
    dy.push_back(empty());
    tangents.push_back({rows(tangent), dy.back().mutable_data_ptr()});
  }
  item.columns = whole ? x.numel() : columns;
  item.tangents = tangents.data();
  item.count = tangents.size();
  loop(item, x.numel());
  return {y, dy};
}

}  // namespace tangentfast::activation
