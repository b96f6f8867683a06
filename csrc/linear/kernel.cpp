#include "kernel.h"

#include <type_traits>

#define TF_BODY "linear/body.h"
#define TF_NAMESPACE tangentfast::linear
#define TF_WITH_BF16
#include "../each_isa.h"

namespace tangentfast::linear {

ProductsPlan products_plan(const Products& call) { return TF_CALL(plan, (call)); }

void products_pack(const Products& call, int64_t task) { TF_CALL(pack_one, (call, task)); }

void products_block(const Products& call, int64_t task, void* scratch) {
  TF_CALL(block, (call, task, scratch));
}

}  // namespace tangentfast::linear
