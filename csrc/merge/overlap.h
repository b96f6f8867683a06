// Which tensors share memory: what merge_ must know before it writes.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <string>
#include <vector>

namespace tangentfast {

// Bytes [begin, end) that a tensor's elements lie in, gaps between them included.
struct Extent {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  size_t index = 0;  // of the tensor in its list
};

inline Extent extent_of(const at::Tensor& tensor, size_t index) {
  if (tensor.numel() == 0) return {0, 0, index};
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return {begin, begin + (last + 1) * tensor.element_size(), index};
}

// Marks the bytes of `tensor` in `seen`, which starts at `origin`; false when one was marked before.
inline bool mark(const at::Tensor& tensor, uintptr_t origin, std::vector<bool>& seen) {
  const auto start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) - origin;
  const int64_t item = tensor.element_size();
  std::vector<int64_t> at(tensor.dim(), 0);
  for (int64_t n = 0; n < tensor.numel(); ++n) {
    int64_t offset = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) offset += at[d] * tensor.stride(d);
    for (int64_t byte = 0; byte < item; ++byte) {
      auto bit = seen[start + offset * item + byte];
      if (bit) return false;
      bit = true;
    }
    for (int64_t d = tensor.dim() - 1; d >= 0 && ++at[d] == tensor.size(d); --d) at[d] = 0;
  }
  return true;
}

// Extents of the bases, sorted. Raises when two bases, or two elements of one, share memory.
// Only bases whose extents touch, or that have gaps, are looked at element by element: slices of
// one buffer may interleave without sharing anything.
inline std::vector<Extent> check_disjoint(const char* op, at::TensorList bases) {
  std::vector<Extent> extents;
  for (size_t i = 0; i < bases.size(); ++i) {
    if (bases[i].numel() != 0) extents.push_back(extent_of(bases[i], i));
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t first = 0, next = 0; first < extents.size(); first = next) {
    uintptr_t end = extents[first].end;
    for (next = first + 1; next < extents.size() && extents[next].begin < end; ++next) {
      end = std::max(end, extents[next].end);
    }
    const at::Tensor& base = bases[extents[first].index];
    if (next == first + 1 && base.is_non_overlapping_and_dense()) continue;
    const uintptr_t origin = extents[first].begin;
    std::vector<bool> seen(end - origin, false);
    for (size_t e = first; e < next; ++e) {
      TORCH_CHECK_VALUE(mark(bases[extents[e].index], origin, seen), op, ": bases[",
                        extents[e].index, "] of shape ", bases[extents[e].index].sizes(),
                        " shares memory with itself or with another base; merge into a clone()");
    }
  }
  return extents;
}

// Whether `tensor` may share memory with a base: its extent meets one of theirs.
inline bool meets(const at::Tensor& tensor, const std::vector<Extent>& extents) {
  const Extent own = extent_of(tensor, 0);
  return std::any_of(extents.begin(), extents.end(), [&](const Extent& extent) {
    return extent.begin < own.end && own.begin < extent.end;
  });
}

}  // namespace tangentfast
