// The device of a call and its current stream, for as long as the call lasts.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace tangentfast {

class CudaContext {
 public:
  // Without a GPU in it where `tensor` is elsewhere: the checks will say so.
  explicit CudaContext(const at::Tensor& tensor) : CudaContext(tensor.device()) {}

  // The first GPU among the tensors: there is one, or the dispatcher would not have come here.
  CudaContext(at::TensorList some, at::TensorList others) : CudaContext(first(some, others)) {}

  at::Device device() const { return device_; }
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(device_.index()); }

 private:
  explicit CudaContext(at::Device device) : device_(device) {
    if (device.is_cuda()) guard_.set_device(device);
  }

  static at::Device first(at::TensorList some, at::TensorList others) {
    for (const at::TensorList list : {some, others}) {
      for (const at::Tensor& tensor : list) {
        if (tensor.is_cuda()) return tensor.device();
      }
    }
    return at::kCPU;
  }

  at::Device device_;
  c10::cuda::OptionalCUDAGuard guard_;
};

}  // namespace tangentfast
