#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <memory>
#include <vector>

#include "../checks.h"
#include "kernel.h"
#include "op.h"

namespace tangentfast {
namespace {

constexpr int64_t kGrain = 32768;  // elements: under it a second thread costs more than it gives

// `tensor`, or `fill` where there is none, as a row of doubles or floats. The tensor that owns the
// memory, where a new one was needed, is kept in `owned`.
const void* widened_row(const std::optional<at::Tensor>& tensor, double fill, int64_t size,
                        at::ScalarType acc, std::vector<at::Tensor>& owned) {
  if (tensor && tensor->scalar_type() == acc && tensor->is_contiguous()) {
    return tensor->const_data_ptr();
  }
  owned.push_back(tensor ? tensor->to(acc).contiguous() : at::full({size}, fill, acc));
  return owned.back().const_data_ptr();
}

void check_norm(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& residual,
                at::IntArrayRef shape, const std::optional<at::Tensor>& weight,
                const std::optional<at::Tensor>& bias, const NormTangents& tangents) {
  check_tensor(op, "x", x, at::kCPU);
  const auto fits = [&](const std::string& name, const at::Tensor& tensor, at::IntArrayRef sizes) {
    check_tensor(op, name, tensor, at::kCPU);
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

LayerNormResult norm_cpu(const char* op, bool centered, const at::Tensor& x_given,
                         const std::optional<at::Tensor>& residual, at::IntArrayRef shape,
                         const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, double eps,
                         const NormTangents& tangents) {
  check_norm(op, x_given, residual, shape, weight, bias, tangents);
  const at::Tensor x = x_given.contiguous();
  const int64_t size = c10::multiply_integers(shape);
  const int64_t rows = size ? x.numel() / size : 0;
  const auto acc = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<at::Tensor> owned;
  owned.reserve(2 + tangents.size());

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
  item.weight = widened_row(weight, 1, size, acc, owned);
  item.bias = widened_row(bias, 0, size, acc, owned);
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
    if (row.dweight) t.dweight = widened_row(row.dweight, 0, size, acc, owned);
    if (row.dbias) t.dbias = widened_row(row.dbias, 0, size, acc, owned);
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

  const int64_t work = size * (1 + item.count);
  at::parallel_for(0, rows, std::max<int64_t>(kGrain / std::max<int64_t>(work, 1), 1),
                   [&](int64_t begin, int64_t end) {
                     // doubles, whatever the type: aligned for both
                     const std::unique_ptr<double[]> scratch(new double[2 * size]);
                     norm_jvp_kernel(item, begin, end, scratch.get());
                   });
  return result;
}

LayerNormResult layer_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                               at::IntArrayRef shape, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias, double eps,
                               const NormTangents& tangents) {
  return norm_cpu("layer_norm_jvp", true, x, residual, shape, weight, bias, eps, tangents);
}

RmsNormResult rms_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                           at::IntArrayRef shape, const std::optional<at::Tensor>& weight,
                           double eps, const NormTangents& tangents) {
  auto [y, mean, rstd, dys, sums] =
      norm_cpu("rms_norm_jvp", false, x, residual, shape, weight, std::nullopt, eps, tangents);
  return {y, rstd, dys, sums};
}

}  // namespace
}  // namespace tangentfast

TORCH_LIBRARY_IMPL(tangentfast, CPU, m) {
  m.impl("layer_norm_jvp", &tangentfast::layer_norm_cpu);
  m.impl("rms_norm_jvp", &tangentfast::rms_norm_cpu);
}
