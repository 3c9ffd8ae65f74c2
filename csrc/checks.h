// What the operators refuse, lest they read or write past a tensor's end. mixout_fast/functional.py checks what its
// callers pass; but what backward gets can change after that, by hooks on saved tensors and by assignments to a
// parameter's data.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace mixout_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.dim() == 0 && seed.scalar_type() == ScalarType::Long, "seed: takes a 0-d int64 tensor");
}

inline void check_target(const Tensor& weight, const std::optional<Tensor>& target) {
  if (!target) return;
  const auto wanted = weight.sizes(), sizes = target->sizes();
  STD_TORCH_CHECK(std::equal(wanted.begin(), wanted.end(), sizes.begin(), sizes.end()) &&
                      target->scalar_type() == weight.scalar_type(),
                  "target: takes a tensor of weight's shape and dtype");
  // The kernels take null for a target of zeros.
  STD_TORCH_CHECK(target->numel() == 0 || target->const_data_ptr(), "target: its storage is empty");
}

inline void check_layer(const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed) {
  check_seed(seed);
  STD_TORCH_CHECK(weight.dim() == 2, "weight: takes (out_features, in_features)");
  check_target(weight, target);
}

// `tensor` is (..., columns).
inline void check_columns(const Tensor& tensor, int64_t columns, const char* message) {
  STD_TORCH_CHECK(tensor.dim() > 0 && tensor.size(tensor.dim() - 1) == columns, message);
}

inline void check_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& target,
                         const std::optional<Tensor>& bias, const Tensor& seed) {
  check_layer(weight, target, seed);
  check_columns(input, weight.size(1), "input: takes (..., in_features)");
  STD_TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == input.scalar_type()),
      "bias: takes (out_features,) of input's dtype");
}

inline void check_linear_backward(const Tensor& grad, const std::optional<Tensor>& input,
                                  const std::optional<Tensor>& index, const std::optional<Tensor>& columns,
                                  const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed,
                                  bool needs_weight) {
  check_layer(weight, target, seed);
  const int64_t outputs = weight.size(0), in_features = weight.size(1);
  check_columns(grad, outputs, "grad: takes (..., out_features)");
  if (!needs_weight) return;
  STD_TORCH_CHECK(input || (index && columns), "grad: dW is made of the input, or of the kept index and columns");
  if (input) {
    check_columns(*input, in_features, "input: takes (..., in_features)");
    STD_TORCH_CHECK(input->numel() * outputs == grad.numel() * in_features &&
                        input->scalar_type() == grad.scalar_type(),
                    "input: takes as many rows as grad, of its dtype");
  } else {
    STD_TORCH_CHECK(index->dim() == 1 && index->is_contiguous() && index->scalar_type() == ScalarType::Int,
                    "index: takes a contiguous vector of int32");
    check_columns(*columns, index->size(0), "columns: takes a column for each entry of index");
    STD_TORCH_CHECK(columns->dim() == 2 && columns->size(0) * outputs == grad.numel() &&
                        columns->scalar_type() == grad.scalar_type(),
                    "columns: takes as many rows as grad, of its dtype");
  }
}

} // namespace mixout_fast
