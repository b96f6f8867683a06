// What merge_ and gram check and prepare before their loops, on every device.
#pragma once

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
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
    TORCH_CHECK(!bases[i].is_inference() || c10::InferenceMode::is_enabled(), op, ": ",
                indexed("bases", i),
                " was made in inference mode and may be written there alone; merge into a clone() or "
                "under torch.inference_mode()");
    for (const size_t end = k + counts[i]; k < end; ++k) {
      check_tensor(op, indexed("vectors", k), vectors[k], device);
      check_same_shape(op, indexed("vectors", k), vectors[k], indexed("bases", i), bases[i]);
    }
  }
}

struct MergePlan {
  std::vector<MergeItem> items;
  std::vector<Term> terms;  // items point into it
  std::vector<std::vector<int64_t>> layouts;  // and into these
  std::vector<at::Tensor> sources;
  std::vector<at::Tensor> written;  // the base of each item
};

// The dimensions of an item, those of its longest steps first and as few as they can be: its sizes
// [dims], then the strides [1 + count][dims]. Empty where all lies in one order without gaps.
inline std::vector<int64_t> layout_of(const at::Tensor& base, const at::Tensor* terms,
                                      int64_t count) {
  bool alike = base.is_non_overlapping_and_dense();
  for (int64_t k = 0; alike && k < count; ++k) alike = same_strides(terms[k], base);
  if (alike) return {};
  const auto stride = [&](int64_t k, int64_t d) {
    return k == 0 ? base.stride(d) : terms[k - 1].stride(d);
  };
  const int64_t leader = count > 1 ? 1 : 0;  // several vectors have one order, as a rule
  std::vector<int64_t> order;
  for (int64_t d = 0; d < base.dim(); ++d) {
    if (base.size(d) > 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return stride(leader, a) > stride(leader, b);
  });
  std::vector<std::vector<int64_t>> groups;  // of dimensions that are one long one in all tensors
  for (const int64_t d : order) {
    bool joined = !groups.empty();
    for (int64_t k = 0; joined && k <= count; ++k) {
      joined = stride(k, groups.back().back()) == stride(k, d) * base.size(d);
    }
    if (!joined) groups.emplace_back();
    groups.back().push_back(d);
  }
  std::vector<int64_t> layout;
  for (const auto& group : groups) {
    layout.push_back(1);
    for (const int64_t d : group) layout.back() *= base.size(d);
  }
  for (int64_t k = 0; k <= count; ++k) {
    for (const auto& group : groups) layout.push_back(stride(k, group.back()));
  }
  return layout;
}

// Everything is checked and allocated before the first write. A copy is made of a vector alone that
// shares memory with a base, its own or another's: it would be read after it was written.
inline MergePlan plan_merge(at::TensorList bases, at::TensorList vectors, at::IntArrayRef counts,
                            at::ArrayRef<double> alphas, at::Device device) {
  check_merge(bases, vectors, counts, alphas, device);
  const Occupied occupied("merge_", bases);
  MergePlan plan;
  plan.terms.reserve(vectors.size());
  plan.sources.reserve(vectors.size());
  for (size_t i = 0, k = 0; i < bases.size(); ++i) {
    if (counts[i] == 0 || bases[i].numel() == 0) {
      k += counts[i];
      continue;
    }
    const at::Tensor& base = bases[i];
    const size_t first = plan.terms.size();
    for (const size_t end = k + counts[i]; k < end; ++k) {
      const at::Tensor& vector = vectors[k];
      plan.sources.push_back(occupied.meets(vector) ? vector.clone() : vector);
      // A flag says that the numbers in memory have the other sign.
      const bool negated = plan.sources.back().is_neg() != base.is_neg();
      plan.terms.push_back({plan.sources.back().const_data_ptr(), type_of(vector),
                            negated ? -alphas[k] : alphas[k]});
    }
    const Term* const terms = plan.terms.data() + first;
    MergeItem item{base.mutable_data_ptr(), type_of(base), sum_of(type_of(base), terms, counts[i]),
                   base.numel(), terms, counts[i], 0, nullptr, nullptr};
    auto layout = layout_of(base, plan.sources.data() + first, counts[i]);
    if (!layout.empty()) {
      item.dims = static_cast<int64_t>(layout.size()) / (2 + counts[i]);
      item.sizes = layout.data();
      item.strides = layout.data() + item.dims;
      plan.layouts.push_back(std::move(layout));  // which leaves its memory where it is
    }
    plan.written.push_back(base);
    plan.items.push_back(item);
  }
  return plan;
}

// After the loops: autograd and linearize must notice.
inline void bump_versions(const MergePlan& plan) {
  for (const at::Tensor& base : plan.written) {
    if (!base.is_inference()) base.unsafeGetTensorImpl()->bump_version();
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
