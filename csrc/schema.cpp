// Every op's schema, once, and the Python module that says what was compiled.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "isa.h"

#ifndef TANGENTFAST_VERSION
#error "TANGENTFAST_VERSION is set by setup.py"
#endif

TORCH_LIBRARY(tangentfast, m) {
  // Norms and activations: y with its ordinary gradient, and its K tangents, without one. tangents
  // holds one entry for each tensor that may have a tangent, K times over; the order is in the
  // op.h beside the kernel. sums: with a residual, x + residual, which is then normalised, and
  // dx + dresidual of each tangent that has a dresidual.
  m.def("layer_norm_jvp(Tensor x, Tensor? residual, int[] normalized_shape, Tensor? weight, "
        "Tensor? bias, float eps, Tensor?[] tangents) "
        "-> (Tensor y, Tensor mean, Tensor rstd, Tensor[] dys, Tensor[] sums)");
  m.def("rms_norm_jvp(Tensor x, Tensor? residual, int[] normalized_shape, Tensor? weight, "
        "float eps, Tensor?[] tangents) "
        "-> (Tensor y, Tensor rstd, Tensor[] dys, Tensor[] sums)");
  m.def("activation_jvp(Tensor x, Tensor? bias, Tensor? gate, Tensor? gate_bias, str kind, "
        "Tensor?[] tangents) -> (Tensor y, Tensor[] dys)");
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
