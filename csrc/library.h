// What the CPU and CUDA operators share: schemas, a mask's constants, and calls into torch through its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace mixout_fast {

// The constants of a mask, as mixout_fast/reference.py computes them.
inline uint64_t threshold_of(double p) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "p: takes a probability in [0, 1]");
  return static_cast<uint64_t>(std::nearbyint(std::ldexp(p, 32)));
}

inline double scale_of(double p) { return p < 1.0 ? 1.0 / (1.0 - p) : 1.0; }

// Fewer than one mask in 1e8 has more kept entries than its capacity; tests of the emulated kernels lower the capacity
// to reach that case.
#if defined(MIXOUT_EMULATION)
extern "C" int64_t capacity_limit;
#else
constexpr int64_t capacity_limit = INT64_MAX;
#endif

inline int64_t capacity_of(int64_t count, double p) {
  const double mean = (1.0 - p) * count, deviation = std::sqrt(count * p * (1.0 - p));
  const int64_t bound = (static_cast<int64_t>(std::ceil(mean + 8.0 * deviation)) + 15) / 16 * 16;
  return std::min({count, bound, capacity_limit});
}

// (..., columns) as a matrix.
inline torch::stable::Tensor rows_of(const torch::stable::Tensor& tensor, int64_t columns) {
  return tensor.dim() == 2 ? tensor : torch::stable::reshape(tensor, {-1, columns});
}

// As in mixout_fast/reference.py.
inline bool is_column_major(const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& target) {
  const auto is_transposed = [](const torch::stable::Tensor& matrix) {
    return matrix.stride(0) == 1 && matrix.stride(1) != 1;
  };
  return is_transposed(weight) && (!target || is_transposed(*target));
}

// `result` (rows, n) with the leading dimensions of `operand` (..., any): (..., n). Not a view: a view that an autograd
// function returns cannot be changed in place, as nn.ReLU(inplace=True) does.
inline torch::stable::Tensor shaped_as(const torch::stable::Tensor& operand, const torch::stable::Tensor& result) {
  if (operand.dim() == 2) return result;
  std::vector<int64_t> sizes(operand.sizes().begin(), operand.sizes().end());
  sizes.back() = result.size(result.dim() - 1);
  std::array<StableIValue, 2> stack{torch::stable::detail::from(result), torch::stable::detail::from(sizes)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_unsafe_view", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// The library's products, that is PyTorch's: the dispatcher reaches the same kernels as Python's F.linear and mm.
// TORCH_ERROR_CODE_CHECK is the macro's name in torch 2.11 too.
inline torch::stable::Tensor library_linear(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                                            const std::optional<torch::stable::Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return shaped_as(input, torch::stable::detail::to<torch::stable::Tensor>(stack[0]));
}

// Calls mm.out, which autocast leaves alone.
inline torch::stable::Tensor library_mm(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  const torch::stable::Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(1)});
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// The operators' schemas, the same on every device. A mask is given by a 0-d int64 seed, p and per_column: whether it
// has one entry per column (an input mask) or per element. tf32: fp32 products may round their operands to TF32; CPUs
// ignore it. fixed_size: the gathered columns are padded to the mask's capacity; on GPUs they always are, so that the
// host need not wait for their number.
//
// linear_backward computes those of dX, dW and db that are needed from grad (..., N). dW is computed from the kept
// index and columns or, where an input is given, from the input: in one full product, or from its kept columns.
// one_pass applies to dX.
constexpr const char* mix_schema =
    "mix(Tensor weight, Tensor? target, Tensor seed, float p, bool per_column, ScalarType dtype) -> Tensor";
constexpr const char* mask_grad_schema =
    "mask_grad(Tensor grad, Tensor seed, float p, bool per_column, float factor, ScalarType dtype) -> Tensor";
constexpr const char* linear_schema =
    "linear(Tensor input, Tensor weight, Tensor? target, Tensor? bias, Tensor seed, float p, bool per_column,"
    " bool one_pass, bool tf32, bool gathers, bool fixed_size) -> (Tensor, Tensor?, Tensor?)";
constexpr const char* linear_backward_schema =
    "linear_backward(Tensor grad, Tensor? input, Tensor? index, Tensor? columns, Tensor weight, Tensor? target,"
    " Tensor seed, bool needs_input, bool needs_weight, bool needs_bias, float p, bool per_column, float factor,"
    " bool one_pass, bool tf32, bool full_product) -> (Tensor?, Tensor?, Tensor?)";

// y, and the kept index and columns where they are gathered.
using Output =
    std::tuple<torch::stable::Tensor, std::optional<torch::stable::Tensor>, std::optional<torch::stable::Tensor>>;

// dX, dW and db, each where it is needed.
using Gradients = std::tuple<std::optional<torch::stable::Tensor>, std::optional<torch::stable::Tensor>,
                             std::optional<torch::stable::Tensor>>;

inline torch::stable::Tensor sum_of_rows(const torch::stable::Tensor& matrix) {
  const int64_t over_rows = 0;
  return torch::stable::sum(matrix, torch::headeronly::IntHeaderOnlyArrayRef(&over_rows, 1));
}

// The dtype in the kernels' own enumeration: they include no header of torch.
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
