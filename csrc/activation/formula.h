// Activations f and their derivatives f' of one number, in float or double:
//   gelu        x P(x)                  with P, p the normal distribution and its density
//   gelu_tanh   x s(2 sqrt(2/pi) (x + 0.044715 x^3))    since (1 + tanh u) / 2 = s(2u)
//   quick_gelu  x s(1.702 x)            with s(v) = 1 / (1 + e^-v)
//   silu        x s(x)
//   sigmoid     s(x)
// Branch-free, of additions, multiplications and one division or two, so that compilers vectorise
// them on any instruction set and all give the same bits.
#pragma once

#include "../scalar.h"

namespace tangentfast {

enum class Activation : int32_t { gelu, gelu_tanh, quick_gelu, silu, sigmoid };

template <class Acc>
TF_INLINE Acc horner(Acc, Acc c) {
  return c;
}

// c + c1 x + c2 x^2 + ...
template <class Acc, class... Rest>
TF_INLINE Acc horner(Acc x, Acc c, Rest... rest) {
  return c + x * horner(x, static_cast<Acc>(rest)...);
}

TF_INLINE float magnitude(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu); }
TF_INLINE double magnitude(double x) {
  return bit_cast<double>(bit_cast<uint64_t>(x) & 0x7fffffffffffffffull);
}

// The upper half of the significant digits: its square is exact.
TF_INLINE float upper_half(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) & ~0xfffu); }
TF_INLINE double upper_half(double x) {
  return bit_cast<double>(bit_cast<uint64_t>(x) & ~0x7ffffffull);
}

// a where the sign bit of x is set, else b. Masks, because a compiler that minds floating-point
// traps makes branches of comparisons.
TF_INLINE float where_negative(float x, float a, float b) {
  const uint32_t mask = 0u - (bit_cast<uint32_t>(x) >> 31);
  return bit_cast<float>((bit_cast<uint32_t>(a) & mask) | (bit_cast<uint32_t>(b) & ~mask));
}
TF_INLINE double where_negative(double x, double a, double b) {
  const uint64_t mask = 0ull - (bit_cast<uint64_t>(x) >> 63);
  return bit_cast<double>((bit_cast<uint64_t>(a) & mask) | (bit_cast<uint64_t>(b) & ~mask));
}

// For x without a sign; NaN stays NaN.
template <class Acc>
TF_INLINE Acc at_most(Acc x, Acc limit) { return where_negative(limit - x, limit, x); }

// e^(x + rest) for -112 <= x <= 0 and a small `rest`, which carries digits that x has no room for.
// n = round(x log2 e) by the adder: 1.5 * 2^23 leaves no fraction, and n in the low bits.
// r = x - n log 2 with log 2 in two parts, the first short enough that n times it is exact (Cody
// and Waite 1980). e^r = 1 + r + r^2 q(r), q interpolated at Chebyshev nodes: error 1.2e-8.
// 2^n in two factors, so that what is below the normal numbers is rounded like any other.
TF_INLINE float exp_sum(float x, float rest) {
  const float kRound = 12582912.0f;
  const float shifted = (x + rest) * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = ((x - n * 0.693145752f) - n * 1.42860677e-6f) + rest;
  const float q = horner(r, 0.5f, 0.166665696f, 0.0416665454f, 0.00836438069f, 0.00139276846f);
  const uint32_t power = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kRound) + 2 * 127;
  const uint32_t half = power >> 1;
  const float a = bit_cast<float>(half << 23);
  const float b = bit_cast<float>((power - half) << 23);
  return (1 + (r + r * r * q)) * a * b;
}

// The same in double, for -800 <= x <= 0: 1.5 * 2^52, error of q 2.2e-17.
TF_INLINE double exp_sum(double x, double rest) {
  const double kRound = 6755399441055744.0;
  const double shifted = (x + rest) * 1.4426950408889634 + kRound;
  const double n = shifted - kRound;
  const double r = ((x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10) + rest;
  const double q =
      horner(r, 0.50000000000000012, 0.16666666666666668, 0.041666666666616862,
             0.0083333333333295031, 0.0013888888920770122, 0.00019841269865788536,
             2.4801515879478316e-5, 2.7557264294679126e-6, 2.7622614078619689e-7,
             2.5102327723609145e-8);
  const uint64_t power = bit_cast<uint64_t>(shifted) - bit_cast<uint64_t>(kRound) + 2 * 1023;
  const uint64_t half = power >> 1;
  const double a = bit_cast<double>(half << 52);
  const double b = bit_cast<double>((power - half) << 52);
  return (1 + (r + r * r * q)) * a * b;
}

// Where e^-x and e^(-x^2/2) are 0 in this type.
template <class Acc>
TF_INLINE Acc exp_limit() { return sizeof(Acc) == 4 ? Acc(110) : Acc(760); }
template <class Acc>
TF_INLINE Acc normal_limit() { return sizeof(Acc) == 4 ? Acc(14.75) : Acc(39); }

// The tail of the normal distribution is e^(-x^2/2) s R(1 - 2 s) for x >= 0, s = 4 / (4 + x): the
// substitution of Schonfelder (Math. Comp. 32, 1978) for the scaled complementary error function.
// R interpolated at Chebyshev nodes; relative error 1.3e-8, in double 3.6e-17.
TF_INLINE float tail_polynomial(float u) {
  return horner(u, 0.188821285f, -0.151974149f, 0.0967841708f, -0.0466308267f, 0.0151015464f,
                -0.0018813506f, -0.000880243206f, 0.000391720422f, 4.72491299e-5f,
                -3.13895964e-5f);
}

TF_INLINE double tail_polynomial(double u) {
  return horner(u, 0.18882128260393787, -0.15197416049297294, 0.09678435018555472,
                -0.046630464489923541, 0.015099143722674866, -0.0018850472413982648,
                -0.00086992309056063334, 0.0004077046104725899, 3.3336063504762279e-5,
                -5.7773704579844053e-5, -4.7696663291533936e-7, 8.7860452894402432e-6,
                1.7875139898040247e-7, -1.4797231829408091e-6, -1.56283026011967e-7,
                2.5495121295337932e-7, 6.5920621441019063e-8, -3.8565801341927685e-8,
                -1.9095205133726126e-8, 3.6446483367591149e-9, 3.4810059983754275e-9,
                1.8173863697566724e-11, -2.4133563550571262e-10);
}

template <class Acc>
struct Dual {
  Acc value, slope;
};

template <class Acc>
TF_INLINE Dual<Acc> gelu(Acc x) {
  const Acc a = at_most(magnitude(x), normal_limit<Acc>());
  // x^2 / 2 has twice the digits of x, and all of them count in the exponential.
  const Acc upper = upper_half(a);
  const Acc e = exp_sum(upper * upper * Acc(-0.5), (upper - a) * (upper + a) * Acc(0.5));
  const Acc s = 1 / (1 + Acc(0.25) * a);
  const Acc tail = e * (s * tail_polynomial(1 - 2 * s));
  const Acc below = where_negative(x, tail, 1 - tail);
  return {x * below, below + x * (e * Acc(0.39894228040143268))};
}

// s(v), and s'(v) = s(v) (1 - s(v)) without its cancellation.
template <class Acc>
TF_INLINE Dual<Acc> sigmoid(Acc v) {
  const Acc e = exp_sum(-at_most(magnitude(v), exp_limit<Acc>()), Acc(0));
  const Acc s = 1 / (1 + e);
  return {where_negative(v, e * s, s), e * s * s};
}

// x s(v(x)), v' = dv.
template <class Acc>
TF_INLINE Dual<Acc> gated_by_sigmoid(Acc x, Acc v, Acc dv) {
  const Dual<Acc> s = sigmoid(v);
  return {x * s.value, s.value + x * dv * s.slope};
}

template <Activation kind, class Acc>
TF_INLINE Dual<Acc> activation(Acc x) {
  switch (kind) {
    case Activation::gelu: return gelu(x);
    case Activation::gelu_tanh: {
      const Acc scale = Acc(1.5957691216057308);  // 2 sqrt(2/pi)
      const Acc square = x * x;
      return gated_by_sigmoid(x, scale * x * (1 + Acc(0.044715) * square),
                              scale * (1 + Acc(0.134145) * square));
    }
    case Activation::quick_gelu: return gated_by_sigmoid(x, Acc(1.702) * x, Acc(1.702));
    case Activation::silu: return gated_by_sigmoid(x, x, Acc(1));
    case Activation::sigmoid: break;
  }
  return sigmoid(x);
}

}  // namespace tangentfast
