// Storage types and their conversions, on host and device: what every op's formula.h builds on.
// Halves are converted by branch-free integer arithmetic, which compilers vectorise on any ISA and
// which gives the same bits everywhere; rounding is to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TF_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TF_INLINE inline __attribute__((always_inline))
#else
#define TF_INLINE inline
#endif

namespace tangentfast {

enum class Type : int32_t { f64, f32, f16, bf16 };

inline int size_of(Type type) {
  return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
}

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
TF_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

TF_INLINE float to_float(float value) { return value; }

TF_INLINE float to_float(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

TF_INLINE float to_float(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // Rebias the exponent from 15 to 127; infinity and NaN need the full float exponent.
  const uint32_t rebias = magnitude >= (0x7c00u << 13) ? (128u - 16u) << 23 : 0u;
  const uint32_t normal = magnitude + ((127u - 15u) << 23) + rebias;
  // A subnormal half is a fixed-point number: place it under 2^-14 and subtract 2^-14, exactly.
  const float fixed = bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t subnormal = bit_cast<uint32_t>(fixed);
  return bit_cast<float>((magnitude < (1u << 23) ? subnormal : normal) | sign);
}

TF_INLINE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}

TF_INLINE Half to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal =
      (magnitude - ((127u - 15u) << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns a float below 2^-14 with the grid of subnormal halves: the adder rounds.
  const float aligned = bit_cast<float>(magnitude) + 0.5f;
  const uint32_t subnormal = bit_cast<uint32_t>(aligned) - bit_cast<uint32_t>(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  return {static_cast<uint16_t>((magnitude >= (143u << 23) ? special : finite) | sign)};
}

// double -> float, rounded to odd. A second rounding, to a half, then equals a single one: float
// keeps more than two bits beyond either half format (Boldo and Melquiond 2008).
TF_INLINE float to_float_odd(double value) {
  const float nearest = static_cast<float>(value);
  const uint32_t bits = bit_cast<uint32_t>(nearest);
  const double back = static_cast<double>(nearest);
  const double size = value < 0 ? -value : value;
  const double back_size = back < 0 ? -back : back;
  // Inexact and even: the other neighbour of `value`, one step in magnitude, is the odd one.
  const uint32_t up = (back_size < size) & ~bits & 1u;
  const uint32_t down = (back_size > size) & ~bits & 1u;
  return bit_cast<float>(bits + up - down);
}

// load<Acc>(stored) widens exactly; store(acc, stored) rounds once.
template <class Acc>
TF_INLINE Acc load(double value) { return static_cast<Acc>(value); }
template <class Acc>
TF_INLINE Acc load(float value) { return static_cast<Acc>(value); }
template <class Acc>
TF_INLINE Acc load(Half value) { return static_cast<Acc>(to_float(value)); }
template <class Acc>
TF_INLINE Acc load(BFloat16 value) { return static_cast<Acc>(to_float(value)); }

// n numbers widened into `to`; where they are wide already, as they lie.
template <class Acc>
TF_INLINE const Acc* widened(const Acc* from, int64_t, Acc*) {
  return from;
}

template <class Acc, class T>
TF_INLINE const Acc* widened(const T* from, int64_t n, Acc* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = load<Acc>(from[i]);
  return to;
}

TF_INLINE void store(double acc, double& out) { out = acc; }
TF_INLINE void store(double acc, float& out) { out = static_cast<float>(acc); }
TF_INLINE void store(double acc, Half& out) { out = to_half(to_float_odd(acc)); }
TF_INLINE void store(double acc, BFloat16& out) { out = to_bfloat16(to_float_odd(acc)); }
TF_INLINE void store(float acc, double& out) { out = acc; }
TF_INLINE void store(float acc, float& out) { out = acc; }
TF_INLINE void store(float acc, Half& out) { out = to_half(acc); }
TF_INLINE void store(float acc, BFloat16& out) { out = to_bfloat16(acc); }

}  // namespace tangentfast
