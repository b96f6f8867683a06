// The device of a call and its current stream, for as long as the call lasts.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace tangentfast {

class CudaContext {
 public:
  explicit CudaContext(const at::Tensor& tensor) : guard_(tensor.device()) {}

  // The first GPU among the tensors: there is one, or the dispatcher would not have come here.
  CudaContext(at::TensorList some, at::TensorList others) : guard_(first(some, others)) {}

  at::Device device() const { return guard_.current_device(); }
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(device().index()); }

 private:
  static at::Device first(at::TensorList some, at::TensorList others) {
    for (const at::TensorList list : {some, others}) {
      for (const at::Tensor& tensor : list) {
        if (tensor.is_cuda()) return tensor.device();
      }
    }
    return at::Device(at::kCUDA, c10::cuda::current_device());
  }

  c10::cuda::CUDAGuard guard_;
};

}  // namespace tangentfast
