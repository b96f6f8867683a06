#include "kernel.h"

#include <type_traits>

#define TF_BODY "attention/backward_body.h"
#define TF_NAMESPACE tangentfast::attention
#define TF_WITH_BF16
#include "../each_isa.h"

namespace tangentfast::attention {

void attention_backward_kernel(const AttentionBackward& call, int64_t n, int64_t g,
                               void* scratch) {
  TF_CALL(attention_backward, (call, n, g, scratch));
}

int64_t attention_backward_scratch(const AttentionBackward& call) {
  return TF_CALL(scratch_bytes, (call));
}

}  // namespace tangentfast::attention
