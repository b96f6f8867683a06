#include "isa.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tangentfast {
namespace {

// In the order of Isa.
constexpr std::array<const char*, 4> kNames{"baseline", "avx2", "avx512", "avx512_bf16"};

Isa widest() {
#if TF_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
#if TF_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
#endif
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
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (wanted == kNames[i]) return std::min(best, static_cast<Isa>(i));
  }
  throw std::runtime_error("TANGENTFAST_ISA is '" + wanted +
                           "'; expected baseline, avx2, avx512 or avx512_bf16");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return kNames[static_cast<size_t>(isa())]; }

}  // namespace tangentfast
