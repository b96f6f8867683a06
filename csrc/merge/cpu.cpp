#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../checks.h"
#include "kernel.h"
#include "overlap.h"

namespace tangentfast {
namespace {

constexpr int64_t kGrain = 32768;  // elements: under it a second thread costs more than it gives
constexpr int64_t kGramChunk = 262144;  // fixed, so that the sums do not depend on the threads

// Strides of dimensions of one element say nothing about memory.
bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// `tensor` itself when it lies in memory exactly as `like` does, else a copy that does.
at::Tensor laid_out_as(const at::Tensor& tensor, const at::Tensor& like) {
  if (same_strides(tensor, like) && !tensor.is_neg()) return tensor;
  return at::empty_strided(like.sizes(), like.strides(), tensor.options()).copy_(tensor);
}

at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() && !tensor.is_neg()
             ? tensor
             : tensor.clone(at::MemoryFormat::Contiguous).resolve_neg();
}

void check_merge(at::TensorList bases, at::TensorList vectors, at::IntArrayRef counts,
                 at::ArrayRef<double> alphas) {
  const char* op = "merge_";
  check_counts(op, counts, bases.size(), vectors.size());
  TORCH_CHECK_VALUE(alphas.size() == vectors.size(), op, ": alphas has ", alphas.size(),
                    " entries, expected one per vector, ", vectors.size());
  for (size_t i = 0, k = 0; i < bases.size(); ++i) {
    check_tensor(op, indexed("bases", i), bases[i], at::kCPU);
    for (const size_t end = k + counts[i]; k < end; ++k) {
      check_tensor(op, indexed("vectors", k), vectors[k], at::kCPU);
      check_same_shape(op, indexed("vectors", k), vectors[k], indexed("bases", i), bases[i]);
    }
  }
}

void merge_cpu(at::TensorList bases, at::TensorList vectors, at::IntArrayRef counts,
               at::ArrayRef<double> alphas) {
  check_merge(bases, vectors, counts, alphas);
  const std::vector<Extent> extents = check_disjoint("merge_", bases);

  // Everything is allocated before the first write, and only for what is not laid out plainly.
  std::vector<at::Tensor> targets, sources;
  std::vector<Term> terms;
  terms.reserve(vectors.size());  // MergeItem points into it
  std::vector<MergeItem> items;
  std::vector<size_t> written;
  std::vector<int64_t> starts{0};  // of each item in the sequence of all elements
  for (size_t i = 0, k = 0; i < bases.size(); ++i) {
    if (counts[i] == 0) continue;
    const at::Tensor target = dense(bases[i]);
    MergeItem item{target.mutable_data_ptr(), type_of(target), target.scalar_type() == at::kDouble,
                   target.numel(), terms.data() + terms.size(), counts[i]};
    for (const size_t end = k + counts[i]; k < end; ++k) {
      at::Tensor source = laid_out_as(vectors[k], target);
      // Memory of a base, its own or another's, would be read after it was written.
      if (meets(source, extents)) source = source.clone();
      item.wide |= source.scalar_type() == at::kDouble;
      terms.push_back({source.const_data_ptr(), type_of(source), alphas[k]});
      sources.push_back(std::move(source));
    }
    targets.push_back(target);
    written.push_back(i);
    items.push_back(item);
    starts.push_back(starts.back() + item.numel);
  }

  // One range over all elements of all tensors: the work is shared evenly whatever their sizes.
  at::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; begin = starts[++i]) {
      merge_kernel(items[i], begin - starts[i], std::min(end, starts[i + 1]) - starts[i]);
    }
  });

  for (size_t n = 0; n < written.size(); ++n) {
    const at::Tensor& base = bases[written[n]];
    if (!targets[n].is_same(base)) {
      base.copy_(targets[n]);
    } else if (!base.is_inference()) {
      base.unsafeGetTensorImpl()->bump_version();  // autograd and linearize must notice
    }
  }
}

at::Tensor gram_cpu(at::TensorList tensors, at::IntArrayRef counts, at::IntArrayRef owners,
                    int64_t size) {
  const char* op = "gram";
  check_counts(op, counts, counts.size(), tensors.size());
  TORCH_CHECK_VALUE(size >= 0, op, ": size is ", size, ", expected 0 or more");
  TORCH_CHECK_VALUE(owners.size() == tensors.size(), op, ": owners has ", owners.size(),
                    " entries, expected one per tensor, ", tensors.size());
  struct Chunk {
    size_t first;  // of its row in `vectors`
    int64_t count, begin, end;
    size_t out;  // its partial sums in `partial`
  };
  std::vector<at::Tensor> sources;
  std::vector<Vector> vectors;
  std::vector<Chunk> chunks;
  size_t partials = 0;
  for (size_t row = 0, k = 0; row < counts.size(); ++row) {
    const size_t first = k;
    for (const size_t end = k + counts[row]; k < end; ++k) {
      check_tensor(op, indexed("tensors", k), tensors[k], at::kCPU);
      check_same_shape(op, indexed("tensors", k), tensors[k], indexed("tensors", first),
                       tensors[first]);
      TORCH_CHECK_VALUE(owners[k] >= (k == first ? 0 : owners[k - 1] + 1) && owners[k] < size, op,
                        ": owners[", k, "] is ", owners[k],
                        ", expected rising numbers within a row, below ", size);
      const at::Tensor source =
          k == first ? dense(tensors[k]) : laid_out_as(tensors[k], sources[first]);
      vectors.push_back({source.const_data_ptr(), type_of(source)});
      sources.push_back(source);
    }
    if (counts[row] == 0) continue;
    for (int64_t begin = 0; begin < tensors[first].numel(); begin += kGramChunk) {
      const int64_t end = std::min(begin + kGramChunk, tensors[first].numel());
      chunks.push_back({first, counts[row], begin, end, partials});
      partials += counts[row] * counts[row];
    }
  }

  std::vector<double> partial(partials);
  at::parallel_for(0, chunks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch;
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks[c];
      scratch.resize(gram_scratch(chunk.count));
      gram_kernel(vectors.data() + chunk.first, chunk.count, chunk.begin, chunk.end,
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
