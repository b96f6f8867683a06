// The activation kernel against the formulas written out in long double, for every type and kind,
// and its elementary functions at the ends of their ranges.
#include "activation/kernel.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "activation/packs.h"
#include "isa.h"
#include "testing.h"
#include "testing_array.h"

using namespace tangentfast;
using namespace tangentfast::activation;

constexpr Activation kKinds[] = {Activation::gelu, Activation::gelu_tanh, Activation::silu};
const long double kPi = std::acos(-1.0L);

Dual<long double> exact(Activation kind, long double x) {
  if (kind == Activation::gelu) {
    const long double below = std::erfc(-x / std::sqrt(2.0L)) / 2;
    return {x * below, below + x * std::exp(-x * x / 2) / std::sqrt(2 * kPi)};
  }
  long double v = x, dv = 1;
  if (kind == Activation::gelu_tanh) {
    const long double scale = 2 * std::sqrt(2 / kPi);
    v = scale * (x + 0.044715L * x * x * x);
    dv = scale * (1 + 3 * 0.044715L * x * x);
  }
  const long double s = 1 / (1 + std::exp(-v)), ds = s / (1 + std::exp(v));
  return {x * s, s + x * dv * ds};
}

double rounding(Type type) {
  switch (type) {
    case Type::f64: return std::ldexp(1, -53);
    case Type::f32: return std::ldexp(1, -24);
    case Type::f16: return std::ldexp(1, -11);
    case Type::bf16: break;
  }
  return std::ldexp(1, -8);
}

// Within a few roundings of the numbers that go in, and half a step of the smallest half.
void check_close(double got, long double want, long double size, Type type, int kind) {
  const double unit = rounding(type) + 16 * rounding(type == Type::f64 ? Type::f64 : Type::f32);
  CHECK(std::fabs(got - want) <= unit * (std::fabs(want) + size) + (type == Type::f16 ? 3e-8 : 0),
        "kind %d, type %d: %a, expected %a", kind, int(type), got, double(want));
}

void check_activation(Type type, Activation kind, size_t rows, size_t columns, size_t begin,
                      size_t end) {
  const size_t size = rows * columns, step = columns + 3;  // rows lie apart
  const auto unset = [&] { return Array(type, std::vector<double>(size, -77)); };
  const auto apart = [&](Array& array) { return Rows{array.data(), static_cast<int64_t>(step)}; };
  Array x = random_array(type, rows * step), y = unset();
  std::vector<Array> dx, dy;
  std::vector<Tangent> tangents;
  for (int k = 0; k < 3; ++k) {
    dx.push_back(random_array(type, rows * step));
    dy.push_back(unset());
    tangents.push_back({apart(dx[k]), dy[k].data()});
  }
  activation_jvp_kernel({type, kind, static_cast<int64_t>(columns), apart(x), y.data(),
                         tangents.data(), 3},
                        begin, end);
  for (size_t i = 0; i < size; ++i) {
    const size_t at = i / columns * step + i % columns;
    if (i < begin || i >= end) {
      CHECK(y[i] == -77 && dy[0][i] == -77, "written outside [%zu, %zu) at %zu", begin, end, i);
      continue;
    }
    const Dual<long double> f = exact(kind, x[at]);
    check_close(y[i], f.value, std::fabs(x[at]), type, int(kind));
    for (int k = 0; k < 3; ++k) {
      check_close(dy[k][i], f.slope * dx[k][at], (1 + std::fabs(x[at])) * std::fabs(dx[k][at]),
                  type, int(kind));
    }
  }
}

// Each value and slope by itself over a range, in roundings of the larger of it and `floor`.
template <Activation kind, class Acc, bool narrow = false>
void check_accuracy(double range, double floor, double units) {
  const double unit = std::numeric_limits<Acc>::epsilon() / 2;
  std::uniform_real_distribution<double> uniform(-range, range);
  for (int n = 0; n < 20000; ++n) {
    const Acc x = static_cast<Acc>(uniform(generator));
    const Dual<Acc> got = value_and_slope<kind, narrow>(x);
    const Dual<long double> want = exact(kind, x);
    for (const auto& [a, b] : {std::pair(got.value, want.value), std::pair(got.slope, want.slope)}) {
      const long double size = std::max<long double>(std::fabs(b), floor);
      CHECK(std::fabs(a - b) <= units * unit * size, "kind %d, %zu bytes, at %a: %a, expected %a",
            int(kind), sizeof(Acc), double(x), double(a), double(b));
    }
  }
}

template <Activation kind, class Acc, bool narrow = false>
void check_ends() {
  const auto f = [](Acc x) { return value_and_slope<kind, narrow>(x); };
  const Acc infinity = std::numeric_limits<Acc>::infinity();
  CHECK(std::isnan(f(Acc(NAN)).value), "kind %d: NaN", int(kind));
  for (const Acc x : {Acc(300), Acc(1000), Acc(1e6)}) {
    const Dual<Acc> up = f(x), down = f(-x);
    CHECK(up.value == x, "kind %d: above", int(kind));
    CHECK(std::fabs(up.slope - 1) < 1e-30, "kind %d: slope above", int(kind));
    CHECK(std::fabs(down.value) < 1e-30 && std::fabs(down.slope) < 1e-30, "kind %d: below",
          int(kind));
  }
  CHECK(f(infinity).value == infinity, "kind %d: infinity", int(kind));
}

// A tenth of a rounding of half, in those of float.
constexpr double kNarrow = 0.1 * (1 << 13);

template <Activation kind>
void check_kind() {
  // x s(v): v is rounded, so that far out the value is as good as v, not better.
  for (const double range : {0.5, 3.0, 12.0}) {
    check_accuracy<kind, float>(range, 1, 8);
    check_accuracy<kind, double>(range, 1, 8);
    check_accuracy<kind, float, true>(range, 1, kNarrow);
  }
  check_ends<kind, float>();
  check_ends<kind, double>();
  check_ends<kind, float, true>();
}

// How far the GPU may read 16 bytes at a time, by addresses, steps and sizes.
void check_packs() {
  const auto rows = [](uintptr_t at, int64_t stride) {
    return Rows{reinterpret_cast<const void*>(at), stride};
  };
  Item item{};
  item.type = Type::bf16;
  item.y = reinterpret_cast<void*>(uintptr_t{64});
  const auto packs = [&](int64_t columns, int64_t numel, Rows x, int64_t want) {
    item.columns = columns;
    item.x = x;
    const int64_t got = whole_packs(item, numel);
    CHECK(got == want, "%d of %d elements in packs, expected %d", int(got), int(numel), int(want));
  };
  packs(24, 72, rows(32, 24), 72);
  packs(24, 72, rows(32, 32), 72);
  packs(24, 72, rows(34, 24), 0);   // x is not aligned
  packs(24, 72, rows(32, 25), 0);   // the second row is not
  packs(25, 75, rows(32, 32), 0);   // a pack would reach over the end of a row
  packs(75, 75, rows(32, 75), 72);  // one row: all but the tail
  Tangent tangent{rows(32, 75), reinterpret_cast<void*>(uintptr_t{66})};
  item.tangents = &tangent;
  item.count = 1;
  packs(75, 75, rows(32, 75), 0);  // dy is not aligned
}

template <bool narrow>
void check_tail(double units) {
  CHECK(gelu<narrow>(-3e38f).value == 0, "tail at -3e38: %a", gelu<narrow>(-3e38f).value);
  for (float x = -13; x < -1; x += 0.01f) {
    const long double want = exact(Activation::gelu, x).value;
    const float got = gelu<narrow>(x).value;
    CHECK(std::fabs(got - want) <= (units + x * x) * std::ldexp(1, -24) * std::fabs(want),
          "tail at %a: %a, expected %a", x, got, double(want));
  }
}

int main() {
  check_packs();
  std::printf("isa: %s\n", isa_name());
  check_kind<Activation::gelu>();
  check_kind<Activation::gelu_tanh>();
  check_kind<Activation::silu>();
  // The tail of gelu has its relative accuracy, where 1 + erf would have none: half a rounding of x
  // moves it by x^2 roundings.
  check_tail<false>(10);
  check_tail<true>(kNarrow);
  for (const Type type : kTypes) {
    for (const Activation kind : kKinds) {
      for (const size_t columns : {1, 7, 63, 511, 1300}) {
        check_activation(type, kind, 3, columns, 0, 3 * columns);
      }
      check_activation(type, kind, 3, 700, 650, 1500);
    }
  }
  return FAILED();
}
