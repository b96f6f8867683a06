// Layer norm and RMS norm of a row x of n numbers, with K tangents:
//   x^ = (x - mean) rstd                                   (mean = 0 for RMS norm)
//   y  = x^ w + b
//   dy = (dx - <dx> - x^ <dx x^>) rstd w + x^ dw + db      (<.> is a row's mean; <dx> = 0 for RMS)
// Product and sum are rounded separately, so that every instruction set gives the same bits.
#pragma once

#include "../scalar.h"

namespace tangentfast {

// Which terms of dy there are.
constexpr int kFromInput = 1, kFromWeight = 2, kFromBias = 4;

template <class Acc>
TF_INLINE Acc norm_value(Acc x_hat, Acc w, Acc b) {
  return x_hat * w + b;
}

// `mean_dx` is <dx>, `along` is <dx x^>; only what `terms` names is used.
template <int terms, class Acc>
TF_INLINE Acc norm_tangent(Acc dx, Acc mean_dx, Acc along, Acc x_hat, Acc rstd, Acc w, Acc dw,
                           Acc db) {
  Acc dy = 0;
  if (terms & kFromInput) dy = ((dx - mean_dx) - x_hat * along) * rstd * w;
  if (terms & kFromWeight) dy = dy + x_hat * dw;
  if (terms & kFromBias) dy = dy + db;
  return dy;
}

}  // namespace tangentfast
