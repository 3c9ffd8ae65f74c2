#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MIXOUT_ISA baseline
#define MIXOUT_ISA_NAME "baseline"
#define MIXOUT_VECTOR_BYTES 16
#include "kernels.inl"
