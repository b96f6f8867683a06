// The backward of the primal: torch's own for layer norm; for RMS norm, whose torch composition has
// none of its own on the CPU, the Jacobian is symmetric, so that the op itself gives it.
#include "../autograd.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <numeric>

#include "op.h"

namespace tangentfast {
namespace {

using Optional = std::optional<at::Tensor>;

const auto& layer_norm_op() {
  static const auto op = op_named<LayerNormOp>("tangentfast::layer_norm_jvp");
  return op;
}

const auto& rms_norm_op() {
  static const auto op = op_named<RmsNormOp>("tangentfast::rms_norm_jvp");
  return op;
}

at::Tensor plus(const at::Tensor& a, const at::Tensor& b) {
  return a.defined() && b.defined() ? a + b : a.defined() ? a : b;
}

at::IntArrayRef last(const at::Tensor& x, int64_t dims) {
  return x.sizes().slice(x.dim() - dims);
}

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const Optional& residual,
                               const Optional& weight, const Optional& bias, at::IntArrayRef shape,
                               double eps, const NormTangents* tangents, LayerNormResult* result) {
    {
      at::AutoDispatchBelowADInplaceOrView below;
      *result = layer_norm_op().call(x, residual, shape, weight, bias, eps, *tangents);
    }
    const auto& [y, mean, rstd, dys, sums] = *result;
    ctx->saved_data["dims"] = static_cast<int64_t>(shape.size());
    ctx->saved_data["residual"] = residual.has_value();
    ctx->saved_data["bias"] = bias.has_value();
    ctx->save_for_backward({residual ? sums[0] : x, weight.value_or(at::Tensor()), mean, rstd});
    ctx->set_materialize_grads(false);
    return residual ? variable_list{y, sums[0]} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &mean = saved[2], &rstd = saved[3];
    const bool residual = ctx->saved_data["residual"].toBool();
    Wanted wanted(ctx);
    const bool want_x = wanted(true), want_residual = wanted(residual);
    const bool want_weight = wanted(weight.defined());
    const bool want_bias = wanted(ctx->saved_data["bias"].toBool());
    at::Tensor gx, gweight, gbias;
    if (grads[0].defined()) {
      const at::IntArrayRef shape = last(x, ctx->saved_data["dims"].toInt());
      Optional scale = weight.defined() ? Optional(weight) : std::nullopt;
      // On the CPU torch takes the statistics in the type of the weight.
      const auto type = x.is_cpu() ? mean.scalar_type() : x.scalar_type();
      if (scale ? scale->scalar_type() != type : want_bias || x.scalar_type() != type) {
        scale = scale ? scale->to(type) : at::ones(shape, x.options().dtype(type));
      }
      std::tie(gx, gweight, gbias) = at::native_layer_norm_backward(
          grads[0], x, shape, mean, rstd, scale, scale,
          {want_x || want_residual, want_weight, want_bias});
      if (want_weight) gweight = gweight.to(weight.scalar_type());
    }
    if (residual) gx = plus(gx, grads[1]);
    return {gx, residual ? gx : at::Tensor(), gweight, gbias, {}, {}, {}, {}};
  }
};

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const Optional& residual,
                               const Optional& weight, at::IntArrayRef shape, double eps,
                               const NormTangents* tangents, RmsNormResult* result) {
    {
      at::AutoDispatchBelowADInplaceOrView below;
      *result = rms_norm_op().call(x, residual, shape, weight, eps, *tangents);
    }
    const auto& [y, rstd, dys, sums] = *result;
    ctx->saved_data["dims"] = static_cast<int64_t>(shape.size());
    ctx->saved_data["residual"] = residual.has_value();
    ctx->saved_data["eps"] = eps;
    ctx->save_for_backward({residual ? sums[0] : x, weight.value_or(at::Tensor())});
    ctx->set_materialize_grads(false);
    return residual ? variable_list{y, sums[0]} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    const bool residual = ctx->saved_data["residual"].toBool();
    Wanted wanted(ctx);
    wanted(true), wanted(residual);
    const bool want_weight = wanted(weight.defined());
    at::Tensor gx, gweight;
    if (grads[0].defined()) {
      const int64_t dims = ctx->saved_data["dims"].toInt();
      const double eps = ctx->saved_data["eps"].toDouble();
      const at::Tensor g = weight.defined() ? (grads[0] * weight).to(x.scalar_type()) : grads[0];
      at::Tensor x_hat;
      if (at::GradMode::is_enabled()) {  // double backward
        std::vector<int64_t> row(dims);
        std::iota(row.begin(), row.end(), x.dim() - dims);
        const at::Tensor rstd = (x.square().mean(row, true) + eps).rsqrt();
        x_hat = x * rstd;
        gx = (g - x_hat * (g * x_hat).mean(row, true)) * rstd;
      } else {
        at::AutoDispatchBelowADInplaceOrView below;
        auto [y, rstd, dys, sums] = rms_norm_op().call(
            x, std::nullopt, last(x, dims), std::nullopt, eps,
            NormTangents({Optional(g), Optional(), Optional(), Optional()}));
        x_hat = y;
        gx = dys[0];
      }
      if (want_weight) gweight = (grads[0] * x_hat).sum_to_size(weight.sizes());
    }
    if (residual) gx = plus(gx, grads[1]);
    return {gx, residual ? gx : at::Tensor(), gweight, {}, {}, {}, {}};
  }
};

LayerNormResult layer_norm_autograd(const at::Tensor& x, const Optional& residual,
                                    at::IntArrayRef shape, const Optional& weight,
                                    const Optional& bias, double eps,
                                    const NormTangents& tangents) {
  if (!recorded({&x, pointer(residual), pointer(weight), pointer(bias)})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return layer_norm_op().call(x, residual, shape, weight, bias, eps, tangents);
  }
  LayerNormResult result;
  const variable_list outputs =
      LayerNorm::apply(x, residual, weight, bias, shape, eps, &tangents, &result);
  std::get<0>(result) = outputs[0];
  if (residual) std::get<4>(result)[0] = outputs[1];
  return result;
}

RmsNormResult rms_norm_autograd(const at::Tensor& x, const Optional& residual,
                                at::IntArrayRef shape, const Optional& weight, double eps,
                                const NormTangents& tangents) {
  if (!recorded({&x, pointer(residual), pointer(weight)})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return rms_norm_op().call(x, residual, shape, weight, eps, tangents);
  }
  RmsNormResult result;
  const variable_list outputs = RmsNorm::apply(x, residual, weight, shape, eps, &tangents, &result);
  std::get<0>(result) = outputs[0];
  if (residual) std::get<3>(result)[0] = outputs[1];
  return result;
}

}  // namespace
}  // namespace tangentfast

TORCH_LIBRARY_IMPL(tangentfast, Autograd, m) {
  m.impl("layer_norm_jvp", &tangentfast::layer_norm_autograd);
  m.impl("rms_norm_jvp", &tangentfast::rms_norm_autograd);
}
