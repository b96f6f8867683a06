// Layer norm and RMS norm of a row x of n numbers, with K tangents:
//   x^ = (x - mean) rstd                                   (mean = 0 for RMS norm)
//   y  = x^ w + b
//   dy = (dx - <dx> - x^ <dx x^>) rstd w + x^ dw + db      (<.> is a row's mean; <dx> = 0 for RMS)
// Product and sum are rounded separately, so that every instruction set gives the same bits.
#pragma once

#include <cmath>

#include "../scalar.h"

namespace tangentfast::layer_norm {

// Which terms of dy there are.
constexpr int kFromInput = 1, kFromWeight = 2, kFromBias = 4;

// x^ = (x - near - rest) rstd. The mean is near + rest: near alone is rounded, and where it is much
// larger than the deviations its rounding error is not small beside them.
template <class Acc>
struct Statistics {
  Acc near, rest, rstd;
};

// From the sums of x - near and of its square. What is left of the sum of the deviations is the
// rounding error of the first pass, whose mean is `near` (Chan, Golub, LeVeque 1983).
template <class Acc>
TF_INLINE Statistics<Acc> norm_statistics(Acc near, Acc sum, Acc squares, int64_t n, bool centered,
                                          Acc eps) {
  Statistics<Acc> s{near, 0, 0};
  if (centered) s.rest = sum / n;
  const Acc variance = squares / n - s.rest * s.rest;
  s.rstd = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
  return s;
}

template <class Acc>
TF_INLINE Acc normalized(Acc x, const Statistics<Acc>& s) {
  return ((x - s.near) - s.rest) * s.rstd;
}

template <class Acc>
TF_INLINE Acc norm_value(Acc x_hat, Acc w, Acc b) {
  return x_hat * w + b;
}

// `mean_dx` is <dx>, `along` is <dx x^>; only what `terms` names is used.
template <class Acc>
TF_INLINE Acc norm_tangent(int terms, Acc dx, Acc mean_dx, Acc along, Acc x_hat, Acc rstd, Acc w,
                           Acc dw, Acc db) {
  Acc dy = 0;
  if (terms & kFromInput) dy = ((dx - mean_dx) - x_hat * along) * rstd * w;
  if (terms & kFromWeight) dy = dy + x_hat * dw;
  if (terms & kFromBias) dy = dy + db;
  return dy;
}

}  // namespace tangentfast::layer_norm
