// A row belongs to a warp or to a block, which keeps it in registers: x and each dx are read once,
// up to 1,024 floats (512 doubles) by a warp and 4,096 (2,048) by a block. Rows that are longer, or
// that cannot be read 16 bytes at a time, are read again for each of their sums.
#include "cuda_kernel.h"

#include "../cuda/launch.h"
#include "../cuda/memory.h"
#include "formula.h"

namespace tangentfast::layer_norm {
namespace {

constexpr int kBlock = 128;  // threads
constexpr int kTangents = 32;  // of a launch: their pointers are kernel parameters
constexpr int kShort = 64, kLong = 128;  // bytes that a thread keeps of a row

struct Launch {
  Item item;
  Tangent tangents[kTangents];
  int64_t rows;
};

template <class Acc>
struct Sums {
  Acc a, b;
};

// Sums over the threads of a row, in the same order for all of them.
template <int threads, class Acc>
__device__ __forceinline__ Sums<Acc> row_sums(Acc a, Acc b) {
#pragma unroll
  for (int step = 16; step; step /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, step);
    b += __shfl_xor_sync(0xffffffffu, b, step);
  }
  if constexpr (threads > 32) {
    constexpr int warps = threads / 32;
    __shared__ Sums<Acc> partial[warps];
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = {a, b};
    __syncthreads();
    a = b = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) a += partial[w].a, b += partial[w].b;
    __syncthreads();  // before the next sum overwrites it
  }
  return {a, b};
}

// n numbers of a row of weights from i on, `fill` where there are none.
template <int n, class T, class Acc>
__device__ __forceinline__ void weights_at(const void* data, Type type, int64_t i, Acc fill,
                                           Acc (&out)[n]) {
  if (!data) {
#pragma unroll
    for (int v = 0; v < n; ++v) out[v] = fill;
  } else if (type == Type::f32 && sizeof(T) == 2) {
    constexpr int step = n < 4 ? n : 4;
#pragma unroll
    for (int v = 0; v < n; ++v) {
      const auto* const at = static_cast<const float*>(data) + i + v / step * step;
      out[v] = unpacked<float, step>(load_word<float, step>(at)).v[v % step];
    }
  } else {
    const auto pack = unpacked<T, n>(load_word<T, n>(static_cast<const T*>(data) + i));
#pragma unroll
    for (int v = 0; v < n; ++v) out[v] = load<Acc>(pack.v[v]);
  }
}

__device__ __forceinline__ int terms_of(const Tangent& t) {
  return (t.dx ? kFromInput : 0) | (t.dweight ? kFromWeight : 0) | (t.dbias ? kFromBias : 0);
}

template <int n, class T, class Acc>
__device__ __forceinline__ void store_value(const Item& item, const Acc* x_hat, int64_t i,
                                            int64_t offset) {
  Acc w[n], b[n];
  weights_at<n, T>(item.weight, item.weights, i, Acc(1), w);
  weights_at<n, T>(item.bias, item.weights, i, Acc(0), b);
  Pack<T, n> y;
#pragma unroll
  for (int v = 0; v < n; ++v) store(norm_value(x_hat[v], w[v], b[v]), y.v[v]);
  store_pack<T, n>(y, static_cast<T*>(item.y) + offset + i);
}

template <int n, class T, class Acc>
__device__ __forceinline__ void store_tangent(const Item& item, const Tangent& t,
                                              const Acc* dx, const Acc* x_hat, Acc mean_dx,
                                              Acc along, Acc rstd, int64_t i, int64_t offset) {
  const int terms = terms_of(t);
  Acc w[n], dw[n], db[n];
  weights_at<n, T>(terms & kFromInput ? item.weight : nullptr, item.weights, i, Acc(1), w);
  weights_at<n, T>(t.dweight, item.weights, i, Acc(0), dw);
  weights_at<n, T>(t.dbias, item.weights, i, Acc(0), db);
  Pack<T, n> dy;
#pragma unroll
  for (int v = 0; v < n; ++v) {
    store(norm_tangent(terms, dx[v], mean_dx, along, x_hat[v], rstd, w[v], dw[v], db[v]), dy.v[v]);
  }
  store_pack<T, n>(dy, static_cast<T*>(t.dy) + offset + i);
}

// `threads` to a row, each with `bytes` of it; all threads of a block take as many rows.
template <class T, int threads, int bytes>
__global__ void __launch_bounds__(kBlock, 3)
    norm_jvp_kernel(const __grid_constant__ Launch launch) {
  using Acc = typename Accumulator<T>::type;
  constexpr int pack = kPack<T>, kept = bytes / sizeof(Acc), packs = kept / pack;
  static_assert(packs > 0, "a thread keeps less than it reads at once");
  const Item& item = launch.item;
  const int64_t n = item.size;
  const int lane = threadIdx.x % threads;
  for (int64_t row = blockIdx.x * (kBlock / threads) + threadIdx.x / threads; row < launch.rows;
       row += gridDim.x * (kBlock / threads)) {
    const int64_t offset = row * n;
    const auto first = [&](int p) { return int64_t{p * threads + lane} * pack; };
    const auto read = [&](const void* data, Acc(&to)[kept]) {
      const T* const stored = static_cast<const T*>(data) + offset;
      Pack<T, pack> packed[packs];
#pragma unroll
      for (int p = 0; p < packs; ++p) {
        if (first(p) < n) packed[p] = unpacked<T, pack>(load_word<T, pack>(stored + first(p)));
      }
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        to[i] = first(i / pack) < n ? load<Acc>(packed[i / pack].v[i % pack]) : Acc(0);
      }
    };
    Acc x_hat[kept], dx[kept];
    read(item.x, x_hat);
    Acc a = 0, b = 0;
    if (item.centered) {
#pragma unroll
      for (int i = 0; i < kept; ++i) a += x_hat[i];
      a = row_sums<threads>(a, b).a / n;
    }
    const Acc near = a;
    a = 0;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const Acc d = first(i / pack) < n ? x_hat[i] - near : 0;
      a += d, b += d * d;
    }
    Sums<Acc> sums = row_sums<threads>(a, b);
    const Statistics<Acc> s = norm_statistics(near, sums.a, sums.b, n, item.centered,
                                              static_cast<Acc>(item.eps));
    if (lane == 0) {
      if (item.mean) static_cast<Acc*>(item.mean)[row] = s.near + s.rest;
      static_cast<Acc*>(item.rstd)[row] = s.rstd;
    }
#pragma unroll
    for (int i = 0; i < kept; ++i) x_hat[i] = normalized(x_hat[i], s);
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if (first(p) < n) store_value<pack, T>(item, x_hat + p * pack, first(p), offset);
    }
#pragma unroll 1
    for (int64_t k = 0; k < item.count; ++k) {
      const Tangent& t = launch.tangents[k];
      Acc mean_dx = 0, along = 0;
      if (t.dx) {
        read(t.dx, dx);
#pragma unroll
        for (int i = 0; i < kept; ++i) {
          if (first(i / pack) < n) mean_dx += dx[i], along += dx[i] * x_hat[i];
        }
        sums = row_sums<threads>(mean_dx, along);
        mean_dx = item.centered ? sums.a / n : 0;
        along = sums.b / n;
      }
#pragma unroll
      for (int p = 0; p < packs; ++p) {
        if (first(p) < n) {
          store_tangent<pack, T>(item, t, dx + p * pack, x_hat + p * pack, mean_dx, along, s.rstd,
                                 first(p), offset);
        }
      }
    }
  }
}

// A block to a row of any length and alignment, one number at a time.
template <class T>
__global__ void __launch_bounds__(kBlock)
    norm_jvp_any_kernel(const __grid_constant__ Launch launch) {
  using Acc = typename Accumulator<T>::type;
  const Item& item = launch.item;
  const int64_t n = item.size;
  for (int64_t row = blockIdx.x; row < launch.rows; row += gridDim.x) {
    const int64_t offset = row * n;
    const T* const x = static_cast<const T*>(item.x) + offset;
    Acc a = 0, b = 0;
    for (int64_t i = threadIdx.x; i < n; i += kBlock) a += load<Acc>(x[i]);
    const Acc near = item.centered ? row_sums<kBlock>(a, b).a / n : 0;
    a = 0;
    for (int64_t i = threadIdx.x; i < n; i += kBlock) {
      const Acc d = load<Acc>(x[i]) - near;
      a += d, b += d * d;
    }
    Sums<Acc> sums = row_sums<kBlock>(a, b);
    const Statistics<Acc> s = norm_statistics(near, sums.a, sums.b, n, item.centered,
                                              static_cast<Acc>(item.eps));
    if (threadIdx.x == 0) {
      if (item.mean) static_cast<Acc*>(item.mean)[row] = s.near + s.rest;
      static_cast<Acc*>(item.rstd)[row] = s.rstd;
    }
    for (int64_t i = threadIdx.x; i < n; i += kBlock) {
      const Acc x_hat = normalized(load<Acc>(x[i]), s);
      store_value<1, T>(item, &x_hat, i, offset);
    }
    for (int64_t k = 0; k < item.count; ++k) {
      const Tangent& t = launch.tangents[k];
      const T* const dx = static_cast<const T*>(t.dx) + offset;
      Acc mean_dx = 0, along = 0;
      if (t.dx) {
        for (int64_t i = threadIdx.x; i < n; i += kBlock) {
          const Acc d = load<Acc>(dx[i]);
          mean_dx += d, along += d * normalized(load<Acc>(x[i]), s);
        }
        sums = row_sums<kBlock>(mean_dx, along);
        mean_dx = item.centered ? sums.a / n : 0;
        along = sums.b / n;
      }
      for (int64_t i = threadIdx.x; i < n; i += kBlock) {
        const Acc x_hat = normalized(load<Acc>(x[i]), s);
        const Acc d = t.dx ? load<Acc>(dx[i]) : Acc(0);
        store_tangent<1, T>(item, t, &d, &x_hat, mean_dx, along, s.rstd, i, offset);
      }
    }
  }
}

template <class T>
void launch_rows(const Launch& launch, bool aligned, cudaStream_t stream) {
  using Acc = typename Accumulator<T>::type;
  constexpr int64_t few = kShort / sizeof(Acc), many = kLong / sizeof(Acc);
  const int64_t n = launch.item.size;
  const auto run = [&](auto kernel, int rows_of_block) {
    const int64_t blocks = (launch.rows + rows_of_block - 1) / rows_of_block;
    kernel<<<grid_for(blocks, 16), kBlock, 0, stream>>>(launch);
  };
  if (aligned && n <= 32 * many) {
    run(norm_jvp_kernel<T, 32, kLong>, kBlock / 32);
  } else if (aligned && n <= kBlock * few) {
    run(norm_jvp_kernel<T, kBlock, kShort>, 1);
  } else if (aligned && n <= kBlock * many) {
    run(norm_jvp_kernel<T, kBlock, kLong>, 1);
  } else {
    run(norm_jvp_any_kernel<T>, 1);
  }
}

}  // namespace

void norm_jvp_launch(const Item& item, int64_t rows, cudaStream_t stream) {
  if (rows == 0) return;
  uintptr_t addresses = 0;  // their low bits, all together
  const auto note = [&](auto... pointers) {
    ((addresses |= reinterpret_cast<uintptr_t>(pointers)), ...);
  };
  note(item.x, item.weight, item.bias, item.y);
  for (int64_t k = 0; k < item.count; ++k) {
    const Tangent& t = item.tangents[k];
    note(t.dx, t.dweight, t.dbias, t.dy);
  }
  const int size = size_of(item.type);
  const bool aligned = addresses % 16 == 0 && item.size * size % 16 == 0;
  int64_t next = 0;
  do {  // more tangents than a launch takes need another, which writes y again
    Launch launch{item, {}, rows};
    launch.item.count = std::min<int64_t>(item.count - next, kTangents);
    std::copy_n(item.tangents + next, launch.item.count, launch.tangents);
    next += launch.item.count;
    switch (item.type) {
      case Type::f64: launch_rows<double>(launch, aligned, stream); break;
      case Type::f32: launch_rows<float>(launch, aligned, stream); break;
      case Type::f16: launch_rows<Half>(launch, aligned, stream); break;
      case Type::bf16: launch_rows<BFloat16>(launch, aligned, stream); break;
    }
  } while (next < item.count);
}

}  // namespace tangentfast::layer_norm
