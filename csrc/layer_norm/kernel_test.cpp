// The norm kernel against the formulas written out in double, for every type and mix of tangents.
#include "layer_norm/kernel.h"

#include <cmath>
#include <cstdio>
#include <vector>

#include "isa.h"
#include "testing.h"
#include "testing_array.h"

using namespace tangentfast;
using namespace tangentfast::layer_norm;

// Weights and statistics: float or double, whatever the storage type.
Type accumulator(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

Array unset(Type type, size_t size) { return Array(type, std::vector<double>(size, NAN)); }

double rounding(Type type) {
  switch (type) {
    case Type::f64: return std::ldexp(1, -53);
    case Type::f32: return std::ldexp(1, -24);
    case Type::f16: return std::ldexp(1, -11);
    case Type::bf16: break;
  }
  return std::ldexp(1, -8);
}

struct Row {
  std::vector<double> x_hat;
  double mean, rstd;
};

Row normalised(const Array& x, size_t offset, size_t n, bool centered, double eps) {
  const double shift = centered ? x[offset] : 0;  // small numbers are summed, whatever the mean
  long double mean = 0, square = 0;
  for (size_t i = 0; i < n; ++i) mean += centered ? x[offset + i] - shift : 0;
  mean /= n;
  const auto deviation = [&](size_t i) { return x[offset + i] - shift - mean; };
  for (size_t i = 0; i < n; ++i) square += deviation(i) * deviation(i);
  const long double rstd = 1 / std::sqrt(square / n + eps);
  Row row{{}, double(shift + mean), double(rstd)};
  for (size_t i = 0; i < n; ++i) row.x_hat.push_back(double(deviation(i) * rstd));
  return row;
}

// |got - want| in units of `type`'s rounding, beside the size of the numbers that went in.
void check_close(double got, double want, double size, Type type, const char* name, size_t n) {
  const double unit = rounding(type) + 64 * rounding(accumulator(type));
  CHECK(std::fabs(got - want) <= 4 * unit * (std::fabs(want) + size + 1),
        "%s, type %d, size %zu: %a, expected %a", name, int(type), n, got, want);
}

void check_norm(Type type, size_t rows, size_t n, bool centered, double offset) {
  const Type acc = accumulator(type);
  const double eps = 1e-5;
  Array x = random_array(type, rows * n);
  if (offset != 0) {
    std::vector<double> moved;
    for (size_t i = 0; i < rows * n; ++i) moved.push_back(x[i] + offset);
    x = Array(type, moved);
  }
  Array w = random_array(acc, n), b = random_array(acc, n);
  Array y = unset(type, rows * n), mean = unset(acc, rows), rstd = unset(acc, rows);

  // Every mix of tangents at once: bit 0 dx, 1 dw, 2 db.
  constexpr int mixes = 8;
  std::vector<Array> dx, dw, db, dy;
  std::vector<Tangent> tangents;
  for (int mix = 0; mix < mixes; ++mix) {
    dx.push_back(random_array(type, rows * n));
    dw.push_back(random_array(acc, n));
    db.push_back(random_array(acc, n));
    dy.push_back(unset(type, rows * n));
    tangents.push_back({mix & 1 ? dx[mix].data() : nullptr, mix & 2 ? dw[mix].data() : nullptr,
                        mix & 4 ? db[mix].data() : nullptr, dy[mix].data()});
  }
  Item item{};
  item.type = type;
  item.centered = centered;
  item.size = n;
  item.eps = eps;
  item.x = x.data();
  item.weight = w.data();
  item.bias = b.data();
  item.y = y.data();
  item.mean = centered ? mean.data() : nullptr;
  item.rstd = rstd.data();
  item.tangents = tangents.data();
  item.count = tangents.size();
  std::vector<double> scratch(2 * n, NAN);
  norm_jvp_kernel(item, 0, rows, scratch.data());

  for (size_t row = 0; row < rows; ++row) {
    const size_t at = row * n;
    const Row want = normalised(x, at, n, centered, eps);
    // The mean is as fine as its type: where it is large, its rounding alone is what is seen.
    if (centered) check_close(mean[row], want.mean, 0, acc, "mean", n);
    check_close(rstd[row] / want.rstd, 1, 0, acc, "rstd", n);
    for (size_t i = 0; i < n; ++i) {
      const double size = std::fabs(want.x_hat[i] * w[i]);
      check_close(y[at + i], want.x_hat[i] * w[i] + b[i], size, type, "y", n);
    }
    for (int mix = 0; mix < mixes; ++mix) {
      double mean_dx = 0, along = 0, norm = 0;
      std::vector<double> d(n, 0.0);
      for (size_t i = 0; i < n; ++i) {
        if (mix & 1) d[i] = dx[mix][at + i];
        mean_dx += centered ? d[i] / n : 0;
        along += d[i] * want.x_hat[i] / n;
        norm += d[i] * d[i] / n;
      }
      for (size_t i = 0; i < n; ++i) {
        double dy_want = (d[i] - mean_dx - want.x_hat[i] * along) * want.rstd * w[i];
        double size = (std::fabs(d[i]) + (1 + std::fabs(want.x_hat[i])) * std::sqrt(norm)) *
                      want.rstd * std::fabs(w[i]);
        if (mix & 2) dy_want += want.x_hat[i] * dw[mix][i];
        if (mix & 2) size += std::fabs(want.x_hat[i] * dw[mix][i]);
        if (mix & 4) dy_want += db[mix][i], size += std::fabs(db[mix][i]);
        check_close(dy[mix][at + i], dy_want, size, type, "dy", n);
      }
    }
  }
}

int main() {
  std::printf("isa: %s\n", isa_name());
  for (const Type type : kTypes) {
    for (const size_t n : {1, 2, 7, 31, 32, 63, 65, 768, 1000}) {
      for (const bool centered : {true, false}) {
        check_norm(type, 3, n, centered, 0);
      }
    }
  }
  check_norm(Type::f32, 3, 768, true, 1e4);
  check_norm(Type::f64, 3, 768, true, 1e8);
  return FAILED();
}
