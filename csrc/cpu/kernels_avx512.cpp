#include "kernels.h"

#if defined(__x86_64__)
#if !defined(__clang__)
// GCC 12's own headers cause two dozen false warnings (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define MIXOUT_ISA avx512
#define MIXOUT_ISA_NAME "avx512"
#define MIXOUT_VECTOR_BYTES 64
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16,avx512vbmi2,amx-tile,amx-bf16"))),        \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512vbmi2,amx-tile,amx-bf16")
#endif
#include "bf16.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
