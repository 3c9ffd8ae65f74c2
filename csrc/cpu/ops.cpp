// The operators on CPU tensors: checks, allocation, threads and the choice of instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace mixout_fast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The widest instruction set of this processor, or a narrower one by ATen's own variable.
const InstructionSet& choose_instruction_set() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = variable ? variable : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && limit == "avx512") return avx512::instruction_set;
  if (has_avx2 && limit != "default") return avx2::instruction_set;
#endif
  return baseline::instruction_set;
}

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose_instruction_set();
  return chosen;
}

Dtype dtype_of(ScalarType type) {
  switch (type) {
  case ScalarType::Double: return Dtype::f64;
  case ScalarType::Float: return Dtype::f32;
  case ScalarType::BFloat16: return Dtype::bf16;
  case ScalarType::Half: return Dtype::f16;
  default: STD_TORCH_CHECK(false, "dtype: takes float64, float32, bfloat16 or float16"); return Dtype::f32;
  }
}

const Kernels& kernels_of(ScalarType operand, ScalarType result) {
  const Kernels* kernels = instruction_set().kernels(dtype_of(operand), dtype_of(result));
  STD_TORCH_CHECK(kernels, "dtype: a result may be of the operand's dtype, or float32 with bfloat16 or float16");
  return *kernels;
}

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

int64_t accumulation_lanes(ScalarType type) {
  return instruction_set().vector_bytes / (type == ScalarType::Double ? sizeof(double) : sizeof(float));
}

// Packed operands are large and every element that is read is written: no reason to zero them first.
std::unique_ptr<std::byte[]> packed_buffer(int64_t count, ScalarType type) {
  return std::make_unique_for_overwrite<std::byte[]>(count * (type == ScalarType::Double ? 8 : 4));
}

// (N, K), or (N, K, R) seen as (N, K * R).
Matrix matrix_of(const Tensor& tensor) {
  if (tensor.dim() == 2) return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
  STD_TORCH_CHECK(tensor.dim() == 3, "takes 2 or 3 dimensions");
  STD_TORCH_CHECK(tensor.stride(1) == tensor.size(2) * tensor.stride(2) || tensor.size(1) <= 1,
                  "the last two of three dimensions must be laid out as one");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(2)};
}

int64_t repeats_of(const Tensor& tensor) { return tensor.dim() == 3 ? tensor.size(2) : 1; }

// A mask, with the memory it needs: drawn here where columns share it, else where it is used.
struct DrawnMask {
  std::vector<uint32_t> keep;
  Mask mask;
  int64_t kept = 0;

  DrawnMask(const Tensor& seed, int64_t threshold, std::optional<int64_t> capacity, int64_t columns,
            int64_t repeats = 1) {
    const uint64_t key = *static_cast<const uint64_t*>(seed.const_data_ptr());
    mask = {nullptr, key, static_cast<uint64_t>(threshold)};
    if (!capacity) return;
    keep.resize(columns);
    instruction_set().draw(key, mask.threshold, 0, columns, keep.data());
    for (uint32_t flag : keep) kept += flag & 1;
    for (int64_t k = columns - 1; kept > *capacity; --k) {
      kept -= keep[k] & 1;
      keep[k] = 0;
    }
    if (repeats > 1) {
      std::vector<uint32_t> repeated(columns * repeats);
      for (int64_t i = 0; i < columns * repeats; ++i) repeated[i] = keep[i / repeats];
      keep.swap(repeated);
    }
    mask.keep = keep.data();
  }

  // The kept columns, ascending, padded with -1 to `size`.
  Tensor indices(int64_t size) const {
    Tensor index = allocate({size}, ScalarType::Int);
    int32_t* out = static_cast<int32_t*>(index.mutable_data_ptr());
    int64_t count = 0;
    for (int64_t k = 0; count < kept; ++k) {
      out[count] = static_cast<int32_t>(k);
      count += keep[k] & 1;
    }
    std::fill(out + kept, out + size, -1);
    return index;
  }
};

Mixing mixing_of(const Tensor& weight, const std::optional<Tensor>& target, double scale, const Mask& mask) {
  const int64_t columns = weight.size(1) * repeats_of(weight);
  return {matrix_of(weight), target ? matrix_of(*target) : Matrix{nullptr, 0, 0}, weight.size(0), columns, scale, mask};
}

// One thread's part of the work.
struct Slice {
  int64_t begin, end, slices;
  int64_t first(int64_t count) const { return count * begin / slices; }
  int64_t last(int64_t count) const { return count * end / slices; }
};

// A thread takes at least this much memory traffic: less is cheaper than waking one (about 3 us at 20 GB/s).
constexpr int64_t bytes_per_thread = 64 * 1024;

template <typename Function>
void in_slices(int64_t bytes, const Function& function) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t slices = std::clamp<int64_t>(bytes / bytes_per_thread, 1, threads);
  torch::stable::parallel_for(0, slices, 1,
                              [&](int64_t begin, int64_t end) { function(Slice{begin, end, slices}); });
}

int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }

Tensor mix(const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed, int64_t threshold,
           double scale, std::optional<int64_t> capacity, ScalarType dtype) {
  const DrawnMask drawn(seed, threshold, capacity, weight.size(1), repeats_of(weight));
  const Mixing mixing = mixing_of(weight, target, scale, drawn.mask);
  const Kernels& kernels = kernels_of(weight.scalar_type(), dtype);
  Tensor out = weight.dim() == 3 ? allocate({weight.size(0), weight.size(1), weight.size(2)}, dtype)
                                 : allocate({weight.size(0), weight.size(1)}, dtype);
  void* data = out.mutable_data_ptr();
  in_slices(3 * bytes_of(weight),
            [&](Slice slice) { kernels.mix(mixing, slice.first(mixing.rows), slice.last(mixing.rows), data); });
  return out;
}

Tensor mask_grad(const Tensor& grad, const Tensor& seed, int64_t threshold, std::optional<int64_t> capacity,
                 double factor, ScalarType dtype) {
  const DrawnMask drawn(seed, threshold, capacity, grad.size(1), repeats_of(grad));
  const Matrix matrix = matrix_of(grad);
  const int64_t rows = grad.size(0), columns = grad.size(1) * repeats_of(grad);
  const Kernels& kernels = kernels_of(grad.scalar_type(), dtype);
  Tensor out = grad.dim() == 3 ? allocate({rows, grad.size(1), grad.size(2)}, dtype) : allocate({rows, columns}, dtype);
  void* data = out.mutable_data_ptr();
  in_slices(2 * bytes_of(grad), [&](Slice slice) {
    kernels.mask_grad(matrix, columns, drawn.mask, factor, slice.first(rows), slice.last(rows), data);
  });
  return out;
}

// W' where a weight is given, and the kept columns of x with their indices, from one draw.
std::tuple<std::optional<Tensor>, Tensor, Tensor> mix_and_gather(const Tensor& input, const Mixing* mixing,
                                                                 ScalarType operand, const DrawnMask& drawn,
                                                                 int64_t width) {
  const ScalarType dtype = input.scalar_type();
  const int64_t m = input.size(0);
  const Matrix x = matrix_of(input);
  Tensor index = drawn.indices(width);
  Tensor columns = allocate({m, width}, dtype);
  std::optional<Tensor> mixed;
  int64_t bytes = bytes_of(input);
  if (mixing) {
    mixed = allocate({mixing->rows, mixing->columns}, dtype);
    bytes += 3 * bytes_of(*mixed);
  }
  void* mixed_data = mixed ? mixed->mutable_data_ptr() : nullptr;
  void* columns_data = columns.mutable_data_ptr();
  const int32_t* indices = static_cast<const int32_t*>(index.const_data_ptr());
  const Kernels* kernels = mixing ? &kernels_of(operand, dtype) : nullptr;
  in_slices(bytes, [&](Slice slice) {
    if (mixing) kernels->mix(*mixing, slice.first(mixing->rows), slice.last(mixing->rows), mixed_data);
    instruction_set().gather(x, input.element_size(), indices, width, slice.first(m), slice.last(m), columns_data);
  });
  return {mixed, index, columns};
}

std::tuple<Tensor, Tensor> gather(const Tensor& input, const Tensor& seed, int64_t threshold, int64_t capacity,
                                  bool fixed_size) {
  const DrawnMask drawn(seed, threshold, capacity, input.size(1));
  auto [mixed, index, columns] =
      mix_and_gather(input, nullptr, input.scalar_type(), drawn, fixed_size ? capacity : drawn.kept);
  return {index, columns};
}

std::tuple<Tensor, Tensor, Tensor> mix_gather(const Tensor& input, const Tensor& weight,
                                              const std::optional<Tensor>& target, const Tensor& seed,
                                              int64_t threshold, double scale, int64_t capacity, bool fixed_size) {
  const DrawnMask drawn(seed, threshold, capacity, weight.size(1));
  const Mixing mixing = mixing_of(weight, target, scale, drawn.mask);
  auto [mixed, index, columns] =
      mix_and_gather(input, &mixing, weight.scalar_type(), drawn, fixed_size ? capacity : drawn.kept);
  return {*mixed, index, columns};
}

Tensor expand(const Tensor& compact, const Tensor& index, int64_t in_features, double factor, ScalarType dtype) {
  const int64_t rows = compact.size(1);
  const Matrix matrix = matrix_of(compact);
  const Kernels& kernels = kernels_of(compact.scalar_type(), dtype);
  Tensor out = allocate({rows, in_features}, dtype);
  void* data = out.mutable_data_ptr();
  const int32_t* indices = static_cast<const int32_t*>(index.const_data_ptr());
  in_slices(bytes_of(out) + bytes_of(compact), [&](Slice slice) {
    kernels.expand(matrix, indices, index.numel(), in_features, factor, slice.first(rows), slice.last(rows), data);
  });
  return out;
}

int64_t units_of(int64_t count, int64_t unit) { return round_up(count, unit) / unit; }

Tensor fused_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& target,
                    const std::optional<Tensor>& bias, const Tensor& seed, int64_t threshold, double scale,
                    std::optional<int64_t> capacity) {
  const DrawnMask drawn(seed, threshold, capacity, weight.size(1));
  const Mixing mixing = mixing_of(weight, target, scale, drawn.mask);
  const ScalarType dtype = input.scalar_type();
  const Kernels& kernels = kernels_of(weight.scalar_type(), dtype);
  const int64_t m = input.size(0), lanes = accumulation_lanes(dtype);
  Tensor out = allocate({m, mixing.rows}, dtype);
  if (m == 0) return out;
  void* data = out.mutable_data_ptr();
  STD_TORCH_CHECK(!bias || bias->is_contiguous(), "bias: must be contiguous");
  const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
  const auto packed = packed_buffer(packed_linear_size(m, mixing.columns, lanes), dtype);
  const int64_t pack_units = packed_linear_units(m, mixing.columns, lanes);
  const Matrix x = matrix_of(input);
  in_slices(2 * bytes_of(input), [&](Slice slice) {
    kernels.pack_linear(x, m, mixing.columns, slice.first(pack_units), slice.last(pack_units), packed.get());
  });
  const int64_t units = units_of(mixing.rows, weight_row_unit);
  in_slices(2 * bytes_of(weight), [&](Slice slice) {
    kernels.linear(mixing, packed.get(), m, slice.first(units) * weight_row_unit,
                   std::min(slice.last(units) * weight_row_unit, mixing.rows), bias_data, data);
  });
  return out;
}

Tensor fused_grad_input(const Tensor& grad, const Tensor& weight, const std::optional<Tensor>& target,
                        const Tensor& seed, int64_t threshold, double scale, std::optional<int64_t> capacity) {
  const DrawnMask drawn(seed, threshold, capacity, weight.size(1));
  const Mixing mixing = mixing_of(weight, target, scale, drawn.mask);
  const ScalarType dtype = grad.scalar_type();
  const Kernels& kernels = kernels_of(weight.scalar_type(), dtype);
  const int64_t m = grad.size(0);
  Tensor out = allocate({m, mixing.columns}, dtype);
  if (m == 0) return out;
  void* data = out.mutable_data_ptr();
  const auto packed = packed_buffer(packed_grad_size(m, mixing.rows), dtype);
  const int64_t pack_units = packed_grad_units(m, mixing.rows);
  const Matrix dy = matrix_of(grad);
  in_slices(2 * bytes_of(grad), [&](Slice slice) {
    kernels.pack_grad(dy, m, mixing.rows, slice.first(pack_units), slice.last(pack_units), packed.get());
  });
  const int64_t units = units_of(mixing.columns, grad_column_unit);
  in_slices(2 * bytes_of(weight), [&](Slice slice) {
    kernels.grad_input(mixing, packed.get(), m, slice.first(units) * grad_column_unit,
                       std::min(slice.last(units) * grad_column_unit, mixing.columns), data);
  });
  return out;
}

std::string instruction_set_name() { return instruction_set().name; }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mixout_fast, CPU, m) {
  m.impl("mix", TORCH_BOX(&mix));
  m.impl("mask_grad", TORCH_BOX(&mask_grad));
  m.impl("gather", TORCH_BOX(&gather));
  m.impl("mix_gather", TORCH_BOX(&mix_gather));
  m.impl("expand", TORCH_BOX(&expand));
  m.impl("fused_linear", TORCH_BOX(&fused_linear));
  m.impl("fused_grad_input", TORCH_BOX(&fused_grad_input));
}

STABLE_TORCH_LIBRARY_IMPL(mixout_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&instruction_set_name));
}

} // namespace mixout_fast::cpu
