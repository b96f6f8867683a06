// Compiles the file TF_BODY once per instruction set, in the namespaces baseline, avx2 and avx512:
// for kernels that hold vectors in registers by hand, where TF_DISPATCH's loops are not enough.
// TF_VECTOR_BYTES and TF_ISA tell the body where it is; it includes nothing itself.
#ifndef TF_BODY
#error "define TF_BODY as the path of the body, relative to csrc/each_isa.h"
#endif

#include "isa.h"
#include "scalar.h"
#if TF_X86
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions alone
#endif

#define TF_ISA 0
#define TF_VECTOR_BYTES 16
namespace tangentfast::baseline {
namespace {
#include TF_BODY
}
}
#undef TF_ISA
#undef TF_VECTOR_BYTES

#if TF_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define TF_ISA 2
#define TF_VECTOR_BYTES 32
namespace tangentfast::avx2 {
namespace {
#include TF_BODY
}
}
#undef TF_ISA
#undef TF_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define TF_ISA 512
#define TF_VECTOR_BYTES 64
namespace tangentfast::avx512 {
namespace {
#include TF_BODY
}
}
#undef TF_ISA
#undef TF_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// TF_CALL(name, (arguments)) calls the body's function of the widest set that the CPU has.
#if TF_X86
#define TF_CALL(name, arguments)                   \
  (isa() == Isa::avx512 ? avx512::name arguments   \
   : isa() == Isa::avx2 ? avx2::name arguments     \
                        : baseline::name arguments)
#else
#define TF_CALL(name, arguments) (baseline::name arguments)
#endif
