#include <torch/library.h>

#include "../cuda/context.h"
#include "cuda_kernel.h"
#include "prepare.h"

namespace tangentfast {
namespace {

using Optional = std::optional<at::Tensor>;

ActivationResult activation_cuda(const at::Tensor& x, const Optional& bias, const Optional& gate,
                                 const Optional& gate_bias, c10::string_view kind,
                                 const ActivationTangents& tangents) {
  const CudaContext context(x);
  return activation_jvp(x, bias, gate, gate_bias, kind, tangents, x.device(),
                        [&](const ActivationItem& item, int64_t numel) {
                          activation_jvp_launch(item, numel, context.stream());
                          C10_CUDA_KERNEL_LAUNCH_CHECK();
                        });
}

}  // namespace
}  // namespace tangentfast

TORCH_LIBRARY_IMPL(tangentfast, CUDA, m) {
  m.impl("activation_jvp", &tangentfast::activation_cuda);
}
