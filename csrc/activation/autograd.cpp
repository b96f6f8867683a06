// The backward of the primal is torch's own.
#include "../autograd.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "op.h"

namespace tangentfast {
namespace {

using Optional = std::optional<at::Tensor>;

const auto& activation_op() {
  static const auto op = op_named<ActivationOp>("tangentfast::activation_jvp");
  return op;
}

at::Tensor value(Activation kind, const at::Tensor& x) {
  switch (kind) {
    case Activation::gelu: return at::gelu(x);
    case Activation::gelu_tanh: return at::gelu(x, "tanh");
    case Activation::quick_gelu: return x * at::sigmoid(1.702 * x);
    case Activation::silu: return at::silu(x);
    case Activation::sigmoid: break;
  }
  return at::sigmoid(x);
}

at::Tensor silu_vjp(const at::Tensor& g, const at::Tensor& x) {
  if (!at::GradMode::is_enabled()) return at::silu_backward(g, x);
  const at::Tensor s = at::sigmoid(x);  // torch's kernel has no second derivative
  return g * s * (1 + x * (1 - s));
}

at::Tensor backward_of(Activation kind, const at::Tensor& g, const at::Tensor& x) {
  switch (kind) {
    case Activation::gelu: return at::gelu_backward(g, x);
    case Activation::gelu_tanh: return at::gelu_backward(g, x, "tanh");
    // x s(1.702 x) = silu(1.702 x) / 1.702
    case Activation::quick_gelu: return silu_vjp(g, 1.702 * x);
    case Activation::silu: return silu_vjp(g, x);
    case Activation::sigmoid: break;
  }
  return at::sigmoid_backward(g, at::sigmoid(x));
}

struct Activated : torch::autograd::Function<Activated> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const Optional& bias,
                            const Optional& gate, const Optional& gate_bias, c10::string_view kind,
                            const ActivationTangents* tangents, ActivationResult* result) {
    {
      at::AutoDispatchBelowADInplaceOrView below;
      *result = activation_op().call(x, bias, gate, gate_bias, kind, *tangents);
    }
    const at::Tensor none;
    ctx->saved_data["kind"] = static_cast<int64_t>(activation_named(kind));
    ctx->save_for_backward(
        {x, bias.value_or(none), gate.value_or(none), gate_bias.value_or(none)});
    return std::get<0>(*result);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto kind = static_cast<Activation>(ctx->saved_data["kind"].toInt());
    Wanted wanted(ctx);
    bool want[4];
    for (int i = 0; i < 4; ++i) want[i] = wanted(saved[i].defined());
    const auto biased = [&](int i) {
      return saved[i + 1].defined() ? saved[i] + saved[i + 1] : saved[i];
    };
    const auto summed = [&](const at::Tensor& g, int i) {
      return g.sum_to_size(saved[i].sizes());
    };
    const at::Tensor x = biased(0);
    at::Tensor gx, gbias, ggate, ggate_bias;
    if (want[0] || want[1]) {
      gx = backward_of(kind, saved[2].defined() ? grads[0] * biased(2) : grads[0], x);
      if (want[1]) gbias = summed(gx, 1);
    }
    if (want[2] || want[3]) {
      ggate = grads[0] * value(kind, x);
      if (want[3]) ggate_bias = summed(ggate, 3);
    }
    return {gx, gbias, ggate, ggate_bias, {}, {}, {}};
  }
};

ActivationResult activation_autograd(const at::Tensor& x, const Optional& bias,
                                     const Optional& gate, const Optional& gate_bias,
                                     c10::string_view kind, const ActivationTangents& tangents) {
  if (!recorded({&x, pointer(bias), pointer(gate), pointer(gate_bias)})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return activation_op().call(x, bias, gate, gate_bias, kind, tangents);
  }
  ActivationResult result;
  std::get<0>(result) = Activated::apply(x, bias, gate, gate_bias, kind, &tangents, &result);
  return result;
}

}  // namespace
}  // namespace tangentfast

TORCH_LIBRARY_IMPL(tangentfast, Autograd, m) {
  m.impl("activation_jvp", &tangentfast::activation_autograd);
}
