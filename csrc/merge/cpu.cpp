#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "plan.h"

namespace tangentfast {
namespace {

constexpr int64_t kGrain = 32768;  // elements: under it a second thread costs more than it gives
constexpr int64_t kGramChunk = 262144;  // fixed, so that the sums do not depend on the threads

void merge_cpu(at::TensorList bases, at::TensorList vectors, at::IntArrayRef counts,
               at::ArrayRef<double> alphas) {
  const MergePlan plan = plan_merge(bases, vectors, counts, alphas, at::kCPU);
  const std::vector<MergeItem>& items = plan.items;
  std::vector<int64_t> starts{0};  // of each item in the sequence of all elements
  for (const MergeItem& item : items) starts.push_back(starts.back() + item.numel);

  // One range over all elements of all tensors: the work is shared evenly whatever their sizes.
  at::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; begin = starts[++i]) {
      merge_kernel(items[i], begin - starts[i], std::min(end, starts[i + 1]) - starts[i]);
    }
  });

  bump_versions(plan);
}

at::Tensor gram_cpu(at::TensorList tensors, at::IntArrayRef counts, at::IntArrayRef owners,
                    int64_t size) {
  const GramPlan plan = plan_gram(tensors, counts, owners, size, at::kCPU);
  struct Chunk {
    size_t first;  // of its row in `vectors`
    int64_t count, begin, end;
    size_t out;  // its partial sums in `partial`
  };
  std::vector<Chunk> chunks;
  size_t partials = 0;
  for (const GramRow& row : plan.rows) {
    for (int64_t begin = 0; begin < row.numel; begin += kGramChunk) {
      const int64_t end = std::min(begin + kGramChunk, row.numel);
      chunks.push_back({row.first, row.count, begin, end, partials});
      partials += row.count * row.count;
    }
  }

  std::vector<double> partial(partials);
  at::parallel_for(0, chunks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch;
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks[c];
      scratch.resize(gram_scratch(chunk.count));
      gram_kernel(plan.vectors.data() + chunk.first, chunk.count, chunk.begin, chunk.end,
                  scratch.data(), partial.data() + chunk.out);
    }
  });

  const at::Tensor result = at::zeros({size, size}, at::kDouble);
  double* sums = result.mutable_data_ptr<double>();
  for (const Chunk& chunk : chunks) {
    for (int64_t i = 0; i < chunk.count; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        sums[owners[chunk.first + i] * size + owners[chunk.first + j]] +=
            partial[chunk.out + i * chunk.count + j];
      }
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < i; ++j) sums[j * size + i] = sums[i * size + j];
  }
  return result;
}

}  // namespace
}  // namespace tangentfast

TORCH_LIBRARY_IMPL(tangentfast, CPU, m) {
  m.impl("merge_", &tangentfast::merge_cpu);
  m.impl("gram", &tangentfast::gram_cpu);
}
