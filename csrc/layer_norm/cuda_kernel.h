// The launch of the norms: no torch, no allocation, no waiting.
#pragma once

#include <cuda_runtime_api.h>

#include "kernel.h"

namespace tangentfast::layer_norm {

void norm_jvp_launch(const Item& item, int64_t rows, cudaStream_t stream);

}  // namespace tangentfast::layer_norm
