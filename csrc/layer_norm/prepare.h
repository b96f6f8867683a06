// What the norms check and allocate before their loops, on every device.
#pragma once

#include <ATen/Functions.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../checks.h"
#include "kernel.h"
#include "op.h"

namespace tangentfast {

// `tensor` as a contiguous row of `type`, null where there is none. The tensor that owns the memory,
// where a new one was needed, is kept in `owned`.
inline const void* norm_row_of(const std::optional<at::Tensor>& tensor, at::ScalarType type,
                               std::vector<at::Tensor>& owned) {
  if (!tensor) return nullptr;
  if (tensor->scalar_type() == type && tensor->is_contiguous()) return tensor->const_data_ptr();
  owned.push_back(tensor->to(type).contiguous());
  return owned.back().const_data_ptr();
}

inline void check_norm(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& residual,
                at::IntArrayRef shape, const std::optional<at::Tensor>& weight,
                const std::optional<at::Tensor>& bias, const NormTangents& tangents,
                at::Device device) {
  check_tensor(op, "x", x, device);
  const auto fits = [&](const std::string& name, const at::Tensor& tensor, at::IntArrayRef sizes) {
    check_tensor(op, name, tensor, device);
    check_sizes(op, name, tensor, sizes);
  };
  const auto like = [&](const std::string& name, const at::Tensor& tensor, const char* other_name,
                        const at::Tensor& other) {
    fits(name, tensor, other.sizes());
    check_same_dtype(op, name, tensor, other_name, other);
  };
  const auto at_end = x.sizes().slice(std::max<int64_t>(x.dim() - shape.size(), 0));
  TORCH_CHECK_VALUE(!shape.empty() && at_end == shape, op, ": normalized_shape is ", shape,
                    ", expected the last dimensions of x, which has shape ", x.sizes());
  if (residual) like("residual", *residual, "x", x);
  if (weight) fits("weight", *weight, shape);
  if (bias) fits("bias", *bias, shape);
  TORCH_CHECK_VALUE(tangents.size() % kNormRow == 0, op, ": tangents has ", tangents.size(),
                    " entries, expected dx, dresidual, dweight, dbias for each of K tangents");
  for (size_t i = 0; i < tangents.size(); i += kNormRow) {
    const auto name = [&](const char* which) {
      return std::string("tangents[") + std::to_string(i / kNormRow) + "]." + which;
    };
    const NormRow row = norm_row(tangents, i);
    TORCH_CHECK_VALUE(!row.dresidual || (row.dx && residual), op, ": ", name("dresidual"),
                      " is given, expected none without residual and dx; pass it as dx");
    TORCH_CHECK_VALUE(!row.dweight || weight, op, ": ", name("dweight"),
                      " is given, expected none where there is no weight");
    TORCH_CHECK_VALUE(!row.dbias || bias, op, ": ", name("dbias"),
                      " is given, expected none where there is no bias");
    if (row.dx) like(name("dx"), *row.dx, "x", x);
    if (row.dresidual) like(name("dresidual"), *row.dresidual, "x", x);
    if (row.dweight) fits(name("dweight"), *row.dweight, shape);
    if (row.dbias) fits(name("dbias"), *row.dbias, shape);
  }
}

// Checks, allocates, and calls loop(item, rows) for the numbers. With `narrow`, weights
// that are stored as x is stay so; otherwise they are widened to double or float.
template <class Loop>
LayerNormResult norm_jvp(const char* op, bool centered, const at::Tensor& x_given,
                         const std::optional<at::Tensor>& residual, at::IntArrayRef shape,
                         const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, double eps,
                         const NormTangents& tangents, at::Device device, bool narrow,
                         const Loop& loop) {
  check_norm(op, x_given, residual, shape, weight, bias, tangents, device);
  const at::Tensor x = x_given.contiguous();
  const int64_t size = c10::multiply_integers(shape);
  const int64_t rows = size ? x.numel() / size : 0;
  const auto acc = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<at::Tensor> owned;
  const auto stored_as_x = [&](const std::optional<at::Tensor>& row) {
    return !row || row->scalar_type() == x.scalar_type();
  };
  narrow = narrow && stored_as_x(weight) && stored_as_x(bias);
  for (size_t i = 0; i < tangents.size(); i += kNormRow) {
    const NormRow row = norm_row(tangents, i);
    narrow = narrow && stored_as_x(row.dweight) && stored_as_x(row.dbias);
  }
  const auto weights = narrow ? x.scalar_type() : acc;

  std::vector<int64_t> reduced(x.sizes().begin(), x.sizes().end());
  std::fill(reduced.end() - shape.size(), reduced.end(), 1);
  const auto empty = [&] { return at::empty(x.sizes(), x.options()); };
  LayerNormResult result;
  auto& [y, mean, rstd, dys, sums] = result;
  y = empty();
  rstd = at::empty(reduced, x.options().dtype(acc));
  if (centered) mean = at::empty(reduced, x.options().dtype(acc));

  NormItem item{};
  item.type = type_of(x);
  item.centered = centered;
  item.size = size;
  item.eps = eps;
  item.x = x.const_data_ptr();
  const auto contiguous = [&](const std::optional<at::Tensor>& tensor) -> const void* {
    if (!tensor) return nullptr;
    if (tensor->is_contiguous()) return tensor->const_data_ptr();
    owned.push_back(tensor->contiguous());
    return owned.back().const_data_ptr();
  };
  if (residual) {
    item.residual = contiguous(residual);
    sums.push_back(empty());
    item.sum = sums.back().mutable_data_ptr();
  }
  item.weights = narrow ? item.type : acc == at::kDouble ? Type::f64 : Type::f32;
  item.weight = norm_row_of(weight, weights, owned);
  item.bias = norm_row_of(bias, weights, owned);
  item.y = y.mutable_data_ptr();
  item.mean = centered ? mean.mutable_data_ptr() : nullptr;
  item.rstd = rstd.mutable_data_ptr();

  std::vector<NormTangent> rows_of;
  dys.reserve(tangents.size() / kNormRow);
  for (size_t i = 0; i < tangents.size(); i += kNormRow) {
    const NormRow row = norm_row(tangents, i);
    NormTangent t{};
    t.dx = contiguous(row.dx);
    t.dresidual = contiguous(row.dresidual);
    t.dweight = norm_row_of(row.dweight, weights, owned);
    t.dbias = norm_row_of(row.dbias, weights, owned);
    if (row.dresidual) {
      sums.push_back(empty());
      t.dsum = sums.back().mutable_data_ptr();
    }
    dys.push_back(empty());
    t.dy = dys.back().mutable_data_ptr();
    rows_of.push_back(t);
  }
  item.tangents = rows_of.data();
  item.count = rows_of.size();

  loop(item, rows);
  return result;
}

}  // namespace tangentfast
