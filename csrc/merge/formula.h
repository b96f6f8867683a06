// merge:  b <- round(b + sum_k alpha_k v_k), summed in the order k = 0 .. K-1
// gram:   G[i, j] = <v_i, v_j>
// Product and sum are rounded separately (no fused multiply-add), so that every ISA, the GPU and
// plain torch agree bit for bit.
#pragma once

#include "../scalar.h"

namespace tangentfast {

TF_INLINE float axpy(float acc, float alpha, float v) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(acc, __fmul_rn(alpha, v));
#else
  return acc + alpha * v;
#endif
}

TF_INLINE double axpy(double acc, double alpha, double v) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(acc, __dmul_rn(alpha, v));
#else
  return acc + alpha * v;
#endif
}

}  // namespace tangentfast
