// Every op's schema, once, and the Python module that says what was compiled.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "isa.h"

#ifndef TANGENTFAST_VERSION
#error "TANGENTFAST_VERSION is set by setup.py"
#endif

TORCH_LIBRARY(tangentfast, m) {
  // q [N, H, T, D], k [N, Hk, S, D], v [N, Hk, S, Dv], mask added to [N, H, T, S]; K tangents, in
  // which a None is zero. Returns o [N, H, T, Dv], its log-sum-exp [N, H, T] (both empty unless
  // `primal`), and K tangents of o.
  m.def(
      "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
      "Tensor?[] dq, Tensor?[] dk, Tensor?[] dv, Tensor?[] dmask, bool primal) "
      "-> (Tensor o, Tensor lse, Tensor[] do)");
  // Gradients of q, k and v from that of o, with o and lse as attention_jvp gave them.
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "Tensor? mask, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)");
}

// The kernels read a tensor's negative bit themselves; the dispatcher could not write through it.
TORCH_LIBRARY_IMPL(tangentfast, Negative, m) {
  m.impl("merge_", torch::CppFunction::makeFallthrough());
  m.impl("gram", torch::CppFunction::makeFallthrough());
}

// The ops are not differentiable: let autograd pass through without a warning.
TORCH_LIBRARY_IMPL(tangentfast, Autograd, m) {
  m.impl("merge_", torch::CppFunction::makeFallthrough());
  m.impl("gram", torch::CppFunction::makeFallthrough());
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of tangentfast; importing it registers torch.ops.tangentfast.*";
  m.attr("version") = TANGENTFAST_VERSION;
#ifdef TANGENTFAST_WITH_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  m.def("isa", &tangentfast::isa_name, "The instruction set in use: avx512, avx2 or baseline.");
}
