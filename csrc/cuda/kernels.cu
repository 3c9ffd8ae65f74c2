// The CUDA kernels, in the files included here, one per topic, and their launchers, which choose among them by dtype.
// nvcc compiles without fused multiply-adds, so that mixing rounds as mixing.h says; the products call fma by name.
// csrc/tests/emulation.h compiles the same source for the CPU.

#include "elementwise.cuh"
#include "expand.cuh"
#include "kernels.h"
#include "products.cuh"

namespace mixout_fast::cuda {
namespace {

template <typename A, typename B>
struct Pair {
  using Operand = A;
  using Result = B;
};

const char* unserved = "a result may be of the operand's dtype, or float32 with bfloat16 or float16";

template <typename Function>
const char* with_types(Dtype operand, Dtype result, Function function) {
  if (operand == Dtype::f64 && result == Dtype::f64) return function(Pair<double, double>{});
  if (operand == Dtype::f32 && result == Dtype::f32) return function(Pair<float, float>{});
  if (operand == Dtype::f32 && result == Dtype::bf16) return function(Pair<float, bfloat16>{});
  if (operand == Dtype::f32 && result == Dtype::f16) return function(Pair<float, float16>{});
  if (operand == Dtype::bf16 && result == Dtype::bf16) return function(Pair<bfloat16, bfloat16>{});
  if (operand == Dtype::f16 && result == Dtype::f16) return function(Pair<float16, float16>{});
  return unserved;
}

// The gradient may also be narrower than the weight.
template <typename Function>
const char* with_gradient_types(Dtype operand, Dtype result, Function function) {
  if (operand == Dtype::bf16 && result == Dtype::f32) return function(Pair<bfloat16, float>{});
  if (operand == Dtype::f16 && result == Dtype::f32) return function(Pair<float16, float>{});
  return with_types(operand, result, function);
}

// CUDA refuses a grid of no blocks; for tensors without entries there is nothing to launch.
template <typename... Parameters>
const char* launch_blocks(void (*kernel)(Parameters...), int64_t blocks, Launch launch,
                          std::type_identity_t<Parameters>... parameters) {
  if (blocks == 0) return nullptr;
  return launch_kernel(kernel, blocks, threads, launch.stream, launch.device, parameters...);
}

template <typename Operand, typename Engine, bool transposed>
const char* launch_product(const Product& product, const Gather& gather, Launch launch) {
  Product tiled = product;
  const Mixing& mixing = product.mixing;
  tiled.tiles = blocks_of(transposed ? mixing.columns : mixing.rows, transposed ? 32 : 16);
  tiled.chunks = blocks_of(product.m, Engine::max_rows);
  return launch_blocks(product_kernel<Operand, Engine, transposed>, tiled.tiles * tiled.chunks + gather_blocks(gather),
                       launch, tiled, gather);
}

template <bool transposed>
const char* multiply(Dtype operand, Dtype result, const Product& product, bool tf32, const Gather& gather,
                     Launch launch) {
  return with_types(operand, result, [&](auto types) {
    using Operand = typename decltype(types)::Operand;
    using Result = typename decltype(types)::Result;
    if constexpr (std::is_same_v<Result, bfloat16>) {
      return launch_product<Operand, TensorCores<bfloat16, MultiplyBfloat16, transposed>, transposed>(product, gather,
                                                                                                      launch);
    } else if constexpr (std::is_same_v<Result, float16>) {
      return launch_product<Operand, TensorCores<float16, MultiplyFloat16, transposed>, transposed>(product, gather,
                                                                                                    launch);
    } else {
      if constexpr (std::is_same_v<Result, float>)
        if (tf32)
          return launch_product<float, TensorCores<float, MultiplyTf32, transposed>, transposed>(product, gather,
                                                                                                 launch);
      return launch_product<Operand, FusedMultiplyAdd<Result, transposed>, transposed>(product, gather, launch);
    }
  });
}

} // namespace

const char* why_no_kernels() { return why_no_kernel(mix_kernel<float, float, false>); }

const char* launch_mix(Dtype operand, Dtype result, const Mixing& mixing, void* out, const Gather& gather,
                       const ColumnSums& sums, Launch launch) {
  return with_types(operand, result, [&](auto types) {
    using Operand = typename decltype(types)::Operand;
    using Result = typename decltype(types)::Result;
    const int64_t mix_blocks = blocks_of_parts<Operand, Result>(mixing.rows, mixing.columns);
    const int64_t gathers = gather_blocks(gather), others = gathers + sum_rows_blocks<Result>(sums);
    return launch_blocks(mixing.mask.neurons_are_rows ? mix_kernel<Operand, Result, true>
                                                      : mix_kernel<Operand, Result, false>,
                         others + mix_blocks, launch, mixing, static_cast<Result*>(out), gather, gathers, sums, others);
  });
}

const char* launch_mask_grad(Dtype operand, Dtype result, Matrix grad, int64_t rows, int64_t columns, const Mask& mask,
                             double factor, void* out, const ColumnSums& sums, Launch launch) {
  return with_gradient_types(operand, result, [&](auto types) {
    using Operand = typename decltype(types)::Operand;
    using Result = typename decltype(types)::Result;
    const int64_t blocks = blocks_of_parts<Operand, Result>(rows, columns);
    const int64_t sum_blocks = sum_parts_blocks(sums);
    return launch_blocks(
        mask.neurons_are_rows ? mask_grad_kernel<Operand, Result, true> : mask_grad_kernel<Operand, Result, false>,
        sum_blocks + blocks, launch, grad, rows, columns, mask, factor, static_cast<Result*>(out), sums, sum_blocks);
  });
}

const char* launch_gather(Dtype dtype, const Mask& mask, const Gather& gather, const ColumnSums& sums, Launch launch) {
  Mixing nothing{};
  nothing.mask = mask;
  return launch_mix(dtype, dtype, nothing, nullptr, gather, sums, launch);
}

const char* launch_linear(Dtype operand, Dtype result, const Mixing& mixing, Matrix x, int64_t m, Matrix bias,
                          bool tf32, void* out, const Gather& gather, Launch launch) {
  return multiply<false>(operand, result, {mixing, x, m, bias, out, 0, 0}, tf32, gather, launch);
}

const char* launch_grad_input(Dtype operand, Dtype result, const Mixing& mixing, Matrix x, int64_t m, bool tf32,
                              void* out, Launch launch) {
  return multiply<true>(operand, result, {mixing, x, m, {}, out, 0, 0}, tf32, {}, launch);
}

const char* launch_expand(Dtype operand, Dtype result, Matrix compact, const int32_t* index, int64_t count,
                          int64_t rows, int64_t columns, bool by_rows, double factor, void* out, const ColumnSums& sums,
                          Launch launch) {
  return with_gradient_types(operand, result, [&](auto types) {
    using Operand = typename decltype(types)::Operand;
    using Result = typename decltype(types)::Result;
    const int64_t blocks = by_rows ? blocks_of_parts<Operand, Result>(columns, rows)
                                   : blocks_of(columns, expand_columns) * blocks_of(rows, expand_rows);
    const int64_t sum_blocks = sum_parts_blocks(sums);
    return launch_blocks(by_rows ? expand_rows_kernel<Operand, Result> : expand_kernel<Operand, Result>,
                         sum_blocks + blocks, launch, compact, index, count, rows, columns, factor,
                         static_cast<Result*>(out), sums, sum_blocks);
  });
}

} // namespace mixout_fast::cuda
