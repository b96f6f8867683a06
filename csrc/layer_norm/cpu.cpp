#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <memory>

#include "prepare.h"

namespace tangentfast::layer_norm {
namespace {

constexpr int64_t kGrain = 32768;  // elements: under it a second thread costs more than it gives

void norm_rows(Item item, int64_t rows) {
  const auto acc = item.type == Type::f64 ? at::kDouble : at::kFloat;
  at::Tensor ones, zeros;  // the loops have no branches for a weight or bias that is not there
  if (!item.weight) item.weight = (ones = at::ones({item.size}, acc)).const_data_ptr();
  if (!item.bias) item.bias = (zeros = at::zeros({item.size}, acc)).const_data_ptr();
  const int64_t work = item.size * (1 + item.count);
  at::parallel_for(0, rows, std::max<int64_t>(kGrain / std::max<int64_t>(work, 1), 1),
                   [&](int64_t begin, int64_t end) {
                     // doubles, whatever the type: aligned for both
                     const std::unique_ptr<double[]> scratch(new double[2 * item.size]);
                     norm_jvp_kernel(item, begin, end, scratch.get());
                   });
}

LayerNormResult layer_norm_cpu(const at::Tensor& x, at::IntArrayRef shape, const Optional& weight,
                               const Optional& bias, double eps, const Column& dx,
                               const Column& dweight, const Column& dbias) {
  return norm_jvp("layer_norm_jvp", true, x, shape, weight, bias, eps, {dx, dweight, dbias},
                  at::kCPU, false, &norm_rows);
}

RmsNormResult rms_norm_cpu(const at::Tensor& x, at::IntArrayRef shape, const Optional& weight,
                           double eps, const Column& dx, const Column& dweight) {
  return rms_norm_jvp(x, shape, weight, eps, dx, dweight, at::kCPU, false, &norm_rows);
}

}  // namespace
}  // namespace tangentfast::layer_norm

TORCH_LIBRARY_IMPL(tangentfast, CPU, m) {
  m.impl("layer_norm_jvp", &tangentfast::layer_norm::layer_norm_cpu);
  m.impl("rms_norm_jvp", &tangentfast::layer_norm::rms_norm_cpu);
}
