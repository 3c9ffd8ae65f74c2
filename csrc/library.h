// What the operators of every device ask of the library, through its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>

namespace mixout_fast {

// The products, through the dispatcher: the same kernels that Python's F.linear and mm reach.
inline torch::stable::Tensor library_linear(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                                            const std::optional<torch::stable::Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

inline torch::stable::Tensor library_mm(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// As the kernels' own enumeration, which they have without a header of torch.
template <typename Dtype>
Dtype kernel_dtype(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
  case ScalarType::Double:
    return Dtype::f64;
  case ScalarType::Float:
    return Dtype::f32;
  case ScalarType::BFloat16:
    return Dtype::bf16;
  case ScalarType::Half:
    return Dtype::f16;
  default:
    STD_TORCH_CHECK(false, "dtype: takes float64, float32, bfloat16 or float16");
    return Dtype::f32;
  }
}

} // namespace mixout_fast
