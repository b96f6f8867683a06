// Compiles the file TF_BODY once per instruction set, in the namespaces baseline, avx2 and avx512 of
// TF_NAMESPACE: for kernels that hold vectors in registers by hand, where TF_DISPATCH's loops are not
// enough. TF_VECTOR_BYTES and TF_ISA tell the body where it is; it includes nothing itself. A body
// for which TF_WITH_BF16 is defined is compiled for AVX512-BF16, too, in the namespace avx512_bf16.
#ifndef TF_BODY
#error "define TF_BODY as the path of the body, relative to csrc/each_isa.h"
#endif
#ifndef TF_NAMESPACE
#define TF_NAMESPACE tangentfast  // of the op
#endif

#include "isa.h"
#include "scalar.h"
#if TF_X86
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions alone
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own _mm512_undefined_ps,
#pragma GCC diagnostic ignored "-Wuninitialized"        // PR 105593
#endif

#define TF_ISA 0
#define TF_VECTOR_BYTES 16
namespace TF_NAMESPACE::baseline {
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
namespace TF_NAMESPACE::avx2 {
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
namespace TF_NAMESPACE::avx512 {
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

#if TF_BF16 && defined(TF_WITH_BF16)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif
#define TF_ISA 513
#define TF_VECTOR_BYTES 64
namespace TF_NAMESPACE::avx512_bf16 {
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
#define TF_BF16_CALL(name, arguments) avx512_bf16::name arguments
#else
#define TF_BF16_CALL(name, arguments) avx512::name arguments
#endif
#endif

// TF_CALL(name, (arguments)) calls the body's function of the widest set that the CPU has.
#if TF_X86
#define TF_CALL(name, arguments)                                     \
  (isa() == Isa::avx512_bf16 ? TF_BF16_CALL(name, arguments)         \
   : isa() == Isa::avx512    ? avx512::name arguments                \
   : isa() == Isa::avx2      ? avx2::name arguments                  \
                             : baseline::name arguments)
#else
#define TF_CALL(name, arguments) (baseline::name arguments)
#endif
