#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "prepare.h"

namespace tangentfast {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr int64_t kGrain = 8192;  // elements: under it a second thread costs more than it gives

ActivationResult activation_cpu(const at::Tensor& x, const Optional& bias, const Optional& gate,
                                const Optional& gate_bias, c10::string_view kind,
                                const ActivationTangents& tangents) {
  const auto loop = [](const ActivationItem& item, int64_t numel) {
    at::parallel_for(0, numel, std::max<int64_t>(kGrain / (1 + item.count), 1),
                     [&](int64_t begin, int64_t end) { activation_jvp_kernel(item, begin, end); });
  };
  return activation_jvp(x, bias, gate, gate_bias, kind, tangents, at::kCPU, loop);
}

}  // namespace
}  // namespace tangentfast

TORCH_LIBRARY_IMPL(tangentfast, CPU, m) { m.impl("activation_jvp", &tangentfast::activation_cpu); }
