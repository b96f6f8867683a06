// scalar.h against arithmetic written another way: every half, and roundings decided in double.
#include "scalar.h"

#include <cmath>
#include <limits>
#include <random>

#include "testing.h"

using namespace tangentfast;

// A format of `digits` significant bits, least exponent `least` (of 1.m) and largest value `most`.
struct Format {
  int digits, least;
  double most;
};
constexpr Format kHalf{11, -14, 65504.0};
constexpr Format kBFloat16{8, -126, 3.3895313892515355e38};

// The nearest value of the format, ties to even: scale so that its grid is the integers.
double nearest(double x, const Format& format) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), format.least) - (format.digits - 1);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
  return std::fabs(rounded) > format.most ? std::copysign(INFINITY, x) : rounded;
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class Stored>
void check_store(double x, const Format& format, const char* name) {
  Stored narrow, wide;
  const float single = static_cast<float>(x);
  store(single, narrow);
  CHECK(same(to_float(narrow), nearest(single, format)), "%s: float %a gives %a", name, single,
        to_float(narrow));
  store(x, wide);
  CHECK(same(to_float(wide), nearest(x, format)), "%s: double %a gives %a", name, x,
        to_float(wide));
}

template <class Stored>
void check_every_value(const Format& format, const char* name) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Stored stored{static_cast<uint16_t>(bits)};
    const float value = to_float(stored);
    Stored back;
    store(value, back);
    CHECK(std::isnan(value) ? std::isnan(to_float(back)) : back.bits == bits, "%s: %04x gives %04x",
          name, bits, back.bits);
    if (!std::isfinite(value)) continue;
    // Midway to the next value, where the tie is, and a hair to either side of it.
    const double next = to_float(Stored{static_cast<uint16_t>(bits + 1)});
    const double middle = std::isfinite(next) ? (value + next) / 2 : value * 1.0005;
    for (const double x : {middle, std::nextafter(middle, 0.0), std::nextafter(middle, 2 * middle),
                           middle * (1 + 1e-12), middle * (1 - 1e-12)}) {
      check_store<Stored>(x, format, name);
    }
  }
}

void check_half_values() {
  // IEEE 754 binary16 from its definition.
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const int exponent = bits >> 10, fraction = bits & 1023;
    const double value = exponent ? std::ldexp(1024 + fraction, exponent - 25)
                                  : std::ldexp(fraction, -24);
    CHECK(to_float(Half{static_cast<uint16_t>(bits)}) == value, "half %04x", bits);
    CHECK(to_float(Half{static_cast<uint16_t>(bits | 0x8000)}) == -value, "half -%04x", bits);
  }
  CHECK(std::isinf(to_float(Half{0x7c00})) && std::isnan(to_float(Half{0x7e00})), "half specials");
}

int main() {
  check_half_values();
  check_every_value<Half>(kHalf, "half");
  check_every_value<BFloat16>(kBFloat16, "bfloat16");
  std::mt19937_64 random(0);
  for (int n = 0; n < 1000000; ++n) {
    double x;
    const uint64_t bits = random();
    memcpy(&x, &bits, sizeof x);
    check_store<Half>(x, kHalf, "half");
    check_store<BFloat16>(x, kBFloat16, "bfloat16");
    const double moderate = std::ldexp(static_cast<double>(static_cast<int64_t>(bits)), -72);
    check_store<Half>(moderate, kHalf, "half");
  }
  for (const double x : {0.0, -0.0, double(INFINITY), -double(INFINITY), double(NAN), 1e300,
                         -1e-300, 65519.99, 65520.0}) {
    check_store<Half>(x, kHalf, "half");
    check_store<BFloat16>(x, kBFloat16, "bfloat16");
  }
  return FAILED();
}
