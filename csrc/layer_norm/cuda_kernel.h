// The launch of the norms: no torch, no allocation, no waiting.
#pragma once

#include <cuda_runtime_api.h>

#include "kernel.h"

namespace tangentfast {

void norm_jvp_launch(const NormItem& item, int64_t rows, cudaStream_t stream);

}  // namespace tangentfast
