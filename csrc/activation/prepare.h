// What an activation checks and allocates before its loops, on every device.
#pragma once

#include <ATen/Functions.h>

#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "kernel.h"
#include "op.h"

namespace tangentfast {

constexpr char kActivationOp[] = "activation_jvp";

// `tensor` is like x, or a row of it where it is a `bias`.
inline void check_like(const std::string& name, const at::Tensor& tensor, const at::Tensor& x,
                       bool bias) {
  check_tensor(kActivationOp, name, tensor, x.device());
  check_same_dtype(kActivationOp, name, tensor, "x", x);
  check_sizes(kActivationOp, name, tensor, bias ? x.sizes().slice(x.dim() - 1) : x.sizes());
}

inline void check_activation(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& gate,
                             const std::optional<at::Tensor>& gate_bias,
                             const ActivationTangents& tangents, at::Device device) {
  static const char* const names[kActivationRow] = {"dx", "dbias", "dgate", "dgate_bias"};
  check_tensor(kActivationOp, "x", x, device);
  TORCH_CHECK_VALUE(x.dim() > 0 || !(bias || gate_bias), kActivationOp,
                    ": x is a single number, expected one dimension or more beside a bias");
  TORCH_CHECK_VALUE(gate || !gate_bias, kActivationOp,
                    ": gate_bias is given, expected none without a gate");
  if (bias) check_like("bias", *bias, x, true);
  if (gate) check_like("gate", *gate, x, false);
  if (gate_bias) check_like("gate_bias", *gate_bias, x, true);
  const bool present[kActivationRow] = {true, bias.has_value(), gate.has_value(),
                                        gate_bias.has_value()};
  TORCH_CHECK_VALUE(tangents.size() % kActivationRow == 0, kActivationOp, ": tangents has ",
                    tangents.size(),
                    " entries, expected dx, dbias, dgate, dgate_bias for each of K tangents");
  for (size_t i = 0; i < tangents.size(); ++i) {
    const std::optional<at::Tensor> tangent = tangents.get(i);
    if (!tangent) continue;
    const size_t which = i % kActivationRow;
    const std::string name =
        "tangents[" + std::to_string(i / kActivationRow) + "]." + names[which];
    TORCH_CHECK_VALUE(present[which], kActivationOp, ": ", name,
                      " is given, expected none where there is no ", names[which] + 1);
    check_like(name, *tangent, x, which % 2 == 1);
  }
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

// What the kernel reads, and the copies that it needs of tensors laid out otherwise.
class ActivationReader {
 public:
  explicit ActivationReader(const at::Tensor& x) : columns_(x.dim() ? x.size(-1) : 1) {}

  Rows rows(const std::optional<at::Tensor>& tensor) {
    if (!tensor) return {nullptr, 0};
    int64_t stride = row_stride(*tensor);
    if (stride >= 0) return {tensor->const_data_ptr(), note(stride)};
    copies_.push_back(tensor->contiguous());
    return {copies_.back().const_data_ptr(), columns_};
  }

  Rows row(const std::optional<at::Tensor>& bias) {
    if (!bias) return {nullptr, 0};
    plain_ = false;
    copies_.push_back(bias->contiguous());
    return {copies_.back().const_data_ptr(), 0};
  }

  ActivationInput input(const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& bias,
                        const std::optional<at::Tensor>& gate,
                        const std::optional<at::Tensor>& gate_bias) {
    return {rows(x), row(bias), rows(gate), row(gate_bias)};
  }

  // Whether everything is contiguous and has no bias, so that it may be read as a single row.
  bool plain() const { return plain_; }

 private:
  int64_t note(int64_t stride) {
    plain_ = plain_ && stride == columns_;
    return stride;
  }

  int64_t columns_;
  bool plain_ = true;
  std::vector<at::Tensor> copies_;
};

// Checks, allocates, and calls loop(item, number of elements) for the numbers.
template <class Loop>
ActivationResult activation_jvp(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& gate,
                                const std::optional<at::Tensor>& gate_bias, c10::string_view kind,
                                const ActivationTangents& tangents, at::Device device,
                                const Loop& loop) {
  ActivationItem item{};
  item.kind = activation_named(kind);
  check_activation(x, bias, gate, gate_bias, tangents, device);
  item.type = type_of(x);
  const auto empty = [&] { return at::empty(x.sizes(), x.options()); };
  at::Tensor y = empty();
  std::vector<at::Tensor> dys;
  ActivationReader reader(x);
  item.in = reader.input(x, bias, gate, gate_bias);
  item.y = y.mutable_data_ptr();
  std::vector<ActivationTangent> rows;
  rows.reserve(tangents.size() / kActivationRow);
  for (size_t i = 0; i < tangents.size(); i += kActivationRow) {
    dys.push_back(empty());
    rows.push_back({reader.input(tangents.get(i), tangents.get(i + 1), tangents.get(i + 2),
                                 tangents.get(i + 3)),
                    dys.back().mutable_data_ptr()});
  }
  item.columns = reader.plain() ? x.numel() : x.size(-1);
  item.tangents = rows.data();
  item.count = rows.size();
  loop(item, x.numel());
  return {y, dys};
}

}  // namespace tangentfast
