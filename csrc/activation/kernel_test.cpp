// The activation kernel against the formulas written out in long double, for every type, kind and
// mix of tangents, and its elementary functions at the ends of their ranges.
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

constexpr Activation kKinds[] = {Activation::gelu, Activation::gelu_tanh, Activation::quick_gelu,
                                 Activation::silu, Activation::sigmoid};
const long double kPi = std::acos(-1.0L);

Dual<long double> exact(Activation kind, long double x) {
  if (kind == Activation::gelu) {
    const long double below = std::erfc(-x / std::sqrt(2.0L)) / 2;
    return {x * below, below + x * std::exp(-x * x / 2) / std::sqrt(2 * kPi)};
  }
  long double v = x, dv = 1;
  if (kind == Activation::quick_gelu) v = 1.702L * x, dv = 1.702L;
  if (kind == Activation::gelu_tanh) {
    const long double scale = 2 * std::sqrt(2 / kPi);
    v = scale * (x + 0.044715L * x * x * x);
    dv = scale * (1 + 3 * 0.044715L * x * x);
  }
  const long double s = 1 / (1 + std::exp(-v)), ds = s / (1 + std::exp(v));
  if (kind == Activation::sigmoid) return {s, ds};
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

void check_activation(Type type, Activation kind, size_t rows, size_t columns, bool bias, bool gate,
                      size_t begin, size_t end) {
  const size_t size = rows * columns, step = columns + 3;  // rows lie apart
  const auto random = [&](size_t n) { return random_array(type, n); };
  Array x = random(rows * step), b = random(columns), g = random(rows * step), c = random(columns);
  std::vector<Array> dx, db, dg, dc, dy;
  std::vector<ActivationTangent> tangents;
  const auto row = [&](Array& array, bool present, size_t stride) {
    return Rows{present ? array.data() : nullptr, static_cast<int64_t>(stride)};
  };
  const int mixes = gate ? 16 : 4;  // bit 0 dx, 1 dbias, 2 dgate, 3 dgate_bias
  for (int mix = 0; mix < mixes; ++mix) {
    dx.push_back(random(rows * step));
    db.push_back(random(columns));
    dg.push_back(random(rows * step));
    dc.push_back(random(columns));
    dy.push_back(Array(type, std::vector<double>(size, -77)));
  }
  for (int mix = 0; mix < mixes; ++mix) {
    tangents.push_back({{row(dx[mix], mix & 1, step), row(db[mix], mix & 2, 0),
                         row(dg[mix], mix & 4, step), row(dc[mix], mix & 8, 0)},
                        dy[mix].data()});
  }
  Array y(type, std::vector<double>(size, -77));
  activation_jvp_kernel({type, kind, static_cast<int64_t>(columns),
                         {row(x, true, step), row(b, bias, 0), row(g, gate, step),
                          row(c, gate && bias, 0)},
                         y.data(), tangents.data(), mixes},
                        begin, end);
  for (size_t i = 0; i < size; ++i) {
    const size_t column = i % columns, at = i / columns * step + column;
    if (i < begin || i >= end) {
      CHECK(y[i] == -77 && dy[0][i] == -77, "written outside [%zu, %zu) at %zu", begin, end, i);
      continue;
    }
    const long double in = x[at] + (bias ? static_cast<long double>(b[column]) : 0);
    const long double by = gate ? g[at] + (bias ? static_cast<long double>(c[column]) : 0) : 1;
    // x + b is rounded, which moves f by f' times that.
    const Dual<long double> f = exact(kind, in);
    check_close(y[i], f.value * by, std::fabs(in * by), type, int(kind));
    for (int mix = 0; mix < mixes; ++mix) {
      const long double moved = (mix & 1 ? dx[mix][at] : 0) + (mix & 2 ? db[mix][column] : 0);
      const long double opened = (mix & 4 ? dg[mix][at] : 0) + (mix & 8 ? dc[mix][column] : 0);
      check_close(dy[mix][i], f.slope * by * moved + f.value * opened,
                  (1 + std::fabs(in)) * (std::fabs(by * moved) + std::fabs(opened)), type,
                  int(kind));
    }
  }
}

// Each value and slope by itself over a range, in roundings of the larger of it and `floor`.
template <Activation kind, class Acc>
void check_accuracy(double range, double floor, double units) {
  const double unit = std::numeric_limits<Acc>::epsilon() / 2;
  std::uniform_real_distribution<double> uniform(-range, range);
  for (int n = 0; n < 20000; ++n) {
    const Acc x = static_cast<Acc>(uniform(generator));
    const Dual<Acc> got = activation<kind>(x);
    const Dual<long double> want = exact(kind, x);
    for (const auto& [a, b] : {std::pair(got.value, want.value), std::pair(got.slope, want.slope)}) {
      const long double size = std::max<long double>(std::fabs(b), floor);
      CHECK(std::fabs(a - b) <= units * unit * size, "kind %d, %zu bytes, at %a: %a, expected %a",
            int(kind), sizeof(Acc), double(x), double(a), double(b));
    }
  }
}

template <Activation kind, class Acc>
void check_ends() {
  const Acc infinity = std::numeric_limits<Acc>::infinity();
  CHECK(std::isnan(activation<kind>(Acc(NAN)).value), "kind %d: NaN", int(kind));
  for (const Acc x : {Acc(300), Acc(1000), Acc(1e6)}) {
    const Dual<Acc> up = activation<kind>(x), down = activation<kind>(-x);
    const bool sigmoid = kind == Activation::sigmoid;
    CHECK(up.value == (sigmoid ? 1 : x), "kind %d: above", int(kind));
    CHECK(std::fabs(up.slope - (sigmoid ? 0 : 1)) < 1e-30, "kind %d: slope above", int(kind));
    CHECK(std::fabs(down.value) < 1e-30 && std::fabs(down.slope) < 1e-30, "kind %d: below",
          int(kind));
  }
  CHECK(activation<kind>(infinity).value == (kind == Activation::sigmoid ? 1 : infinity),
        "kind %d: infinity", int(kind));
}

template <Activation kind>
void check_kind() {
  // x s(v): v is rounded, so that far out the value is as good as v, not better.
  for (const double range : {0.5, 3.0, 12.0}) {
    check_accuracy<kind, float>(range, 1, 8);
    check_accuracy<kind, double>(range, 1, 8);
  }
  check_ends<kind, float>();
  check_ends<kind, double>();
}

// How far the GPU may read 16 bytes at a time, by addresses, steps and sizes.
void check_packs() {
  const auto rows = [](uintptr_t at, int64_t stride) {
    return Rows{reinterpret_cast<const void*>(at), stride};
  };
  ActivationItem item{};
  item.type = Type::bf16;
  item.y = reinterpret_cast<void*>(uintptr_t{64});
  const auto packs = [&](int64_t columns, int64_t numel, Rows x, Rows bias, int64_t want) {
    item.columns = columns;
    item.in.x = x;
    item.in.bias = bias;
    const int64_t got = whole_packs(item, numel);
    CHECK(got == want, "%d of %d elements in packs, expected %d", int(got), int(numel), int(want));
  };
  packs(24, 72, rows(32, 24), rows(0, 0), 72);
  packs(24, 72, rows(32, 32), rows(16, 0), 72);
  packs(24, 72, rows(34, 24), rows(0, 0), 0);   // x is not aligned
  packs(24, 72, rows(32, 24), rows(18, 0), 0);  // the bias is not
  packs(24, 72, rows(32, 25), rows(0, 0), 0);   // the second row is not
  packs(25, 75, rows(32, 32), rows(0, 0), 0);   // a pack would reach over the end of a row
  packs(75, 75, rows(32, 75), rows(0, 0), 72);  // one row: all but the tail
  ActivationTangent tangent{{rows(32, 75), {}, {}, {}}, reinterpret_cast<void*>(uintptr_t{66})};
  item.tangents = &tangent;
  item.count = 1;
  packs(75, 75, rows(32, 75), rows(0, 0), 0);  // dy is not aligned
}

int main() {
  check_packs();
  std::printf("isa: %s\n", isa_name());
  check_kind<Activation::gelu>();
  check_kind<Activation::gelu_tanh>();
  check_kind<Activation::quick_gelu>();
  check_kind<Activation::silu>();
  check_kind<Activation::sigmoid>();
  // The tail of gelu has its relative accuracy, where 1 + erf would have none.
  for (float x = -13; x < -1; x += 0.01f) {
    const long double want = exact(Activation::gelu, x).value;
    CHECK(std::fabs(gelu(x).value - want) <= 20 * std::ldexp(1, -24) * std::fabs(want),
          "tail at %a: %a, expected %a", x, gelu(x).value, double(want));
  }
  for (const Type type : kTypes) {
    for (const Activation kind : kKinds) {
      for (const size_t columns : {1, 7, 63, 511, 1300}) {
        for (const bool bias : {false, true}) {
          for (const bool gate : {false, true}) {
            check_activation(type, kind, 3, columns, bias, gate, 0, 3 * columns);
          }
        }
      }
      check_activation(type, kind, 3, 700, true, true, 650, 1500);
    }
  }
  return FAILED();
}
