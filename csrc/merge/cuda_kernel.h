// The launches of merge and gram: no torch, no allocation, no waiting.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "table.h"

namespace tangentfast {

// merge_kernel over all elements of all items; each has MergeTable::kTerms terms at most.
void merge_launch(const std::vector<MergeItem>& items, cudaStream_t stream);

// result [size, size] in double. partial: [gram_parts(rows), size, size] zeros.
void gram_launch(const std::vector<GramRow>& rows, const std::vector<Vector>& vectors,
                 const int64_t* owners, int64_t size, double* partial, double* result,
                 cudaStream_t stream);

}  // namespace tangentfast
