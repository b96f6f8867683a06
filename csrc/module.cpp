// The Python module that says what was compiled, and how merge_ and gram pass the dispatcher.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "isa.h"

#ifndef TANGENTFAST_VERSION
#error "TANGENTFAST_VERSION is set by setup.py"
#endif

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
  m.def("isa", &tangentfast::isa_name,
        "The instruction set in use: avx512_bf16, avx512, avx2 or baseline.");
}
