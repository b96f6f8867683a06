// What the autograd.cpp of an op needs. The primal of an op keeps its ordinary gradient; tangents
// have none, so that they are no arguments of the autograd function and nothing of them is saved.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>

namespace tangentfast {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether a gradient of one of these tensors is to be recorded.
inline bool recorded(std::initializer_list<const at::Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const at::Tensor* tensor : tensors) {
    if (tensor && tensor->requires_grad()) return true;
  }
  return false;
}

inline const at::Tensor* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor && tensor->defined() ? &*tensor : nullptr;
}

// Which gradients a backward is asked for: one call for each tensor argument of forward, in order.
class Wanted {
 public:
  explicit Wanted(AutogradContext* context) : context_(context) {}
  bool operator()(bool present) { return present && context_->needs_input_grad(next_++); }

 private:
  AutogradContext* context_;
  size_t next_ = 0;
};

// The operator of that name, looked up once.
template <class Signature>
c10::TypedOperatorHandle<Signature> op_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace tangentfast
