#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "kernel.h"
#include "op.h"

namespace tangentfast {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr char kOp[] = "activation_jvp";
constexpr int64_t kGrain = 8192;  // elements: under it a second thread costs more than it gives
const char* const kNames[kActivationRow] = {"dx", "dbias", "dgate", "dgate_bias"};

// `bias` is one row of `rows`, the other two are like x.
void check_like(const std::string& name, const at::Tensor& tensor, const at::Tensor& x, bool bias) {
  check_tensor(kOp, name, tensor, at::kCPU);
  check_same_dtype(kOp, name, tensor, "x", x);
  check_sizes(kOp, name, tensor, bias ? x.sizes().slice(x.dim() - 1) : x.sizes());
}

void check_activation(const at::Tensor& x, const Optional& bias, const Optional& gate,
                      const Optional& gate_bias, const ActivationTangents& tangents) {
  check_tensor(kOp, "x", x, at::kCPU);
  TORCH_CHECK_VALUE(x.dim() > 0 || !(bias || gate_bias), kOp,
                    ": x is a single number, expected one dimension or more beside a bias");
  TORCH_CHECK_VALUE(gate || !gate_bias, kOp, ": gate_bias is given, expected none without a gate");
  if (bias) check_like("bias", *bias, x, true);
  if (gate) check_like("gate", *gate, x, false);
  if (gate_bias) check_like("gate_bias", *gate_bias, x, true);
  const bool present[kActivationRow] = {true, bias.has_value(), gate.has_value(),
                                        gate_bias.has_value()};
  TORCH_CHECK_VALUE(tangents.size() % kActivationRow == 0, kOp, ": tangents has ", tangents.size(),
                    " entries, expected dx, dbias, dgate, dgate_bias for each of K tangents");
  for (size_t i = 0; i < tangents.size(); ++i) {
    const Optional tangent = tangents.get(i);
    if (!tangent) continue;
    const size_t which = i % kActivationRow;
    const std::string name =
        "tangents[" + std::to_string(i / kActivationRow) + "]." + kNames[which];
    TORCH_CHECK_VALUE(present[which], kOp, ": ", name, " is given, expected none where there is no ",
                      kNames[which] + 1);
    check_like(name, *tangent, x, which % 2 == 1);
  }
}

// The step from row to row where `tensor` is rows of contiguous numbers at equal steps; else -1.
int64_t row_stride(const at::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (last < 1 || tensor.is_contiguous()) return last < 0 ? 1 : tensor.size(last);
  if (tensor.size(last) != 1 && tensor.stride(last) != 1) return -1;
  int64_t stride = -1, expected = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (stride < 0) {
      stride = tensor.stride(d);
    } else if (tensor.stride(d) != expected) {
      return -1;
    }
    expected = tensor.stride(d) * tensor.size(d);
  }
  return stride < 0 ? tensor.size(last) : stride;
}

// What the kernel reads, and the copies that it needs of tensors laid out otherwise.
class Reader {
 public:
  explicit Reader(const at::Tensor& x) : columns_(x.dim() ? x.size(-1) : 1) {}

  Rows rows(const Optional& tensor) {
    if (!tensor) return {nullptr, 0};
    int64_t stride = row_stride(*tensor);
    if (stride >= 0) return {tensor->const_data_ptr(), note(stride)};
    copies_.push_back(tensor->contiguous());
    return {copies_.back().const_data_ptr(), columns_};
  }

  Rows row(const Optional& bias) {
    if (!bias) return {nullptr, 0};
    plain_ = false;
    copies_.push_back(bias->contiguous());
    return {copies_.back().const_data_ptr(), 0};
  }

  ActivationInput input(const Optional& x, const Optional& bias, const Optional& gate,
                        const Optional& gate_bias) {
    return {rows(x), row(bias), rows(gate), row(gate_bias)};
  }

  // Whether everything is contiguous and has no bias, so that it may be read as a single row.
  bool plain() const { return plain_; }

 private:
  int64_t note(int64_t stride) {
    plain_ = plain_ && stride == columns_;
    return stride;
  }

  int64_t columns_;
  bool plain_ = true;
  std::vector<at::Tensor> copies_;
};

ActivationResult activation_cpu(const at::Tensor& x, const Optional& bias, const Optional& gate,
                                const Optional& gate_bias, c10::string_view kind,
                                const ActivationTangents& tangents) {
  ActivationItem item{};
  item.kind = activation_named(kind);
  check_activation(x, bias, gate, gate_bias, tangents);
  item.type = type_of(x);
  const auto empty = [&] { return at::empty(x.sizes(), x.options()); };
  at::Tensor y = empty();
  std::vector<at::Tensor> dys;
  Reader reader(x);
  item.in = reader.input(x, bias, gate, gate_bias);
  item.y = y.mutable_data_ptr();
  std::vector<ActivationTangent> rows;
  rows.reserve(tangents.size() / kActivationRow);
  for (size_t i = 0; i < tangents.size(); i += kActivationRow) {
    dys.push_back(empty());
    rows.push_back({reader.input(tangents.get(i), tangents.get(i + 1), tangents.get(i + 2),
                                 tangents.get(i + 3)),
                    dys.back().mutable_data_ptr()});
  }
  item.columns = reader.plain() ? x.numel() : x.size(-1);
  item.tangents = rows.data();
  item.count = rows.size();
  at::parallel_for(0, x.numel(), std::max<int64_t>(kGrain / (1 + item.count), 1),
                   [&](int64_t begin, int64_t end) { activation_jvp_kernel(item, begin, end); });
  return {y, dys};
}

}  // namespace
}  // namespace tangentfast

TORCH_LIBRARY_IMPL(tangentfast, CPU, m) { m.impl("activation_jvp", &tangentfast::activation_cpu); }
