// The operators on CPU tensors: checks, allocation, threads and the choice of instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../library.h"
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

const Kernels& kernels_of(ScalarType operand, ScalarType result) {
  const Kernels* kernels = instruction_set().kernels(kernel_dtype<Dtype>(operand), kernel_dtype<Dtype>(result));
  STD_TORCH_CHECK(kernels, "dtype: a result may be of the operand's dtype, or float32 with bfloat16 or float16");
  return *kernels;
}

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
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
  // The same of a product's outputs, split where no vector is.
  int64_t first_output(int64_t outputs) const {
    return first(round_up(outputs, output_unit) / output_unit) * output_unit;
  }
  int64_t last_output(int64_t outputs) const {
    return std::min(last(round_up(outputs, output_unit) / output_unit) * output_unit, outputs);
  }
};

// A thread takes at least this much memory traffic: less is cheaper than waking one (about 3 us at 20 GB/s).
constexpr int64_t bytes_per_thread = 64 * 1024;

template <typename Function>
void in_slices(int64_t bytes, const Function& function) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t slices = std::clamp<int64_t>(bytes / bytes_per_thread, 1, threads);
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) { function(Slice{begin, end, slices}); });
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

void gather_rows(const Tensor& rows, const int32_t* index, int64_t count, const Tensor& columns, Slice slice) {
  const int64_t m = rows.size(0);
  instruction_set().gather(matrix_of(rows), rows.element_size(), index, count, slice.first(m), slice.last(m),
                           columns.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> gather(const Tensor& rows, const Tensor& seed, int64_t threshold, int64_t capacity,
                                  bool fixed_size) {
  const DrawnMask drawn(seed, threshold, capacity, rows.size(1));
  const int64_t width = fixed_size ? capacity : drawn.kept;
  Tensor index = drawn.indices(width);
  Tensor columns = allocate({rows.size(0), width}, rows.scalar_type());
  const int32_t* indices = static_cast<const int32_t*>(index.const_data_ptr());
  in_slices(bytes_of(rows), [&](Slice slice) { gather_rows(rows, indices, width, columns, slice); });
  return {index, columns};
}

// The product of rows (m, terms) with W'^T or W', with `bias` added, reading W and U once and writing no W'. `kernel`
// is the kernel of one of the two; `beside` is done in the same slices.
template <typename Kernel, typename Function>
Tensor one_pass(const Tensor& rows, const Mixing& mixing, int64_t outputs, const std::optional<Tensor>& bias,
                Kernel kernel, const Function& beside) {
  const int64_t m = rows.size(0);
  Tensor out = allocate({m, outputs}, rows.scalar_type());
  if (m == 0) return out;
  STD_TORCH_CHECK(rows.size(1) > 0, "weight: empty");
  void* data = out.mutable_data_ptr();
  STD_TORCH_CHECK(!bias || bias->is_contiguous(), "bias: must be contiguous");
  const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
  const Matrix x = matrix_of(rows);
  in_slices(2 * mixing.rows * mixing.columns * rows.element_size() + bytes_of(rows), [&](Slice slice) {
    beside(slice);
    kernel(mixing, x, m, slice.first_output(outputs), slice.last_output(outputs), bias_data, data);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear(const Tensor& input, const Tensor& weight,
                                          const std::optional<Tensor>& target, const std::optional<Tensor>& bias,
                                          const Tensor& seed, int64_t threshold, double scale,
                                          std::optional<int64_t> capacity, bool in_one_pass, bool gathers,
                                          bool fixed_size) {
  const ScalarType dtype = input.scalar_type();
  const DrawnMask drawn(seed, threshold, capacity, weight.size(1));
  const Mixing mixing = mixing_of(weight, target, scale, drawn.mask);
  const Kernels& kernels = kernels_of(weight.scalar_type(), dtype);
  const bool is_matrix = input.dim() == 2;
  const Tensor rows = is_matrix ? input : torch::stable::reshape(input, {-1, mixing.columns});

  const int64_t width = !gathers ? 0 : fixed_size ? *capacity : drawn.kept;
  Tensor index = gathers ? drawn.indices(width) : allocate({0}, ScalarType::Int);
  Tensor columns = allocate({gathers ? rows.size(0) : 0, width}, dtype);
  const int32_t* indices = static_cast<const int32_t*>(index.const_data_ptr());

  const auto gather_slice = [&](Slice slice) {
    if (gathers) gather_rows(rows, indices, width, columns, slice);
  };

  if (in_one_pass) {
    Tensor output = one_pass(rows, mixing, mixing.rows, bias, kernels.linear, gather_slice);
    if (is_matrix) return {output, index, columns};
    std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
    sizes.back() = mixing.rows;
    return {torch::stable::view(output, sizes), index, columns};
  }
  Tensor mixed = allocate({mixing.rows, mixing.columns}, dtype);
  void* mixed_data = mixed.mutable_data_ptr();
  in_slices(3 * bytes_of(mixed) + bytes_of(rows), [&](Slice slice) {
    kernels.mix(mixing, slice.first(mixing.rows), slice.last(mixing.rows), mixed_data);
    gather_slice(slice);
  });
  return {library_linear(input, mixed, bias), index, columns};
}

Tensor grad_input(const Tensor& grad, const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed,
                  int64_t threshold, double scale, std::optional<int64_t> capacity, bool in_one_pass) {
  if (!in_one_pass) return library_mm(grad, mix(weight, target, seed, threshold, scale, capacity, grad.scalar_type()));
  const DrawnMask drawn(seed, threshold, capacity, weight.size(1));
  const Mixing mixing = mixing_of(weight, target, scale, drawn.mask);
  const Kernels& kernels = kernels_of(weight.scalar_type(), grad.scalar_type());
  return one_pass(grad, mixing, mixing.columns, std::nullopt, kernels.grad_input, [](Slice) {});
}

Tensor grad_weight(const Tensor& columns, const Tensor& grad, const Tensor& index, int64_t in_features, double factor,
                   ScalarType dtype) {
  const int64_t outputs = grad.size(1), count = index.numel();
  const Kernels& kernels = kernels_of(grad.scalar_type(), dtype);
  Tensor out = allocate({outputs, in_features}, dtype);
  void* data = out.mutable_data_ptr();
  const int32_t* indices = static_cast<const int32_t*>(index.const_data_ptr());
  // Measured against the library's product and expand(), at p = 0.9 and 0.5, on 2 cores: 128x768x768 0.53 and 0.67,
  // 128x1024x4096 0.8 and 0.6; a whole step at 512x768x768 1.00 and 1.00, at 1024x1024x4096 1.01 and 0.99, at
  // 2048x3072x768 1.01 and 1.08.
  constexpr int64_t one_pass_rows = 512;
  if (kernels.grad_weight && grad.size(0) <= one_pass_rows) {
    const Matrix x = matrix_of(columns), dy = matrix_of(grad);
    in_slices(bytes_of(out) + bytes_of(grad), [&](Slice slice) {
      kernels.grad_weight(x, dy, grad.size(0), outputs, indices, count, in_features, factor,
                          slice.first_output(outputs), slice.last_output(outputs), data);
    });
    return out;
  }
  // (C, N) where few columns of many rows are kept: fp32 at 2048x768x768, p = 0.9, takes 1.25 ms so and 1.48 the other
  // way, with the expansion, bf16's product 0.36 and 0.53. (N, C) else, level from there on: it expands without a
  // transpose.
  const bool by_columns = columns.size(0) > 256 && 2 * columns.size(1) < in_features;
  Tensor compact = by_columns ? library_mm(torch::stable::transpose(columns, 0, 1), grad)
                              : library_mm(torch::stable::transpose(grad, 0, 1), columns);
  if (!by_columns) compact = torch::stable::transpose(compact, 0, 1);
  const Matrix matrix = matrix_of(compact);
  in_slices(bytes_of(out) + bytes_of(compact), [&](Slice slice) {
    kernels.expand(matrix, indices, count, in_features, factor, slice.first(outputs), slice.last(outputs), data);
  });
  return out;
}

std::string instruction_set_name() { return instruction_set().name; }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mixout_fast, CPU, m) {
  m.impl("mix", TORCH_BOX(&mix));
  m.impl("mask_grad", TORCH_BOX(&mask_grad));
  m.impl("gather", TORCH_BOX(&gather));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("grad_input", TORCH_BOX(&grad_input));
  m.impl("grad_weight", TORCH_BOX(&grad_weight));
}

STABLE_TORCH_LIBRARY_IMPL(mixout_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&instruction_set_name));
}

} // namespace mixout_fast::cpu
