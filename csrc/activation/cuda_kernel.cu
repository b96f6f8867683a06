#include "cuda_kernel.h"

#include "../cuda/launch.h"
#include "../cuda/memory.h"
#include "formula.h"
#include "packs.h"

namespace tangentfast::activation {
namespace {

constexpr int kThreads = 256;
constexpr int kTangents = 32;  // of a launch: their pointers are kernel parameters

struct Launch {
  Item item;
  Tangent tangents[kTangents];
  int64_t begin, end;  // of all elements
};

template <int n, class T, class Acc>
__device__ __forceinline__ void numbers_at(const Rows& rows, int64_t row, int64_t column,
                                           Acc (&out)[n]) {
  const T* const data = static_cast<const T*>(rows.data) + row * rows.stride + column;
  const auto pack = unpacked<T, n>(load_word<T, n>(data));
#pragma unroll
  for (int v = 0; v < n; ++v) out[v] = load<Acc>(pack.v[v]);
}

// n numbers of a row at once; columns, begin and end are multiples of n.
template <Activation kind, class T, int n>
__global__ void __launch_bounds__(kThreads)
    activation_jvp_kernel(const __grid_constant__ Launch launch) {
  using Acc = typename Accumulator<T>::type;
  const Item& item = launch.item;
  const int64_t step = int64_t{gridDim.x} * kThreads * n;
  int64_t i = launch.begin + (int64_t{blockIdx.x} * kThreads + threadIdx.x) * n;
  // One division for all steps: 64-bit ones take longer than the rest.
  const int64_t row_step = step / item.columns, column_step = step % item.columns;
  int64_t row = i / item.columns, column = i % item.columns;
  for (; i < launch.end; i += step) {
    Acc number[n], slope[n];
    Pack<T, n> out;
    numbers_at<n, T>(item.x, row, column, number);
#pragma unroll
    for (int v = 0; v < n; ++v) {
      const Dual<Acc> f = value_and_slope<kind, sizeof(T) == 2>(number[v]);
      store(f.value, out.v[v]);
      slope[v] = f.slope;
    }
    store_pack<T, n>(out, static_cast<T*>(item.y) + i);
#pragma unroll 1
    for (int64_t k = 0; k < item.count; ++k) {
      numbers_at<n, T>(launch.tangents[k].dx, row, column, number);
#pragma unroll
      for (int v = 0; v < n; ++v) store(slope[v] * number[v], out.v[v]);
      store_pack<T, n>(out, static_cast<T*>(launch.tangents[k].dy) + i);
    }
    row += row_step, column += column_step;
    if (column >= item.columns) column -= item.columns, ++row;
  }
}

template <Activation kind, class T, int n>
void launch_range(Launch& launch, int64_t begin, int64_t end, cudaStream_t stream) {
  if (begin == end) return;
  launch.begin = begin, launch.end = end;
  const int64_t blocks = ((end - begin) / n + kThreads - 1) / kThreads;
  activation_jvp_kernel<kind, T, n><<<grid_for(blocks, 8), kThreads, 0, stream>>>(launch);
}

// [0, whole) 16 bytes at a time, and the rest one by one.
template <class T>
void launch_kind(Launch& launch, int64_t whole, int64_t numel, cudaStream_t stream) {
#define TF_KIND(kind)                                                                   \
  case kind:                                                                            \
    launch_range<kind, T, kPack<T>>(launch, 0, whole, stream);                          \
    return launch_range<kind, T, 1>(launch, whole, numel, stream);
  switch (launch.item.kind) {
    TF_KIND(Activation::gelu)
    TF_KIND(Activation::gelu_tanh)
    TF_KIND(Activation::silu)
  }
#undef TF_KIND
}

}  // namespace

void activation_jvp_launch(const Item& item, int64_t numel, cudaStream_t stream) {
  const int64_t whole = whole_packs(item, numel);
  int64_t next = 0;
  do {  // more tangents than a launch takes need another, which writes y again
    Launch launch{item, {}, 0, 0};
    launch.item.count = std::min<int64_t>(item.count - next, kTangents);
    std::copy_n(item.tangents + next, launch.item.count, launch.tangents);
    next += launch.item.count;
    switch (item.type) {
      case Type::f64: launch_kind<double>(launch, whole, numel, stream); break;
      case Type::f32: launch_kind<float>(launch, whole, numel, stream); break;
      case Type::f16: launch_kind<Half>(launch, whole, numel, stream); break;
      case Type::bf16: launch_kind<BFloat16>(launch, whole, numel, stream); break;
    }
  } while (next < item.count);
}

}  // namespace tangentfast::activation
