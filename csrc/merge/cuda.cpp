#include <ATen/Functions.h>
#include <torch/library.h>

#include "../cuda/context.h"
#include "cuda_kernel.h"
#include "plan.h"

namespace tangentfast {
namespace {

void merge_cuda(at::TensorList bases, at::TensorList vectors, at::IntArrayRef counts,
                at::ArrayRef<double> alphas) {
  const CudaContext context(bases, vectors);
  for (size_t i = 0; i < counts.size(); ++i) {
    TORCH_CHECK_VALUE(counts[i] <= MergeTable::kTerms, "merge_: bases[", i, "] has ", counts[i],
                      " vectors, expected at most ", MergeTable::kTerms,
                      " on a GPU; merge them in groups");
  }
  check_merge(bases, vectors, counts, alphas, context.device());
  // The kernel reads what lies in one order: copies stand in for the rest.
  std::vector<at::Tensor> targets, sources;
  for (size_t i = 0, k = 0; i < bases.size(); ++i) {
    targets.push_back(dense(bases[i]));
    for (const size_t end = k + counts[i]; k < end; ++k) {
      sources.push_back(laid_out_as(vectors[k], targets[i]));
    }
  }
  const Occupied apart("merge_", bases);
  const MergePlan plan = plan_merge(targets, sources, counts, alphas, context.device());
  merge_launch(plan.items, context.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  bump_versions(plan);
  for (size_t i = 0; i < bases.size(); ++i) {
    if (counts[i] && !targets[i].is_same(bases[i])) bases[i].copy_(targets[i]);
  }
}

at::Tensor gram_cuda(at::TensorList tensors, at::IntArrayRef counts, at::IntArrayRef owners,
                     int64_t size) {
  const CudaContext context(tensors, {});
  const GramPlan plan = plan_gram(tensors, counts, owners, size, context.device());
  const auto options = at::TensorOptions().dtype(at::kDouble).device(context.device());
  const at::Tensor partial = at::zeros({gram_parts(plan.rows), size, size}, options);
  const at::Tensor result = at::empty({size, size}, options);
  gram_launch(plan.rows, plan.vectors, owners.data(), size, partial.mutable_data_ptr<double>(),
              result.mutable_data_ptr<double>(), context.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace
}  // namespace tangentfast

TORCH_LIBRARY_IMPL(tangentfast, CUDA, m) {
  m.impl("merge_", &tangentfast::merge_cuda);
  m.impl("gram", &tangentfast::gram_cuda);
}
