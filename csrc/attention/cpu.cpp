// Attention with K tangents on the CPU: checks, outputs, one task per head and block of queries.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "kernel.h"

namespace tangentfast {
namespace {

using Tangents = c10::List<std::optional<at::Tensor>>;
constexpr const char* kOp = "attention_jvp";

// `tensor` with contiguous columns, kept alive by `keep`.
Operand operand(const at::Tensor& tensor, std::vector<at::Tensor>& keep) {
  const bool plain = tensor.stride(3) == 1 || tensor.size(3) == 1;
  keep.push_back(plain ? tensor.resolve_neg() : tensor.contiguous().resolve_neg());
  const at::Tensor& x = keep.back();
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// A mask may be expanded in any dimension, columns included.
Operand mask_operand(const at::Tensor& mask, std::vector<at::Tensor>& keep, int64_t& column) {
  keep.push_back(mask.resolve_neg());
  const at::Tensor& x = keep.back();
  column = x.stride(3);
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

void check(const std::string& name, const at::Tensor& tensor, at::IntArrayRef shape,
           at::ScalarType dtype) {
  check_tensor(kOp, name, tensor, at::kCPU);
  TORCH_CHECK_VALUE(tensor.sizes() == shape, kOp, ": ", name, " has shape ", tensor.sizes(),
                    ", expected ", shape);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, kOp, ": ", name, " has dtype ",
                   tensor.scalar_type(), ", expected ", dtype);
}

void check_row(const char* name, const Tangents& row, size_t count, at::IntArrayRef shape,
               at::ScalarType dtype) {
  TORCH_CHECK_VALUE(row.size() == count, kOp, ": ", name, " has ", row.size(),
                    " entries, expected one per tangent, ", count);
  for (size_t k = 0; k < count; ++k) {
    if (const auto t = row.get(k)) check(indexed(name, k), *t, shape, dtype);
  }
}

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> attention_jvp_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& mask, bool causal, double scale, const Tangents& dq,
    const Tangents& dk, const Tangents& dv, const Tangents& dmask, bool primal) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, kOp, ": q, k, v have ", q.dim(),
                    ", ", k.dim(), ", ", v.dim(), " dimensions, expected 4 each");
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), depth = q.size(3);
  const int64_t shared = k.size(1), keys = k.size(2), width = v.size(3);
  const auto dtype = q.scalar_type();
  const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  check("q", q, q.sizes(), dtype);
  check("k", k, {batch, shared, keys, depth}, dtype);
  check("v", v, {batch, shared, keys, width}, dtype);
  TORCH_CHECK_VALUE(keys > 0 && shared > 0 && heads % shared == 0, kOp, ": k has shape ",
                    k.sizes(), ", expected at least one key and a number of heads that divides ",
                    heads);
  const std::vector<int64_t> scores{batch, heads, queries, keys};
  if (mask) check("mask", *mask, scores, wide);
  const size_t count = dq.size();
  check_row("dq", dq, count, q.sizes(), dtype);
  check_row("dk", dk, count, k.sizes(), dtype);
  check_row("dv", dv, count, v.sizes(), dtype);
  check_row("dmask", dmask, count, scores, wide);

  Attention call;
  std::vector<at::Tensor> keep;
  // As torch's own kernel lays out its output: joining the heads again is free.
  const auto output = [&] {
    return at::empty({batch, queries, heads, width}, q.options()).transpose(1, 2);
  };
  at::Tensor o = at::empty({0}, q.options()), lse = at::empty({0}, q.options().dtype(wide));
  if (primal) {
    o = output();
    lse = at::empty({batch, queries, heads}, q.options().dtype(wide)).transpose(1, 2);
    call.o = operand(o, keep);
    call.lse = {lse.data_ptr(), lse.stride(0), lse.stride(1), lse.stride(2)};
  }
  call.type = type_of(q);
  call.heads = heads;
  call.group = heads / shared;
  call.queries = queries;
  call.keys = keys;
  call.depth = depth;
  call.value_depth = width;
  call.scale = scale;
  call.causal = causal;
  call.q = operand(q, keep);
  call.k = operand(k, keep);
  call.v = operand(v, keep);
  if (mask) call.mask = mask_operand(*mask, keep, call.mask_column);

  std::vector<AttentionTangent> tangents;
  std::vector<at::Tensor> dos;
  for (size_t i = 0; i < count; ++i) {
    AttentionTangent t;
    if (const auto x = dq.get(i)) t.dq = operand(*x, keep);
    if (const auto x = dk.get(i)) t.dk = operand(*x, keep);
    if (const auto x = dv.get(i)) t.dv = operand(*x, keep);
    if (const auto x = dmask.get(i)) t.dmask = mask_operand(*x, keep, t.dmask_column);
    dos.push_back(output());
    const bool some = t.dq.data || t.dk.data || t.dv.data || t.dmask.data;
    if (!some) {
      dos.back().zero_();
      continue;
    }
    t.out = operand(dos.back(), keep);
    tangents.push_back(t);
  }
  call.tangents = tangents.data();
  call.count = tangents.size();
  if (batch * heads * queries == 0 || (!primal && tangents.empty())) return {o, lse, dos};

  // A head's keys are packed once per task: split heads only when there are fewer than threads.
  const int64_t all = batch * heads, wanted = 4 * at::get_num_threads();
  const int64_t parts = std::max<int64_t>(
      1, std::min((wanted + all - 1) / all, (queries + 31) / 32));
  const int64_t rows = (queries + parts - 1) / parts;
  at::parallel_for(0, all * parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t bytes = attention_jvp_scratch(call);
    const at::Tensor scratch = at::empty({bytes}, at::kByte);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, first = task % parts * rows;
      if (first >= queries) continue;
      attention_jvp_kernel(call, head / heads, head % heads, first,
                           std::min(first + rows, queries), scratch.data_ptr());
    }
  });
  return {o, lse, dos};
}

}  // namespace
}  // namespace tangentfast

TORCH_LIBRARY_IMPL(tangentfast, CPU, m) {
  m.impl("attention_jvp", &tangentfast::attention_jvp_cpu);
}
