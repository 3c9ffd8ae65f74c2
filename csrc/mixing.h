// The mixing arithmetic and the roundings around it. One source for the CPU and CUDA.
//
// Operands are fp64, fp32, bf16 or fp16; arithmetic is fp64 for fp64 and fp32 for the rest. Every operation rounds:
// the CPU code is compiled with -ffp-contract=off, and CUDA uses the intrinsics that are never fused.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace mixout_fast {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename To, typename From>
MIXOUT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The conversions are integer arithmetic with selects and no branches, so that loops over them vectorise; a GPU has an
// instruction for each, which differs only in a NaN's payload.
MIXOUT_INLINE float widen(float value) { return value; }
MIXOUT_INLINE double widen(double value) { return value; }
MIXOUT_INLINE float widen(bfloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
MIXOUT_INLINE float widen(float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7FFF) << 13;
  const uint32_t exponent = magnitude & 0x0F800000;
  const uint32_t normal = magnitude + ((127 - 15) << 23);
  const uint32_t infinite_or_nan = magnitude + ((255 - 31) << 23);
  // 2^-14 with the subnormal's bits as its fraction, minus 2^-14, is the subnormal's value exactly.
  const float offset = bit_cast<float>(uint32_t{127 - 14} << 23);
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude + ((127 - 14) << 23)) - offset);
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  return bit_cast<float>(sign | (exponent == 0x0F800000 ? infinite_or_nan : finite));
#endif
}

template <typename To>
MIXOUT_INLINE To narrow(float value);
template <typename To>
MIXOUT_INLINE To narrow(double value);

template <>
MIXOUT_INLINE float narrow<float>(float value) {
  return value;
}
template <>
MIXOUT_INLINE double narrow<double>(double value) {
  return value;
}
template <>
MIXOUT_INLINE bfloat16 narrow<bfloat16>(float value) {
#if defined(__CUDA_ARCH__)
  bfloat16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  return bfloat16{static_cast<uint16_t>(is_nan ? 0x7FC0 : rounded)};
#endif
}
template <>
MIXOUT_INLINE float16 narrow<float16>(float value) {
#if defined(__CUDA_ARCH__)
  float16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  // Adding 0.5, whose unit in the last place is fp16's smallest subnormal, lets the addition round.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  const uint32_t special = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  return float16{static_cast<uint16_t>(sign | (magnitude >= 0x47800000 ? special : finite))};
#endif
}

#if defined(__CUDA_ARCH__)
MIXOUT_INLINE float subtract(float a, float b) { return __fsub_rn(a, b); }
MIXOUT_INLINE float multiply(float a, float b) { return __fmul_rn(a, b); }
MIXOUT_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
MIXOUT_INLINE double subtract(double a, double b) { return __dsub_rn(a, b); }
MIXOUT_INLINE double multiply(double a, double b) { return __dmul_rn(a, b); }
MIXOUT_INLINE double add(double a, double b) { return __dadd_rn(a, b); }
#else
template <typename T>
MIXOUT_INLINE T subtract(T a, T b) {
  return a - b;
}
template <typename T>
MIXOUT_INLINE T multiply(T a, T b) {
  return a * b;
}
template <typename T>
MIXOUT_INLINE T add(T a, T b) {
  return a + b;
}
#endif

// w' = u + (w - u) / (1 - p) where kept, u itself where dropped (never u + 0 * …: w may be infinite).
template <typename Compute>
MIXOUT_INLINE Compute mix_entry(Compute weight, Compute target, Compute scale, bool keep) {
  const Compute mixed = add(target, multiply(subtract(weight, target), scale));
  return keep ? mixed : target;
}

} // namespace mixout_fast
