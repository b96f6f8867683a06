// What merge_ and gram check and prepare before their loops, on every device.
#pragma once

#include <ATen/Functions.h>

#include <utility>
#include <vector>

#include "../checks.h"
#include "kernel.h"
#include "overlap.h"

namespace tangentfast {

// Strides of dimensions of one element say nothing about memory.
inline bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// `tensor` itself when it lies in memory exactly as `like` does, else a copy that does.
inline at::Tensor laid_out_as(const at::Tensor& tensor, const at::Tensor& like) {
  if (same_strides(tensor, like) && !tensor.is_neg()) return tensor;
  return at::empty_strided(like.sizes(), like.strides(), tensor.options()).copy_(tensor);
}

inline at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() && !tensor.is_neg()
             ? tensor
             : tensor.clone(at::MemoryFormat::Contiguous).resolve_neg();
}

inline void check_merge(at::TensorList bases, at::TensorList vectors, at::IntArrayRef counts,
                        at::ArrayRef<double> alphas, at::Device device) {
  const char* op = "merge_";
  check_counts(op, counts, bases.size(), vectors.size());
  TORCH_CHECK_VALUE(alphas.size() == vectors.size(), op, ": alphas has ", alphas.size(),
                    " entries, expected one per vector, ", vectors.size());
  for (size_t i = 0, k = 0; i < bases.size(); ++i) {
    check_tensor(op, indexed("bases", i), bases[i], device);
    for (const size_t end = k + counts[i]; k < end; ++k) {
      check_tensor(op, indexed("vectors", k), vectors[k], device);
      check_same_shape(op, indexed("vectors", k), vectors[k], indexed("bases", i), bases[i]);
    }
  }
}

struct MergePlan {
  std::vector<MergeItem> items;
  std::vector<Term> terms;  // items point into it
  std::vector<at::Tensor> targets, sources;
  std::vector<size_t> written;  // the base of each item
};

// Everything is checked and allocated before the first write, and only for what is not laid out
// plainly.
inline MergePlan plan_merge(at::TensorList bases, at::TensorList vectors, at::IntArrayRef counts,
                            at::ArrayRef<double> alphas, at::Device device) {
  check_merge(bases, vectors, counts, alphas, device);
  const std::vector<Extent> extents = check_disjoint("merge_", bases);
  MergePlan plan;
  plan.terms.reserve(vectors.size());
  for (size_t i = 0, k = 0; i < bases.size(); ++i) {
    if (counts[i] == 0) continue;
    const at::Tensor target = dense(bases[i]);
    MergeItem item{target.mutable_data_ptr(), type_of(target), target.scalar_type() == at::kDouble,
                   target.numel(), plan.terms.data() + plan.terms.size(), counts[i]};
    for (const size_t end = k + counts[i]; k < end; ++k) {
      at::Tensor source = laid_out_as(vectors[k], target);
      // Memory of a base, its own or another's, would be read after it was written.
      if (meets(source, extents)) source = source.clone();
      item.wide |= source.scalar_type() == at::kDouble;
      plan.terms.push_back({source.const_data_ptr(), type_of(source), alphas[k]});
      plan.sources.push_back(std::move(source));
    }
    plan.targets.push_back(target);
    plan.written.push_back(i);
    plan.items.push_back(item);
  }
  return plan;
}

// After the loops: copies back what was not merged in place.
inline void finish_merge(at::TensorList bases, const MergePlan& plan) {
  for (size_t n = 0; n < plan.written.size(); ++n) {
    const at::Tensor& base = bases[plan.written[n]];
    if (!plan.targets[n].is_same(base)) {
      base.copy_(plan.targets[n]);
    } else if (!base.is_inference()) {
      base.unsafeGetTensorImpl()->bump_version();  // autograd and linearize must notice
    }
  }
}

struct GramPlan {
  std::vector<GramRow> rows;
  std::vector<Vector> vectors;
  std::vector<at::Tensor> sources;
};

inline GramPlan plan_gram(at::TensorList tensors, at::IntArrayRef counts, at::IntArrayRef owners,
                          int64_t size, at::Device device) {
  const char* op = "gram";
  check_counts(op, counts, counts.size(), tensors.size());
  TORCH_CHECK_VALUE(size >= 0, op, ": size is ", size, ", expected 0 or more");
  TORCH_CHECK_VALUE(owners.size() == tensors.size(), op, ": owners has ", owners.size(),
                    " entries, expected one per tensor, ", tensors.size());
  GramPlan plan;
  for (size_t row = 0, k = 0; row < counts.size(); ++row) {
    const size_t first = k;
    for (const size_t end = k + counts[row]; k < end; ++k) {
      check_tensor(op, indexed("tensors", k), tensors[k], device);
      check_same_shape(op, indexed("tensors", k), tensors[k], indexed("tensors", first),
                       tensors[first]);
      TORCH_CHECK_VALUE(owners[k] >= (k == first ? 0 : owners[k - 1] + 1) && owners[k] < size, op,
                        ": owners[", k, "] is ", owners[k],
                        ", expected rising numbers within a row, below ", size);
      plan.sources.push_back(k == first ? dense(tensors[k])
                                        : laid_out_as(tensors[k], plan.sources[first]));
      plan.vectors.push_back({plan.sources[k].const_data_ptr(), type_of(tensors[k])});
    }
    if (counts[row]) plan.rows.push_back({first, counts[row], tensors[first].numel()});
  }
  return plan;
}

}  // namespace tangentfast
