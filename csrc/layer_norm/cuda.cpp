#include <torch/library.h>

#include "../cuda/context.h"
#include "cuda_kernel.h"
#include "prepare.h"

namespace tangentfast {
namespace {

using Optional = std::optional<at::Tensor>;

LayerNormResult norm_cuda(const char* op, bool centered, const at::Tensor& x,
                          const Optional& residual, at::IntArrayRef shape, const Optional& weight,
                          const Optional& bias, double eps, const NormTangents& tangents) {
  const CudaContext context(x);
  return norm_jvp(op, centered, x, residual, shape, weight, bias, eps, tangents, x.device(), true,
                  [&](const NormItem& item, int64_t rows) {
                    norm_jvp_launch(item, rows, context.stream());
                    C10_CUDA_KERNEL_LAUNCH_CHECK();
                  });
}

LayerNormResult layer_norm_cuda(const at::Tensor& x, const Optional& residual,
                                at::IntArrayRef shape, const Optional& weight, const Optional& bias,
                                double eps, const NormTangents& tangents) {
  return norm_cuda("layer_norm_jvp", true, x, residual, shape, weight, bias, eps, tangents);
}

RmsNormResult rms_norm_cuda(const at::Tensor& x, const Optional& residual, at::IntArrayRef shape,
                            const Optional& weight, double eps, const NormTangents& tangents) {
  auto [y, mean, rstd, dys, sums] = norm_cuda("rms_norm_jvp", false, x, residual, shape, weight,
                                              std::nullopt, eps, tangents);
  return {y, rstd, dys, sums};
}

}  // namespace
}  // namespace tangentfast

TORCH_LIBRARY_IMPL(tangentfast, CUDA, m) {
  m.impl("layer_norm_jvp", &tangentfast::layer_norm_cuda);
  m.impl("rms_norm_jvp", &tangentfast::rms_norm_cuda);
}
