// What the kernels use of the hardware beyond CUDA C++, and how they are launched. csrc/tests/emulation.h provides the
// same on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mixout_fast::cuda {

constexpr unsigned whole_warp = 0xFFFFFFFF;

// In assembly, because the compiler may store 2-byte entries 2 bytes at a time.
__device__ __forceinline__ void store_16_bytes(uint4 value, void* out) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(out), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

struct FragmentA {
  uint32_t part[4];
};
struct FragmentB {
  uint32_t part[2];
};

// c (16 x 8) += a (16 x depth) b (depth x 8) on tensor cores, summed in fp32. With g = lane / 4 and t = lane % 4, a
// lane holds c[0], c[1] of row g and c[2], c[3] of row g + 8, in columns 2t and 2t + 1; parts 0 and 2 of a in row g,
// parts 1 and 3 in row g + 8; and b's parts in column g. Parts 0 and 1 of a and part 0 of b are at one place of the
// depth, the other parts at another. Both places belong to t alone, so the lanes may share any order of the depth.
#define MIXOUT_MULTIPLY(name, instruction)                                                                             \
  struct name {                                                                                                        \
    __device__ __forceinline__ void operator()(float* c, FragmentA a, FragmentB b) const {                             \
      asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                    \
                   : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b.part[0]), "r"(b.part[1]));  \
    }                                                                                                                  \
  }
MIXOUT_MULTIPLY(MultiplyBfloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
MIXOUT_MULTIPLY(MultiplyFloat16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
MIXOUT_MULTIPLY(MultiplyTf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
#undef MIXOUT_MULTIPLY

__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// On `device`, whichever device this library's own copy of the runtime used last: PyTorch's guard sets another copy's.
template <typename... Parameters>
const char* launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, int device,
                          Parameters... parameters) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(parameters...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Null, or why the current device cannot run a kernel.
template <typename... Parameters>
const char* why_no_kernel(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  // Clears the error, which is reported here: the next launch should not find it.
  cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

} // namespace mixout_fast::cuda
