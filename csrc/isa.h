// Run-time choice of the instruction set: one binary for every CPU of an architecture.
// A kernel is an always_inline template; TF_DISPATCH compiles it once per ISA and calls the widest
// that the CPU has. TANGENTFAST_ISA=baseline|avx2|avx512|avx512_bf16 narrows the choice, and never
// widens it.
// With -ffp-contract=off every ISA gives the same bits, because no lane-dependent sum is written.
#pragma once

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define TF_X86 1
#define TF_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TF_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))
#else
#define TF_X86 0
#endif

// Whether the compiler knows AVX512-BF16, whose products of bfloat16 few kernels have a use for.
#if TF_X86 && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define TF_BF16 1
#else
#define TF_BF16 0
#endif

namespace tangentfast {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// Decided at the first call; throws std::runtime_error when TANGENTFAST_ISA is none of the names.
Isa isa();
const char* isa_name();

}  // namespace tangentfast

// TF_DISPATCH(name, body, (parameters), (arguments)) defines void name(parameters).
#if TF_X86
#define TF_DISPATCH(name, body, parameters, arguments)              \
  static TF_AVX512 void name##_avx512 parameters { body arguments; } \
  static TF_AVX2 void name##_avx2 parameters { body arguments; }     \
  void name parameters {                                            \
    switch (isa()) {                                                \
      case Isa::avx512_bf16:                                        \
      case Isa::avx512: return name##_avx512 arguments;             \
      case Isa::avx2: return name##_avx2 arguments;                 \
      case Isa::baseline: break;                                    \
    }                                                               \
    body arguments;                                                 \
  }
#else
#define TF_DISPATCH(name, body, parameters, arguments) \
  void name parameters { body arguments; }
#endif
