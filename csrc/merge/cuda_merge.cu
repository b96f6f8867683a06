#include "cuda_kernel.h"

#include <memory>

#include "../cuda/launch.h"
#include "../cuda/memory.h"
#include "formula.h"

namespace tangentfast {
namespace {

constexpr int kThreads = 256;
constexpr int kFlight = 8;  // loads that a thread has under way, as many as the CPU reads streams

template <class S>
constexpr bool kWide = sizeof(typename S::Number) == 8;
template <class S>
constexpr bool kPair = sizeof(S) == 16;  // for a base of doubles, and for nothing else

// Terms of one type, added in their order to `width` elements.
template <class V, int width, class S>
__device__ __forceinline__ void add_run(const MergeTable& table, int first, int count, int64_t at,
                                        S (&sums)[width]) {
  using A = typename S::Number;
  if constexpr (width * sizeof(V) <= kAccessBytes) {
#pragma unroll 1
    for (int k = 0; k < count; k += kFlight) {
      Word<V, width> words[kFlight];
#pragma unroll
      for (int j = 0; j < kFlight; ++j) {
        if (k + j < count) {
          words[j] = load_word<V, width>(static_cast<const V*>(table.data[first + k + j]) + at);
        }
      }
#pragma unroll
      for (int j = 0; j < kFlight; ++j) {
        if (k + j < count) {
          const A alpha = static_cast<A>(table.alpha[first + k + j]);
          const Pack<V, width> v = unpacked<V, width>(words[j]);
#pragma unroll
          for (int w = 0; w < width; ++w) sums[w].add(alpha, load<A>(v.v[w]));
        }
      }
    }
  }
}

template <int width, class S>
__device__ __forceinline__ void add_terms(const MergeTable& table, const MergeEntry& entry,
                                          int64_t at, S (&sums)[width]) {
  const int end = entry.first_term + entry.count;
#pragma unroll 1
  for (int first = entry.first_term, next = first; first < end; first = next) {
    const Type type = static_cast<Type>(table.type[first]);
#pragma unroll 1
    while (next < end && static_cast<Type>(table.type[next]) == type) ++next;
    switch (type) {
      case Type::f64:  // in a float sum there is neither of these
        if constexpr (kWide<S>) add_run<double>(table, first, next - first, at, sums);
        break;
      case Type::f32:
        if constexpr (kWide<S>) add_run<float>(table, first, next - first, at, sums);
        break;
      case Type::f16: add_run<Half>(table, first, next - first, at, sums); break;
      case Type::bf16: add_run<BFloat16>(table, first, next - first, at, sums); break;
    }
  }
}

template <class B, class S, int width>
__device__ __forceinline__ void merge_elements(const MergeTable& table, const MergeEntry& entry,
                                               int64_t begin, int64_t end) {
  if constexpr (width * sizeof(B) <= kAccessBytes) {
    B* const base = static_cast<B*>(entry.base);
#pragma unroll 1
    for (int64_t i = begin + threadIdx.x * width; i < end; i += kThreads * width) {
      Pack<B, width> b = unpacked<B, width>(load_word<B, width>(base + i));
      S sums[width];
      add_terms(table, entry, i, sums);
#pragma unroll
      for (int w = 0; w < width; ++w) store(sums[w].plus(load<typename S::Number>(b.v[w])), b.v[w]);
      store_pack(b, base + i);
    }
  }
}

template <class S, int width>
__device__ __forceinline__ void merge_range(const MergeTable& table, const MergeEntry& entry,
                                            int64_t begin, int64_t end) {
  if (begin == end) return;
  switch (entry.type) {
    case Type::f64:
      if constexpr (kPair<S>) merge_elements<double, S, width>(table, entry, begin, end);
      break;
    case Type::f32:
      if constexpr (kWide<S> && !kPair<S>) merge_elements<float, S, width>(table, entry, begin, end);
      break;
    case Type::f16:
      if constexpr (!kPair<S>) merge_elements<Half, S, width>(table, entry, begin, end);
      break;
    case Type::bf16:
      if constexpr (!kPair<S>) merge_elements<BFloat16, S, width>(table, entry, begin, end);
      break;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    merge_multi_kernel(const __grid_constant__ MergeTable table) {
#pragma unroll 1
  for (int64_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const MergeEntry& entry = table.entry[entry_of(table.entry, table.entries, chunk)];
    const Span span = span_of(entry.numel, entry.head, entry.width, kMergeChunk,
                              chunk - entry.first_chunk);
    const bool scalar = entry.width == 1;
    if constexpr (kWide<S>) {
      if (entry.width == 2) merge_range<S, 2>(table, entry, span.from, span.to);
      if (!kPair<S> && entry.width == 4) merge_range<S, 4>(table, entry, span.from, span.to);
    } else {
      if (!scalar) merge_range<S, 8>(table, entry, span.from, span.to);
    }
    merge_range<S, 1>(table, entry, span.begin, scalar ? span.end : span.from);
    merge_range<S, 1>(table, entry, scalar ? span.end : span.to, span.end);
  }
}

template <class S>
void launch_merge(const std::vector<MergeItem>& items, Sum sum, cudaStream_t stream) {
  const auto table = std::make_unique<MergeTable>();
  for (size_t next = 0; next < items.size();) {
    next = pack_merge(items.data(), items.size(), next, sum, *table);
    if (table->entries == 0) continue;
    merge_multi_kernel<S><<<grid_for(table->chunks, 8), kThreads, 0, stream>>>(*table);
  }
}

}  // namespace

void merge_launch(const std::vector<MergeItem>& items, cudaStream_t stream) {
  launch_merge<Plain<float>>(items, Sum::f32, stream);
  launch_merge<Plain<double>>(items, Sum::f64, stream);
  launch_merge<Twice>(items, Sum::twice, stream);
}

}  // namespace tangentfast
