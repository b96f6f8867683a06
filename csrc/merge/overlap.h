// Which tensors share memory: what merge_ must know before it writes.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <string>
#include <utility>
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

// (stride, size) of the dimensions of more than one element, the smallest stride first.
inline std::vector<std::pair<int64_t, int64_t>> steps_of(const at::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) steps.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

// The bytes of a tensor as runs [begin, end) without gaps, of which none is empty.
inline void add_runs(const at::Tensor& tensor, std::vector<std::pair<uintptr_t, uintptr_t>>& runs) {
  const auto start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const int64_t item = tensor.element_size();
  const auto dims = steps_of(tensor);
  size_t outer = 0;
  int64_t run = 1;  // elements that lie one after the other
  while (outer < dims.size() && dims[outer].first == run) run *= dims[outer++].second;
  std::vector<int64_t> at(dims.size(), 0);
  for (int64_t offset = 0;;) {
    runs.emplace_back(start + offset * item, start + (offset + run) * item);
    size_t d = outer;
    for (; d < dims.size() && ++at[d] == dims[d].second; ++d) {
      offset -= (at[d] - 1) * dims[d].first;
      at[d] = 0;
    }
    if (d == dims.size()) return;
    offset += dims[d].first;
  }
}

// Whether the strides alone show that no two elements share memory: each step is longer than all
// that the smaller ones can reach.
inline bool strides_are_apart(const at::Tensor& tensor) {
  int64_t reach = 0;
  for (const auto& [stride, size] : steps_of(tensor)) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

// The memory of the bases: extents that touch are one, and they rise.
class Occupied {
 public:
  // Raises when two bases, or two elements of one, share memory. Only bases whose extents touch, or
  // whose strides cross, are looked at run by run: slices of one buffer may interleave without
  // sharing anything.
  Occupied(const char* op, at::TensorList bases) {
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
      whole_.push_back({extents[first].begin, end, 0});
      const at::Tensor& base = bases[extents[first].index];
      if (next == first + 1 && strides_are_apart(base)) continue;
      std::vector<std::pair<uintptr_t, uintptr_t>> runs;
      for (size_t e = first; e < next; ++e) add_runs(bases[extents[e].index], runs);
      std::sort(runs.begin(), runs.end());
      for (size_t r = 1; r < runs.size(); ++r) {
        TORCH_CHECK_VALUE(runs[r - 1].second <= runs[r].first, op, ": bases[",
                          extents[first].index, "] of shape ", base.sizes(),
                          " shares memory with itself or with another base; merge into a clone()");
      }
    }
  }

  // Whether `tensor` may share memory with a base: its extent meets one of theirs.
  bool meets(const at::Tensor& tensor) const {
    const Extent own = extent_of(tensor, 0);
    const auto after = std::upper_bound(
        whole_.begin(), whole_.end(), own.begin,
        [](uintptr_t begin, const Extent& extent) { return begin < extent.end; });
    return after != whole_.end() && after->begin < own.end;
  }

 private:
  std::vector<Extent> whole_;
};

}  // namespace tangentfast
