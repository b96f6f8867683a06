#include "kernel.h"

#include <type_traits>

#define TF_BODY "attention/jvp_body.h"
#define TF_NAMESPACE tangentfast::attention
#define TF_WITH_BF16
#include "../each_isa.h"

namespace tangentfast::attention {

void attention_jvp_kernel(const Attention& call, int64_t n, int64_t h, int64_t begin, int64_t end,
                          void* scratch) {
  TF_CALL(attention_jvp, (call, n, h, begin, end, scratch));
}

int64_t attention_jvp_scratch(const Attention& call) { return TF_CALL(scratch_bytes, (call)); }

}  // namespace tangentfast::attention
