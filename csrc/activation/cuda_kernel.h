// The launch of an activation: no torch, no allocation, no waiting.
#pragma once

#include <cuda_runtime_api.h>

#include "kernel.h"

namespace tangentfast::activation {

void activation_jvp_launch(const Item& item, int64_t numel, cudaStream_t stream);

}  // namespace tangentfast::activation
