#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tangentfast {
namespace {

Isa widest() {
#if TF_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa choose() {
  const char* variable = std::getenv("TANGENTFAST_ISA");
  const std::string wanted = variable ? variable : "";
  const Isa best = widest();
  if (wanted.empty()) return best;
  if (wanted == "baseline") return Isa::baseline;
  if (wanted == "avx2") return best < Isa::avx2 ? best : Isa::avx2;
  if (wanted == "avx512") return best;
  throw std::runtime_error("TANGENTFAST_ISA is '" + wanted +
                           "'; expected baseline, avx2 or avx512");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::baseline: break;
  }
  return "baseline";
}

}  // namespace tangentfast
