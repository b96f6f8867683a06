// Sizes of grids.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace tangentfast {

// Blocks for `work` pieces that a kernel takes in a grid-stride loop: no more than run at once.
inline unsigned grid_for(int64_t work, int blocks_per_multiprocessor) {
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t most = static_cast<int64_t>(std::max(multiprocessors, 1)) * blocks_per_multiprocessor;
  return static_cast<unsigned>(std::min(work, most));
}

}  // namespace tangentfast
