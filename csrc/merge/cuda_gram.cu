#include "cuda_kernel.h"

#include <memory>

#include "../cuda/launch.h"
#include "../cuda/memory.h"
#include "formula.h"

namespace tangentfast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Pairs of one tile: (i, j <= i) of the left ones, or (left, right).
template <bool diagonal>
constexpr int kPairs = diagonal ? kLeft * (kLeft + 1) / 2 : kLeft * kRight;
template <bool diagonal>
constexpr int kInTile = diagonal ? kLeft : kLeft + kRight;

template <bool diagonal>
__device__ __forceinline__ void add_pairs(const double* x, int left,
                                          double (&sum)[kPairs<diagonal>]) {
  int p = 0;
#pragma unroll
  for (int i = 0; i < kLeft; ++i) {
#pragma unroll
    for (int j = 0; j < (diagonal ? i + 1 : kRight); ++j, ++p) {
      if (i < left) sum[p] = axpy(sum[p], x[i], x[diagonal ? j : kLeft + j]);
    }
  }
}

// Place k of a tile holds vector k of the left ones, then those of the right ones from kLeft on.
__device__ __forceinline__ int vector_at(const GramEntry& entry, int k) {
  const bool there = k < kLeft ? k < entry.left : k - kLeft < entry.right;
  return there ? entry.first_vector + (k < kLeft ? k : entry.left + k - kLeft) : -1;
}

// `aligned` changes how, not which elements a thread reads: the order of the sum is that of the types.
template <class V, bool diagonal>
__device__ __forceinline__ void gram_elements(const GramTable& table, const GramEntry& entry,
                                              int64_t begin, int64_t end,
                                              double (&sum)[kPairs<diagonal>]) {
  constexpr int width = kPack<V>;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x * width; i < end; i += kThreads * width) {
    Pack<V, width> v[kInTile<diagonal>];
#pragma unroll
    for (int k = 0; k < kInTile<diagonal>; ++k) {
      const int at = vector_at(entry, k);
      v[k] = {};
      if (at < 0) continue;
      const V* const data = static_cast<const V*>(table.data[at]) + i;
      if (entry.aligned && i + width <= end) {
        v[k] = unpacked<V, width>(load_word<V, width>(data));
      } else {
#pragma unroll
        for (int w = 0; w < width; ++w) {
          if (i + w < end) v[k].v[w] = data[w];
        }
      }
    }
#pragma unroll
    for (int w = 0; w < width; ++w) {
      double x[kInTile<diagonal>];
#pragma unroll
      for (int k = 0; k < kInTile<diagonal>; ++k) x[k] = load<double>(v[k].v[w]);
      add_pairs<diagonal>(x, entry.left, sum);
    }
  }
}

__device__ __forceinline__ double element(const void* data, Type type, int64_t i) {
  switch (type) {
    case Type::f64: return static_cast<const double*>(data)[i];
    case Type::f32: return static_cast<const float*>(data)[i];
    case Type::f16: return load<double>(static_cast<const Half*>(data)[i]);
    case Type::bf16: break;
  }
  return load<double>(static_cast<const BFloat16*>(data)[i]);
}

template <bool diagonal>
__device__ __forceinline__ void gram_mixed(const GramTable& table, const GramEntry& entry,
                                           int64_t begin, int64_t end,
                                           double (&sum)[kPairs<diagonal>]) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    double x[kInTile<diagonal>];
#pragma unroll
    for (int k = 0; k < kInTile<diagonal>; ++k) {
      const int at = vector_at(entry, k);
      x[k] = at < 0 ? 0 : element(table.data[at], static_cast<Type>(table.type[at]), i);
    }
    add_pairs<diagonal>(x, entry.left, sum);
  }
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// One block sums one chunk of a tile, into the part of that chunk.
template <bool diagonal>
__global__ void __launch_bounds__(kThreads)
    gram_multi_kernel(const __grid_constant__ GramTable table, int64_t size, double* partial) {
  __shared__ double warps[kWarps][kPairs<diagonal>];
  for (int64_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const GramEntry& entry = table.entry[entry_of(table.entry, table.entries, chunk)];
    const int64_t begin = (chunk - entry.first_chunk) * kGramPart;
    const int64_t end = begin + kGramPart < entry.numel ? begin + kGramPart : entry.numel;
    double sum[kPairs<diagonal>];
#pragma unroll
    for (int p = 0; p < kPairs<diagonal>; ++p) sum[p] = 0;
    if (entry.mixed) {
      gram_mixed<diagonal>(table, entry, begin, end, sum);
    } else {
      switch (entry.type) {
        case Type::f64: gram_elements<double, diagonal>(table, entry, begin, end, sum); break;
        case Type::f32: gram_elements<float, diagonal>(table, entry, begin, end, sum); break;
        case Type::f16: gram_elements<Half, diagonal>(table, entry, begin, end, sum); break;
        case Type::bf16: gram_elements<BFloat16, diagonal>(table, entry, begin, end, sum); break;
      }
    }
#pragma unroll
    for (int p = 0; p < kPairs<diagonal>; ++p) {
      const double total = warp_sum(sum[p]);
      if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][p] = total;
    }
    __syncthreads();
    const int p = threadIdx.x;
    if (p < kPairs<diagonal>) {
      int i = p / kRight, j = p % kRight;
      if (diagonal) {
        for (i = 0; (i + 1) * (i + 2) / 2 <= p;) ++i;
        j = p - i * (i + 1) / 2;
      }
      const int row = vector_at(entry, i), column = vector_at(entry, diagonal ? j : kLeft + j);
      if (row >= 0 && column >= 0) {
        double total = 0;
        for (int w = 0; w < kWarps; ++w) total += warps[w][p];
        const int64_t part = entry.first_part + (chunk - entry.first_chunk);
        partial[(part * size + table.owner[row]) * size + table.owner[column]] = total;
      }
    }
    __syncthreads();
  }
}

// result[i, j] is the sum of partial[part, max(i, j), min(i, j)]; one block for each (i, j).
__global__ void __launch_bounds__(kThreads)
    gram_sum_kernel(const double* partial, int64_t parts, int64_t size, double* result) {
  __shared__ double warps[kWarps];
  for (int64_t entry = blockIdx.x; entry < size * size; entry += gridDim.x) {
    const int64_t i = entry / size, j = entry % size;
    const int64_t at = i > j ? i * size + j : j * size + i;
    double sum = 0;
    for (int64_t part = threadIdx.x; part < parts; part += kThreads) {
      sum += partial[part * size * size + at];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += warps[w];
      result[entry] = total;
    }
    __syncthreads();
  }
}

template <bool diagonal>
void launch_gram(const std::vector<GramRow>& rows, const std::vector<Vector>& vectors,
                 const int64_t* owners, int64_t size, double* partial, cudaStream_t stream) {
  const auto scratch = std::make_unique<GramTable>();
  pack_gram(rows, vectors, owners, diagonal, *scratch, [&](const GramTable& table) {
    gram_multi_kernel<diagonal>
        <<<grid_for(table.chunks, 2), kThreads, 0, stream>>>(table, size, partial);
  });
}

}  // namespace

void gram_launch(const std::vector<GramRow>& rows, const std::vector<Vector>& vectors,
                 const int64_t* owners, int64_t size, double* partial, double* result,
                 cudaStream_t stream) {
  if (size == 0) return;
  launch_gram<true>(rows, vectors, owners, size, partial, stream);
  launch_gram<false>(rows, vectors, owners, size, partial, stream);
  gram_sum_kernel<<<grid_for(size * size, 8), kThreads, 0, stream>>>(partial, gram_parts(rows),
                                                                    size, result);
}

}  // namespace tangentfast
