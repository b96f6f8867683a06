// Attention with K tangents over raw memory: no torch, no threads, no allocation.
//   S = scale q kᵀ + mask,  P = softmax(S),  o = P v
//   dS = scale (dq kᵀ + q dkᵀ) + dmask,  dP = P (dS - rowsum(P dS)),  do = dP v + P dv
// A block of query rows is finished before the next is begun, so that P and dS are never larger
// than one block; a row is held whole, and its softmax is the exact two-pass one.
#pragma once

#include <cstdint>

#include "../scalar.h"

namespace tangentfast::attention {

// [N, H, rows, columns] with strides in elements; columns are contiguous. Null: absent.
struct Operand {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

struct AttentionTangent {
  Operand dq, dk, dv, dmask;
  int64_t dmask_column = 0;
  Operand out;
};

struct AttentionOperands {
  Type type;  // of all operands but masks and lse, which are double for f64 and float for the rest
  int64_t heads, group;  // `group` query heads share a key and value head
  int64_t queries, keys, depth, value_depth;
  double scale;
  bool causal;  // query i sees keys 0 .. i
  Operand q, k, v, mask;  // mask: added to S; -inf hides
  int64_t mask_column = 0;
};

struct Attention : AttentionOperands {
  Operand o;
  Operand lse;  // [N, H, queries]: log-sum-exp of S; +inf for a row that sees nothing, whose o is 0
  const AttentionTangent* tangents = nullptr;
  int64_t count = 0;
};

// Query rows begin <= i < end of head h of batch entry n. scratch: attention_jvp_scratch bytes,
// aligned to 64. The result of a row does not depend on how the rows are split.
void attention_jvp_kernel(const Attention& call, int64_t n, int64_t h, int64_t begin, int64_t end,
                          void* scratch);

int64_t attention_jvp_scratch(const Attention& call);

// The gradients of <grad, o>, P recomputed from the log-sum-exp:
//   dv = Pᵀ grad,  dS = P (grad vᵀ - rowsum(grad o)),  dq = scale dS k,  dk = scale dSᵀ q
struct AttentionBackward : AttentionOperands {
  Operand o, lse, grad;
  Operand dq, dk, dv;  // written
};

// All query heads of key head g of batch entry n. scratch: attention_backward_scratch bytes.
void attention_backward_kernel(const AttentionBackward& call, int64_t n, int64_t g, void* scratch);

int64_t attention_backward_scratch(const AttentionBackward& call);

}  // namespace tangentfast::attention
