// The attention kernel against loops written out in double: every type, ragged sizes, masks.
#include "attention/kernel.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "testing.h"

using namespace tangentfast;
using namespace tangentfast::attention;

struct Size {
  int64_t heads, group, queries, keys, depth, value_depth;
  bool causal, masked;
};

template <class T>
struct Array {
  std::vector<T> stored;
  std::vector<double> exact;  // the numbers as stored

  Array(int64_t n, std::mt19937& random) : stored(n), exact(n) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i) {
      store(normal(random), stored[i]);
      exact[i] = load<double>(stored[i]);
    }
  }

  Operand operand(int64_t rows, int64_t columns) {
    return {stored.data(), 0, rows * columns, columns};
  }
};

// Rows of one head by the formulas; hidden[j] says which keys row i does not see.
struct Truth {
  std::vector<double> o, d;
  double lse;
};

template <class T>
Truth row(const Size& n, int64_t h, int64_t i, const Array<T>& q, const Array<T>& k,
          const Array<T>& v, const Array<T>& dq, const Array<T>& dk, const Array<T>& dv,
          const std::vector<double>& mask, double scale) {
  const double hidden = -std::numeric_limits<double>::infinity();
  std::vector<double> s(n.keys), ds(n.keys);
  double top = hidden;
  const int64_t g = h / n.group;
  for (int64_t j = 0; j < n.keys; ++j) {
    for (int64_t p = 0; p < n.depth; ++p) {
      const int64_t a = (h * n.queries + i) * n.depth + p, b = (g * n.keys + j) * n.depth + p;
      s[j] += scale * q.exact[a] * k.exact[b];
      ds[j] += scale * (dq.exact[a] * k.exact[b] + q.exact[a] * dk.exact[b]);
    }
    if (n.masked) s[j] += mask[i * n.keys + j];
    if (n.causal && j > i) s[j] = hidden;
    top = std::max(top, s[j]);
  }
  Truth out{std::vector<double>(n.value_depth), std::vector<double>(n.value_depth), -hidden};
  if (top == hidden) return out;
  double sum = 0, mean = 0;
  for (double& x : s) sum += x = std::exp(x - top);
  for (int64_t j = 0; j < n.keys; ++j) mean += (s[j] /= sum) * ds[j];
  for (int64_t j = 0; j < n.keys; ++j) {
    for (int64_t p = 0; p < n.value_depth; ++p) {
      const int64_t b = (g * n.keys + j) * n.value_depth + p;
      out.o[p] += s[j] * v.exact[b];
      out.d[p] += s[j] * (ds[j] - mean) * v.exact[b] + s[j] * dv.exact[b];
    }
  }
  out.lse = top + std::log(sum);
  return out;
}

template <class T>
double dot(const std::vector<T>& a, const std::vector<double>& b, double& size) {
  double sum = 0;
  for (size_t i = 0; i < b.size(); ++i) sum += load<double>(a[i]) * b[i];
  for (size_t i = 0; i < b.size(); ++i) size += std::pow(load<double>(a[i]) * b[i], 2);
  return sum;
}

// <J v, u> = <v, Jt u>: the backward kernel is the adjoint of the tangent, which was tested above.
template <class T>
void test_adjoint(const Attention& forward, const Size& n, double tolerance,
                  const std::vector<Array<T>*>& tangents, const Array<T>& image,
                  std::mt19937& random) {
  const int64_t shared = n.heads / n.group;
  Array<T> u(n.heads * n.queries * n.value_depth, random);
  Array<T> dq(*tangents[0]), dk(*tangents[1]), dv(*tangents[2]);
  AttentionBackward call;
  static_cast<AttentionOperands&>(call) = forward;
  call.o = forward.o;
  call.lse = forward.lse;
  call.grad = u.operand(n.queries, n.value_depth);
  call.dq = dq.operand(n.queries, n.depth);
  call.dk = dk.operand(n.keys, n.depth);
  call.dv = dv.operand(n.keys, n.value_depth);
  const size_t bytes = (attention_backward_scratch(call) + 63) / 64 * 64;
  void* const scratch = std::aligned_alloc(64, bytes);
  for (int64_t g = 0; g < shared; ++g) attention_backward_kernel(call, 0, g, scratch);
  std::free(scratch);
  double size = 0;
  const double left = dot(image.stored, u.exact, size);
  const double right = dot(dq.stored, tangents[0]->exact, size) +
                       dot(dk.stored, tangents[1]->exact, size) +
                       dot(dv.stored, tangents[2]->exact, size);
  // Rounding errors of the terms are independent: they add up as their squares do.
  CHECK(std::abs(left - right) <= 4 * tolerance * std::sqrt(size), "adjoint: %g and %g", left,
        right);
}

template <class T, class A>
void test(Type type, const Size& n, double tolerance) {
  std::mt19937 random(0);
  const int64_t shared = n.heads / n.group;
  Array<T> q(n.heads * n.queries * n.depth, random), dq(n.heads * n.queries * n.depth, random);
  Array<T> k(shared * n.keys * n.depth, random), dk(shared * n.keys * n.depth, random);
  Array<T> v(shared * n.keys * n.value_depth, random), dv(shared * n.keys * n.value_depth, random);
  Array<T> o(n.heads * n.queries * n.value_depth, random), d(o), parts(o);
  std::vector<A> lse(n.heads * n.queries), mask(n.queries * n.keys);
  std::vector<double> exact_mask(mask.size());
  for (size_t i = 0; i < mask.size(); ++i) {
    mask[i] = i % 3 == 0 ? -std::numeric_limits<A>::infinity() : A(0.25) * A(i % 5);
    if (n.masked && static_cast<int64_t>(i) / n.keys == 1) {
      mask[i] = -std::numeric_limits<A>::infinity();  // row 1 sees nothing
    }
    exact_mask[i] = mask[i];
  }
  AttentionTangent tangent;
  tangent.dq = dq.operand(n.queries, n.depth);
  tangent.dk = dk.operand(n.keys, n.depth);
  tangent.dv = dv.operand(n.keys, n.value_depth);
  tangent.out = d.operand(n.queries, n.value_depth);
  Attention call;
  call.type = type;
  call.heads = n.heads;
  call.group = n.group;
  call.queries = n.queries;
  call.keys = n.keys;
  call.depth = n.depth;
  call.value_depth = n.value_depth;
  call.scale = 0.3;
  call.causal = n.causal;
  call.q = q.operand(n.queries, n.depth);
  call.k = k.operand(n.keys, n.depth);
  call.v = v.operand(n.keys, n.value_depth);
  if (n.masked) {
    call.mask = {mask.data(), 0, 0, n.keys};
    call.mask_column = 1;
  }
  call.o = o.operand(n.queries, n.value_depth);
  call.lse = {lse.data(), 0, n.queries, 1};
  call.tangents = &tangent;
  call.count = 1;
  const size_t bytes = (attention_jvp_scratch(call) + 63) / 64 * 64;
  void* const scratch = std::aligned_alloc(64, bytes);
  for (int64_t h = 0; h < n.heads; ++h) attention_jvp_kernel(call, 0, h, 0, n.queries, scratch);

  double error = 0, size = 0;
  for (int64_t h = 0; h < n.heads; ++h) {
    for (int64_t i = 0; i < n.queries; ++i) {
      const Truth want = row(n, h, i, q, k, v, dq, dk, dv, exact_mask, 0.3);
      const A got = lse[h * n.queries + i];
      CHECK(std::isinf(want.lse) ? std::isinf(got) && got > 0
                                 : std::abs(got - want.lse) <= tolerance * 10,
            "lse of row %d: %g, expected %g", int(i), double(got), want.lse);
      for (int64_t p = 0; p < n.value_depth; ++p) {
        const int64_t at = (h * n.queries + i) * n.value_depth + p;
        error = std::max({error, std::abs(load<double>(o.stored[at]) - want.o[p]),
                          std::abs(load<double>(d.stored[at]) - want.d[p])});
        size = std::max({size, std::abs(want.o[p]), std::abs(want.d[p])});
      }
    }
  }
  CHECK(error <= tolerance * size, "type %d, %d queries, %d keys: error %g of %g", int(type),
        int(n.queries), int(n.keys), error, size);

  // However the rows are split, a row has the same bits.
  const std::vector<T> whole = d.stored;
  tangent.out = parts.operand(n.queries, n.value_depth);
  for (int64_t h = 0; h < n.heads; ++h) {
    for (int64_t i = 0; i < n.queries; i += 7) {
      attention_jvp_kernel(call, 0, h, i, std::min(i + 7, n.queries), scratch);
    }
  }
  for (size_t i = 0; i < whole.size(); ++i) {
    CHECK(load<double>(whole[i]) == load<double>(parts.stored[i]), "split rows differ at %d",
          int(i));
  }
  std::free(scratch);
  test_adjoint(call, n, tolerance, {&dq, &dk, &dv}, d, random);
}

int main() {
  const Size sizes[] = {
      {1, 1, 1, 1, 1, 1, false, false},     {2, 1, 50, 50, 64, 64, false, false},
      {4, 2, 131, 37, 17, 9, false, true},  {1, 1, 97, 97, 80, 80, true, false},
      {2, 1, 13, 2000, 8, 33, false, true}, {2, 2, 40, 23, 5, 31, true, true},
  };
  for (const Size& n : sizes) {
    test<double, double>(Type::f64, n, 1e-13);
    test<float, float>(Type::f32, n, 3e-6);
    test<Half, float>(Type::f16, n, 1e-3);
    test<BFloat16, float>(Type::bf16, n, 8e-3);
  }
  return FAILED();
}
