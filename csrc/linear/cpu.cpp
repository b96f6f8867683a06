// Sums of matrix products on the CPU: checks, outputs, and the tasks shared out among threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../checks.h"
#include "kernel.h"

namespace tangentfast::linear {
namespace {

constexpr const char* kOp = "products";

// Runs task(i, memory) for every i < tasks, each thread taking the next one when it is free.
template <class Task>
void share_out(int64_t tasks, int64_t scratch_bytes, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const at::Tensor scratch = at::empty({scratch_bytes}, at::kByte);
    for (int64_t i = next++; i < tasks; i = next++) task(i, scratch.data_ptr());
  });
}

// The operands of one side, of one shape and dtype, and kept alive.
class Side {
 public:
  Side(const char* name, at::TensorList tensors, const at::Tensor& first) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const std::string own = indexed(name, i);
      check_tensor(kOp, own, tensors[i], at::kCPU);
      TORCH_CHECK_VALUE(tensors[i].dim() == 2, kOp, ": ", own, " has shape ", tensors[i].sizes(),
                        ", expected a matrix");
      check_same_shape(kOp, own, tensors[i], indexed(name, 0), tensors[0]);
      check_same_dtype(kOp, own, tensors[i], "lefts[0]", first);
      const at::Tensor x = tensors[i].resolve_neg();
      kept_.push_back(x.stride(0) == 1 || x.stride(1) == 1 ? x : x.contiguous());
      const at::Tensor& read = kept_.back();
      matrices_.push_back({read.const_data_ptr(), read.stride(0), read.stride(1)});
    }
  }

  const Matrix* data() const { return matrices_.data(); }
  int64_t size() const { return static_cast<int64_t>(matrices_.size()); }

 private:
  std::vector<at::Tensor> kept_;
  std::vector<Matrix> matrices_;
};

// Into how many parts a block of columns is split. Tasks take the same time, so the last thread ends
// after ceil(tasks / threads) of them, or half a task later if other programs disturb it. Each part
// copies the right operands anew, and a copy costs about what 32 rows of a product do. For 800 rows
// of x [800, 768] Wᵀ with W [768, 768], which has 8 blocks of columns: with 2 threads 2 parts, with
// 64 threads 8 parts of 100 rows, one a thread. Panels of x are then read by all threads, as each
// needs its rows, and a block of W by the 8 threads that share it; no sum is shared, so none is
// split over its depth.
int64_t parts_of(const Products& c, const ProductsPlan& plan, int64_t threads) {
  const auto time = [&](int64_t parts) {
    const int64_t rounds = (plan.column_blocks * parts + threads - 1) / threads;
    const double rows = static_cast<double>(c.rows) / static_cast<double>(parts);
    return (static_cast<double>(rounds) + 0.5) *
           (32.0 * static_cast<double>(c.right_count) + rows * static_cast<double>(c.term_count));
  };
  int64_t best = 1;
  for (int64_t parts = 2; parts <= std::min(plan.row_tiles, 4 * threads); ++parts) {
    if (time(parts) < time(best)) best = parts;
  }
  return best;
}

std::vector<at::Tensor> products_cpu(at::TensorList lefts, at::TensorList rights,
                                     const c10::List<std::optional<at::Tensor>>& biases,
                                     at::IntArrayRef terms, bool narrow) {
  TORCH_CHECK_VALUE(!lefts.empty() && !rights.empty(), kOp, ": lefts has ", lefts.size(),
                    " and rights has ", rights.size(), " entries, expected at least one each");
  const Side left("lefts", lefts, lefts[0]), right("rights", rights, lefts[0]);
  const int64_t rows = lefts[0].size(0), depth = lefts[0].size(1), columns = rights[0].size(1);
  TORCH_CHECK_VALUE(rights[0].size(0) == depth, kOp, ": rights[0] has shape ", rights[0].sizes(),
                    ", expected ", depth, " rows, as lefts[0] has columns");
  const int64_t count = biases.size();
  TORCH_CHECK_VALUE(terms.size() % 3 == 0, kOp, ": terms has ", terms.size(),
                    " entries, expected triples (sum, left, right)");
  std::vector<Term> all;
  for (size_t i = 0; i < terms.size(); i += 3) {
    const Term term{terms[i], terms[i + 1], terms[i + 2]};
    TORCH_CHECK_VALUE(0 <= term.sum && term.sum < count && 0 <= term.left &&
                          term.left < left.size() && 0 <= term.right && term.right < right.size(),
                      kOp, ": terms holds (", term.sum, ", ", term.left, ", ", term.right,
                      "), expected indices below (", count, ", ", left.size(), ", ", right.size(),
                      ")");
    all.push_back(term);
  }
  std::vector<at::Tensor> outs, added;
  std::vector<Sum> sums;
  for (int64_t i = 0; i < count; ++i) {
    Sum sum{nullptr, nullptr};
    if (const std::optional<at::Tensor> bias = biases.get(i)) {
      const std::string name = indexed("biases", i);
      check_tensor(kOp, name, *bias, at::kCPU);
      check_sizes(kOp, name, *bias, {columns});
      check_same_dtype(kOp, name, *bias, "lefts[0]", lefts[0]);
      added.push_back(bias->resolve_neg().contiguous());
      sum.bias = added.back().const_data_ptr();
    }
    outs.push_back(at::empty({rows, columns}, lefts[0].options()));
    sum.out = outs.back().data_ptr();
    sums.push_back(sum);
  }
  Products call{type_of(lefts[0]), narrow, rows, columns, depth, left.data(), left.size(),
                right.data(), right.size(), sums.data(), count, all.data(),
                static_cast<int64_t>(all.size())};
  const ProductsPlan plan = products_plan(call);
  if (plan.row_tiles == 0 || plan.column_blocks == 0) return outs;
  call.parts = parts_of(call, plan, at::get_num_threads());
  const at::Tensor panels = at::empty({plan.panel_bytes}, at::kByte);
  call.panels = panels.data_ptr();
  share_out(plan.packing, 0, [&](int64_t i, void*) { products_pack(call, i); });
  share_out(plan.column_blocks * call.parts, plan.scratch_bytes,
            [&](int64_t i, void* scratch) { products_block(call, i, scratch); });
  return outs;
}

}  // namespace
}  // namespace tangentfast::linear

TORCH_LIBRARY_IMPL(tangentfast, CPU, m) { m.impl("products", &tangentfast::linear::products_cpu); }
