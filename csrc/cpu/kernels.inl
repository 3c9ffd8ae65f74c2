// The kernels of an instruction set, in the files included here, one per topic; this file chooses among them by dtype.
// Included once per instruction set, inside a region compiled for it, with MIXOUT_ISA its namespace and
// MIXOUT_VECTOR_BYTES its vector width. No function templates of the standard library in any of these files: the linker
// could keep an instantiation for a newer instruction set and use it for all. mixing.h is included inside the region
// because its templates call functions of these files.

#include "../mixing.h"
#include "elementwise.inl"
#include "grad_weight.inl"
#include "kept_columns.inl"
#include "products.inl"

namespace mixout_fast::cpu::MIXOUT_ISA {
namespace {

template <typename Operand, typename Result>
constexpr Kernels make_kernels() {
  Kernels kernels = {mix<Operand, Result>,       multiply<true, Operand, Result>, multiply<false, Operand, Result>,
                     mask_grad<Operand, Result>, expand<Operand, Result>,         expand_rows<Operand, Result>};
#if defined(MIXOUT_HAS_COMPRESS)
  if constexpr (std::is_same_v<Operand, Result> && std::is_same_v<Operand, Compute<Operand>>) {
    kernels.stage_kept = stage_kept<Operand>;
    kernels.grad_weight = grad_weight<Operand>;
  }
#endif
  return kernels;
}

template <typename Operand, typename Result>
constexpr Kernels kernels_for = make_kernels<Operand, Result>();

const Kernels* kernels(Dtype operand, Dtype result) {
  switch (operand) {
  case Dtype::f64:
    return result == Dtype::f64 ? &kernels_for<double, double> : nullptr;
  case Dtype::f32:
    return result == Dtype::f32    ? &kernels_for<float, float>
           : result == Dtype::bf16 ? &kernels_for<float, bfloat16>
           : result == Dtype::f16  ? &kernels_for<float, float16>
                                   : nullptr;
  case Dtype::bf16:
    return result == Dtype::bf16  ? &kernels_for<bfloat16, bfloat16>
           : result == Dtype::f32 ? &kernels_for<bfloat16, float>
                                  : nullptr;
  case Dtype::f16:
    return result == Dtype::f16   ? &kernels_for<float16, float16>
           : result == Dtype::f32 ? &kernels_for<float16, float>
                                  : nullptr;
  }
  return nullptr;
}

} // namespace

extern const InstructionSet instruction_set = {MIXOUT_ISA_NAME, draw, gather, kernels};

} // namespace mixout_fast::cpu::MIXOUT_ISA
