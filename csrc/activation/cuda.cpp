#include <torch/library.h>

#include "../cuda/context.h"
#include "cuda_kernel.h"
#include "prepare.h"

namespace tangentfast::activation {
namespace {

Result activation_cuda(const at::Tensor& x, c10::string_view kind, at::TensorList dx) {
  const CudaContext context(x);
  return activation_jvp(x, kind, dx, x.device(), [&](const Item& item, int64_t numel) {
    activation_jvp_launch(item, numel, context.stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace
}  // namespace tangentfast::activation

TORCH_LIBRARY_IMPL(tangentfast, CUDA, m) {
  m.impl("activation_jvp", &tangentfast::activation::activation_cuda);
}
