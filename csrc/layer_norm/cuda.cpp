#include <torch/library.h>

#include "../cuda/context.h"
#include "cuda_kernel.h"
#include "prepare.h"

namespace tangentfast::layer_norm {
namespace {

auto launch_on(const CudaContext& context) {
  return [&context](const Item& item, int64_t rows) {
    norm_jvp_launch(item, rows, context.stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
}

LayerNormResult layer_norm_cuda(const at::Tensor& x, at::IntArrayRef shape, const Optional& weight,
                                const Optional& bias, double eps, const Column& dx,
                                const Column& dweight, const Column& dbias) {
  const CudaContext context(x);
  return norm_jvp("layer_norm_jvp", true, x, shape, weight, bias, eps, {dx, dweight, dbias},
                  x.device(), true, launch_on(context));
}

RmsNormResult rms_norm_cuda(const at::Tensor& x, at::IntArrayRef shape, const Optional& weight,
                            double eps, const Column& dx, const Column& dweight) {
  const CudaContext context(x);
  return rms_norm_jvp(x, shape, weight, eps, dx, dweight, x.device(), true, launch_on(context));
}

}  // namespace
}  // namespace tangentfast::layer_norm

TORCH_LIBRARY_IMPL(tangentfast, CUDA, m) {
  m.impl("layer_norm_jvp", &tangentfast::layer_norm::layer_norm_cuda);
  m.impl("rms_norm_jvp", &tangentfast::layer_norm::rms_norm_cuda);
}
