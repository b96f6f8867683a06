// Attention on the CPU: checks, outputs, and one task per head (and part of its queries).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "kernel.h"

namespace tangentfast::attention {
namespace {

using Tangents = c10::List<std::optional<at::Tensor>>;

// Checks with the name of the op, and the tensors that the kernel reads, kept alive.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}

  void check(const std::string& name, const at::Tensor& tensor, at::IntArrayRef shape,
             at::ScalarType dtype) const {
    check_tensor(op_, name, tensor, at::kCPU);
    TORCH_CHECK_VALUE(tensor.sizes() == shape, op_, ": ", name, " has shape ", tensor.sizes(),
                      ", expected ", shape);
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op_, ": ", name, " has dtype ",
                     tensor.scalar_type(), ", expected ", dtype);
  }

  void check_row(const char* name, const Tangents& row, size_t count, at::IntArrayRef shape,
                 at::ScalarType dtype) const {
    TORCH_CHECK_VALUE(row.size() == count, op_, ": ", name, " has ", row.size(),
                      " entries, expected one per tangent, ", count);
    for (size_t k = 0; k < count; ++k) {
      if (const auto t = row.get(k)) check(indexed(name, k), *t, shape, dtype);
    }
  }

  void check_operands(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const std::optional<at::Tensor>& mask) const {
    TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op_, ": q, k, v have ",
                      q.dim(), ", ", k.dim(), ", ", v.dim(), " dimensions, expected 4 each");
    const auto dtype = q.scalar_type();
    const int64_t batch = q.size(0), heads = k.size(1), keys = k.size(2);
    check("q", q, q.sizes(), dtype);
    check("k", k, {batch, heads, keys, q.size(3)}, dtype);
    check("v", v, {batch, heads, keys, v.size(3)}, dtype);
    TORCH_CHECK_VALUE(keys > 0 && heads > 0 && q.size(1) % heads == 0, op_, ": k has shape ",
                      k.sizes(), ", expected at least one key and a number of heads that divides ",
                      q.size(1));
    if (mask) check("mask", *mask, {batch, q.size(1), q.size(2), keys}, wide(q));
  }

  static at::ScalarType wide(const at::Tensor& q) {
    return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  }

  // With contiguous columns.
  Operand operand(const at::Tensor& tensor) {
    const bool plain = tensor.stride(3) == 1 || tensor.size(3) == 1;
    return strided(plain ? tensor : tensor.contiguous());
  }

  // A mask may be expanded in any dimension, columns included.
  Operand mask(const at::Tensor& tensor, int64_t& column) {
    const Operand x = strided(tensor);
    column = kept_.back().stride(3);
    return x;
  }

  static Operand vector(const at::Tensor& lse) {
    return {const_cast<void*>(lse.const_data_ptr()), lse.stride(0), lse.stride(1), lse.stride(2)};
  }

  void set(AttentionOperands& call, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
           const std::optional<at::Tensor>& added, bool causal, double scale) {
    call.type = type_of(q);
    call.heads = q.size(1);
    call.group = q.size(1) / k.size(1);
    call.queries = q.size(2);
    call.keys = k.size(2);
    call.depth = q.size(3);
    call.value_depth = v.size(3);
    call.scale = scale;
    call.causal = causal;
    call.q = operand(q);
    call.k = operand(k);
    call.v = operand(v);
    if (added) call.mask = mask(*added, call.mask_column);
  }

 private:
  Operand strided(const at::Tensor& tensor) {
    kept_.push_back(tensor.resolve_neg());
    const at::Tensor& x = kept_.back();
    return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
  }

  const char* op_;
  std::vector<at::Tensor> kept_;
};

// [N, rows, *inner] with batch and rows in the order of `like` [N, H, rows, ...].
at::Tensor batch_and_rows(const at::Tensor& like, std::initializer_list<int64_t> inner) {
  const bool rows_first = like.stride(0) < like.stride(2) && like.size(0) > 1;
  std::vector<int64_t> shape{like.size(rows_first ? 2 : 0), like.size(rows_first ? 0 : 2)};
  shape.insert(shape.end(), inner);
  const at::Tensor x = at::empty(shape, like.options());
  return rows_first ? x.transpose(0, 1) : x;
}

// [N, H, rows, columns] with the heads beside each other: joining them again is free, in batch-first
// and in sequence-first models.
at::Tensor heads_inside(const at::Tensor& like, int64_t columns) {
  return batch_and_rows(like, {like.size(1), columns}).transpose(1, 2);
}

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> attention_jvp_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& mask, bool causal, double scale, const Tangents& dq,
    const Tangents& dk, const Tangents& dv, const Tangents& dmask, bool primal) {
  Arguments arguments("attention_jvp");
  arguments.check_operands(q, k, v, mask);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  const auto wide = Arguments::wide(q);
  const size_t count = dq.size();
  arguments.check_row("dq", dq, count, q.sizes(), q.scalar_type());
  arguments.check_row("dk", dk, count, k.sizes(), q.scalar_type());
  arguments.check_row("dv", dv, count, v.sizes(), q.scalar_type());
  arguments.check_row("dmask", dmask, count, {batch, heads, queries, k.size(2)}, wide);

  Attention call;
  arguments.set(call, q, k, v, mask, causal, scale);
  at::Tensor o = at::empty({0}, q.options()), lse = at::empty({0}, q.options().dtype(wide));
  if (primal) {
    o = heads_inside(q, v.size(3));
    lse = at::empty({batch, queries, heads}, lse.options()).transpose(1, 2);
    call.o = arguments.operand(o);
    call.lse = Arguments::vector(lse);
  }
  std::vector<AttentionTangent> tangents;
  std::vector<at::Tensor> dos;
  for (size_t i = 0; i < count; ++i) {
    AttentionTangent t;
    if (const auto x = dq.get(i)) t.dq = arguments.operand(*x);
    if (const auto x = dk.get(i)) t.dk = arguments.operand(*x);
    if (const auto x = dv.get(i)) t.dv = arguments.operand(*x);
    if (const auto x = dmask.get(i)) t.dmask = arguments.mask(*x, t.dmask_column);
    dos.push_back(heads_inside(q, v.size(3)));
    if (t.dq.data || t.dk.data || t.dv.data || t.dmask.data) {
      t.out = arguments.operand(dos.back());
      tangents.push_back(t);
    } else {
      dos.back().zero_();
    }
  }
  call.tangents = tangents.data();
  call.count = tangents.size();
  if (batch * heads * queries == 0 || (!primal && tangents.empty())) return {o, lse, dos};

  // A task packs the keys of its head anew: split heads only when there are fewer than threads.
  const int64_t all = batch * heads, wanted = 4 * at::get_num_threads();
  const int64_t parts =
      std::max<int64_t>(1, std::min((wanted + all - 1) / all, (queries + 31) / 32));
  const int64_t rows = (queries + parts - 1) / parts;
  at::parallel_for(0, all * parts, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({attention_jvp_scratch(call)}, at::kByte);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, first = task % parts * rows;
      if (first >= queries) continue;
      attention_jvp_kernel(call, head / heads, head % heads, first,
                           std::min(first + rows, queries), scratch.data_ptr());
    }
  });
  return {o, lse, dos};
}

std::vector<at::Tensor> attention_backward_cpu(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& o, const at::Tensor& lse, const std::optional<at::Tensor>& mask, bool causal,
    double scale, bool packed) {
  Arguments arguments("attention_backward");
  arguments.check_operands(q, k, v, mask);
  const int64_t batch = q.size(0), shared = k.size(1);
  arguments.check("o", o, {batch, q.size(1), q.size(2), v.size(3)}, q.scalar_type());
  arguments.check("grad", grad, o.sizes(), q.scalar_type());
  arguments.check("lse", lse, {batch, q.size(1), q.size(2)}, Arguments::wide(q));

  std::vector<at::Tensor> grads;
  if (packed) {
    TORCH_CHECK_VALUE(q.sizes() == k.sizes() && q.sizes() == v.sizes(),
                      "attention_backward: packed is for q, k and v of one shape, got ", q.sizes(),
                      ", ", k.sizes(), " and ", v.sizes());
    grads = {batch_and_rows(q, {3, q.size(1), q.size(3)})};
  } else {
    grads = {heads_inside(q, q.size(3)), heads_inside(k, k.size(3)), heads_inside(v, v.size(3))};
  }
  const auto gradient = [&](int64_t i) {
    return arguments.operand(packed ? grads[0].select(2, i).transpose(1, 2) : grads[i]);
  };
  AttentionBackward call;
  arguments.set(call, q, k, v, mask, causal, scale);
  call.o = arguments.operand(o);
  call.grad = arguments.operand(grad);
  call.lse = Arguments::vector(lse);
  call.dq = gradient(0);
  call.dk = gradient(1);
  call.dv = gradient(2);
  at::parallel_for(0, batch * shared, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({attention_backward_scratch(call)}, at::kByte);
    for (int64_t task = begin; task < end; ++task) {
      attention_backward_kernel(call, task / shared, task % shared, scratch.data_ptr());
    }
  });
  return grads;
}

}  // namespace
}  // namespace tangentfast::attention

TORCH_LIBRARY_IMPL(tangentfast, CPU, m) {
  m.impl("attention_jvp", &tangentfast::attention::attention_jvp_cpu);
  m.impl("attention_backward", &tangentfast::attention::attention_backward_cpu);
}
