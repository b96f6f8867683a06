// Activations f and their derivatives f' of one number, in float or double:
//   gelu        x P(x)                  with P, p the normal distribution and its density
//   gelu_tanh   x s(2 sqrt(2/pi) (x + 0.044715 x^3))    since (1 + tanh u) / 2 = s(2u)
//   silu        x s(x)                  with s(v) = 1 / (1 + e^-v)
// Branch-free, of additions, multiplications and one division, so that compilers vectorise them on
// any instruction set and all give the same bits. `narrow` is for numbers that are stored in 16
// bits: shorter approximations, whose errors are less than a tenth of a rounding of half.
// Coefficients: minimax by Lawson's algorithm, in double at Chebyshev nodes; errors are relative.
#pragma once

#include "../scalar.h"

namespace tangentfast::activation {

enum class Activation : int32_t { gelu, gelu_tanh, silu };

template <class Acc>
TF_INLINE Acc in_pairs(Acc, Acc, Acc c) {
  return c;
}
template <class Acc>
TF_INLINE Acc in_pairs(Acc x, Acc, Acc c, Acc d) {
  return c + x * d;
}
template <class Acc, class... Rest>
TF_INLINE Acc in_pairs(Acc x, Acc square, Acc c, Acc d, Rest... rest) {
  return (c + x * d) + square * in_pairs(x, square, rest...);
}

// c + c1 x + c2 x^2 + ..., by Horner's rule in x^2: half as many operations wait for each other.
template <class Acc, class... Rest>
TF_INLINE Acc polynomial(Acc x, Rest... c) {
  return in_pairs(x, x * x, c...);
}

TF_INLINE float magnitude(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu); }
TF_INLINE double magnitude(double x) {
  return bit_cast<double>(bit_cast<uint64_t>(x) & 0x7fffffffffffffffull);
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

// For x without a sign: bits are in the order of the numbers, and a NaN becomes the limit.
TF_INLINE float at_most(float x, float limit) {
  const int32_t a = bit_cast<int32_t>(x), b = bit_cast<int32_t>(limit);
  return bit_cast<float>(a < b ? a : b);
}
TF_INLINE double at_most(double x, double limit) {
  const int64_t a = bit_cast<int64_t>(x), b = bit_cast<int64_t>(limit);
  return bit_cast<double>(a < b ? a : b);
}

// 2^u for -190 <= u <= 0. n = round(u) by the adder: 1.5 * 2^23 leaves no fraction, and n + 191 in
// the low bits; moved into the exponent they are 2^(n + 64), and 2^-64 brings what is below the
// normal numbers there, rounded like any other. Error 2.0e-9, narrow 2.9e-6.
template <bool narrow>
TF_INLINE float exp2_below(float u) {
  const float kRound = 12582912.0f + 191;
  const float shifted = u + kRound;
  const float f = u - (shifted - kRound);
  const float q = narrow ? polynomial(f, 0.693124175f, 0.240240991f, 0.0559064262f, 0.00958285294f)
                         : polynomial(f, 0.693147182f, 0.240226477f, 0.0555033237f, 0.00961843692f,
                                      0.00133988739f, 0.00015353362f);
  return (1 + f * q) * bit_cast<float>(bit_cast<uint32_t>(shifted) << 23) * 5.42101086e-20f;
}

// The same in double, for -1500 <= u <= 0: 1.5 * 2^52, n + 1535 and 2^-512. Error 8.5e-18.
template <bool narrow>
TF_INLINE double exp2_below(double u) {
  const double kRound = 6755399441055744.0 + 1535;
  const double shifted = u + kRound;
  const double f = u - (shifted - kRound);
  const double q =
      polynomial(f, 0.6931471805599453, 0.24022650695910097, 0.0555041086648216,
                 0.009618129107606888, 0.0013333558146416936, 0.0001540353044173605,
                 1.525273382983612e-05, 1.321544258792169e-06, 1.0178062445845774e-07,
                 7.072585949269223e-09, 4.4549605981865186e-10);
  return (1 + f * q) * bit_cast<double>(bit_cast<uint64_t>(shifted) << 52) * 7.458340731200207e-155;
}

// Where e^-x and e^(-x^2/2) are 0 in this type.
template <class Acc>
TF_INLINE Acc exp_limit() { return sizeof(Acc) == 4 ? Acc(110) : Acc(760); }
template <class Acc>
TF_INLINE Acc normal_limit() { return sizeof(Acc) == 4 ? Acc(14.75) : Acc(39); }

// The tail of the normal distribution, divided by e^(-a^2/2), for 0 <= a <= normal_limit(): Mills'
// ratio / sqrt(2 pi). Error 6.1e-9, narrow 2.6e-5; in double 9.0e-17.
template <bool narrow>
TF_INLINE float tail_ratio(float a) {
  if (narrow) {
    return polynomial(a, 0.500012696f, 0.27934444f, 0.0629800111f) /
           polynomial(a, 1.0f, 1.35735595f, 0.705112457f, 0.157701805f);
  }
  return polynomial(a, 0.5f, 0.43879658f, 0.183607385f, 0.0407588854f, 0.00413500797f) /
         polynomial(a, 1.0f, 1.6754781f, 1.20404792f, 0.470453471f, 0.102173649f, 0.0103648128f);
}

template <bool narrow>
TF_INLINE double tail_ratio(double a) {
  return polynomial(a, 0.5, 0.7758577209030002, 0.5954446719693803, 0.2903132931433541,
                    0.0981308959658345, 0.023751350888201746, 0.004115983017212425,
                    0.0004941506706428816, 3.757916535870989e-05, 1.3993048118643565e-06) /
         polynomial(a, 1.0, 2.349600002608859, 2.5655989100829704, 1.718839864814702,
                    0.7848013162542371, 0.2561065130662715, 0.06076744505109421,
                    0.010411436397331716, 0.0012421595801411335, 9.419699842335464e-05,
                    3.5075370062550256e-06);
}

template <class Acc>
struct Dual {
  Acc value, slope;
};

// The rounding of x^2 moves the tail by what half a rounding of x itself would.
template <bool narrow, class Acc>
TF_INLINE Dual<Acc> gelu(Acc x) {
  const Acc a = at_most(magnitude(x), normal_limit<Acc>());
  const Acc e = exp2_below<narrow>(a * a * Acc(-0.72134752044448170));  // log2(e) / 2
  const Acc tail = e * tail_ratio<narrow>(a);
  const Acc below = where_negative(x, tail, 1 - tail);
  return {x * below, below + x * (e * Acc(0.39894228040143268))};
}

// x s(v(x)), v' = dv, with s'(v) = s(v) (1 - s(v)) without its cancellation.
template <bool narrow, class Acc>
TF_INLINE Dual<Acc> gated_by_sigmoid(Acc x, Acc v, Acc dv) {
  const Acc size = at_most(magnitude(v), exp_limit<Acc>());
  const Acc e = exp2_below<narrow>(size * Acc(-1.4426950408889634));
  const Acc s = 1 / (1 + e);
  const Acc value = where_negative(v, e * s, s);
  return {x * value, value + x * dv * (e * s * s)};
}

template <Activation kind, bool narrow, class Acc>
TF_INLINE Dual<Acc> value_and_slope(Acc x) {
  switch (kind) {
    case Activation::gelu: return gelu<narrow>(x);
    case Activation::gelu_tanh: {
      const Acc scale = Acc(1.5957691216057308);  // 2 sqrt(2/pi)
      const Acc square = x * x;
      return gated_by_sigmoid<narrow>(x, scale * x * (1 + Acc(0.044715) * square),
                                      scale * (1 + Acc(0.134145) * square));
    }
    case Activation::silu: break;
  }
  return gated_by_sigmoid<narrow>(x, x, Acc(1));
}

}  // namespace tangentfast::activation
