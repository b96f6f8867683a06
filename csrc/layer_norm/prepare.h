// What the norms check and allocate before their loops, on every device.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/List.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "kernel.h"

namespace tangentfast::layer_norm {

using Optional = std::optional<at::Tensor>;
using Column = c10::List<Optional>;  // one argument's K tangents

// y, mean, rstd, dy
using LayerNormResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;
// y, rstd, dy
using RmsNormResult = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;

struct Columns {
  const Column &dx, &dweight, &dbias;
};

inline void check_norm(const char* op, const at::Tensor& x, at::IntArrayRef shape,
                       const Optional& weight, const Optional& bias, const Columns& tangents,
                       at::Device device) {
  check_tensor(op, "x", x, device);
  const auto at_end = x.sizes().slice(std::max<int64_t>(x.dim() - shape.size(), 0));
  TORCH_CHECK_VALUE(!shape.empty() && at_end == shape, op, ": normalized_shape is ", shape,
                    ", expected the last dimensions of x, which has shape ", x.sizes());
  const auto fits = [&](const std::string& name, const at::Tensor& tensor, at::IntArrayRef sizes) {
    check_tensor(op, name, tensor, device);
    check_sizes(op, name, tensor, sizes);
  };
  if (weight) fits("weight", *weight, shape);
  if (bias) fits("bias", *bias, shape);
  const auto all = [&](const char* name, const Column& column, bool present, const auto& check) {
    TORCH_CHECK_VALUE(column.size() == tangents.dx.size(), op, ": ", name, " has ", column.size(),
                      " entries, dx has ", tangents.dx.size());
    for (size_t k = 0; k < column.size(); ++k) {
      const Optional tangent = column.get(k);
      if (!tangent) continue;
      TORCH_CHECK_VALUE(present, op, ": ", indexed(name, k),
                        " is given, expected none where there is no ", name + 1);
      check(indexed(name, k), *tangent);
    }
  };
  const auto parameter = [&](const std::string& name, const at::Tensor& tensor) {
    fits(name, tensor, shape);
  };
  all("dx", tangents.dx, true, [&](const std::string& name, const at::Tensor& tensor) {
    fits(name, tensor, x.sizes());
    check_same_dtype(op, name, tensor, "x", x);
  });
  all("dweight", tangents.dweight, weight.has_value(), parameter);
  all("dbias", tangents.dbias, bias.has_value(), parameter);
}

// Checks, allocates, and calls loop(item, rows) for the numbers. With `narrow`, weights that are
// stored as x is stay so; otherwise they are widened to double or float.
template <class Loop>
LayerNormResult norm_jvp(const char* op, bool centered, const at::Tensor& x, at::IntArrayRef shape,
                         const Optional& weight, const Optional& bias, double eps,
                         const Columns& tangents, at::Device device, bool narrow,
                         const Loop& loop) {
  check_norm(op, x, shape, weight, bias, tangents, device);
  const size_t count = tangents.dx.size();
  const int64_t size = c10::multiply_integers(shape);
  const int64_t rows = size ? x.numel() / size : 0;
  const auto acc = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto stored_as_x = [&](const Optional& row) {
    return !row || row->scalar_type() == x.scalar_type();
  };
  narrow = narrow && stored_as_x(weight) && stored_as_x(bias);
  for (size_t k = 0; k < count; ++k) {
    narrow = narrow && stored_as_x(tangents.dweight.get(k)) && stored_as_x(tangents.dbias.get(k));
  }
  const auto weights = narrow ? x.scalar_type() : acc;

  std::vector<at::Tensor> owned;  // what had to be copied
  const auto data = [&](const Optional& tensor, at::ScalarType type) -> const void* {
    if (!tensor) return nullptr;
    if (tensor->scalar_type() == type && tensor->is_contiguous()) return tensor->const_data_ptr();
    owned.push_back(tensor->to(type).contiguous());
    return owned.back().const_data_ptr();
  };
  std::vector<int64_t> reduced(x.sizes().begin(), x.sizes().end());
  std::fill(reduced.end() - shape.size(), reduced.end(), 1);
  const auto empty = [&] { return at::empty(x.sizes(), x.options()); };
  LayerNormResult result;
  auto& [y, mean, rstd, dy] = result;
  y = empty();
  rstd = at::empty(reduced, x.options().dtype(acc));
  if (centered) mean = at::empty(reduced, x.options().dtype(acc));

  Item item{};
  item.type = type_of(x);
  item.weights = narrow ? item.type : acc == at::kDouble ? Type::f64 : Type::f32;
  item.centered = centered;
  item.size = size;
  item.eps = eps;
  item.x = data(x, x.scalar_type());
  item.weight = data(weight, weights);
  item.bias = data(bias, weights);
  item.y = y.mutable_data_ptr();
  item.mean = centered ? mean.mutable_data_ptr() : nullptr;
  item.rstd = rstd.mutable_data_ptr();
  std::vector<Tangent> pointers;
  for (size_t k = 0; k < count; ++k) {
    dy.push_back(empty());
    pointers.push_back({data(tangents.dx.get(k), x.scalar_type()),
                        data(tangents.dweight.get(k), weights),
                        data(tangents.dbias.get(k), weights), dy.back().mutable_data_ptr()});
  }
  item.tangents = pointers.data();
  item.count = count;

  loop(item, rows);
  return result;
}

// Layer norm without a mean and a bias.
template <class Loop>
RmsNormResult rms_norm_jvp(const at::Tensor& x, at::IntArrayRef shape, const Optional& weight,
                           double eps, const Column& dx, const Column& dweight, at::Device device,
                           bool narrow, const Loop& loop) {
  Column dbias;
  dbias.resize(dx.size());
  auto [y, mean, rstd, dy] = norm_jvp("rms_norm_jvp", false, x, shape, weight, std::nullopt, eps,
                                      {dx, dweight, dbias}, device, narrow, loop);
  return {y, rstd, dy};
}

}  // namespace tangentfast::layer_norm
