#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "prepare.h"

namespace tangentfast::activation {
namespace {

constexpr int64_t kGrain = 8192;  // elements: under it a second thread costs more than it gives

Result activation_cpu(const at::Tensor& x, c10::string_view kind, at::TensorList dx) {
  return activation_jvp(x, kind, dx, at::kCPU, [](const Item& item, int64_t numel) {
    at::parallel_for(0, numel, std::max<int64_t>(kGrain / (1 + item.count), 1),
                     [&](int64_t begin, int64_t end) { activation_jvp_kernel(item, begin, end); });
  });
}

}  // namespace
}  // namespace tangentfast::activation

TORCH_LIBRARY_IMPL(tangentfast, CPU, m) {
  m.impl("activation_jvp", &tangentfast::activation::activation_cpu);
}
