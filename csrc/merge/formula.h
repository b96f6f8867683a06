// merge:  b <- round(b + sum_k alpha_k v_k): the terms in the order k = 0 .. K-1, the base last
// gram:   G[i, j] = <v_i, v_j>
// The sum of a merge has twice the digits of its widest tensor: float for halves, double for floats,
// a pair of doubles for doubles. Rounding it to the base is then all that is lost, whatever K is.
// Product and sum are rounded separately (no fused multiply-add but where it is exact), so that
// every ISA, the GPU and plain torch agree bit for bit.
#pragma once

#include <cmath>

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

TF_INLINE double fused(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// A sum begins at -0, to which every x adds as x.
template <class A>
struct Plain {
  using Number = A;
  A sum = A(-0.0);

  TF_INLINE void add(A alpha, A v) { sum = axpy(sum, alpha, v); }
  TF_INLINE A plus(A base) const { return base + sum; }
};

// hi + lo, by the exact errors of product and sum (Ogita, Rump and Oishi 2005, algorithm Dot2).
struct Twice {
  using Number = double;
  double hi = -0.0, lo = 0;

  TF_INLINE void add(double alpha, double v) {
    const double p = alpha * v, s = hi + p, t = s - hi;
    lo += ((hi - (s - t)) + (p - t)) + fused(alpha, v, -p);
    hi = s;
  }
  TF_INLINE double plus(double base) const {
    const double s = base + hi, t = s - base;
    const double rest = ((base - (s - t)) + (hi - t)) + lo;
    // Neither a rest of +0, which would lose the sign of -0, nor that of an infinity, which is NaN.
    return s - s == 0 && rest != 0 ? s + rest : s;
  }
};

}  // namespace tangentfast
