// The operators on CUDA tensors: schemas, checks, allocation. A library of its own, so that the CPU's loads where there
// is no CUDA; its operators differ from the CPU's in that a gather has always the capacity as its size, which the host
// knows without waiting, and that fp32 products may be allowed TF32. mixout_fast/reference.py says what each computes.
//
// A mask is given by a 0-d int64 seed, threshold = round(p * 2^32), and capacity: the most columns that an input mask
// keeps, or None for one entry per element. scale is 1 / (1 - p).
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../library.h"
#include "kernels.h"

// csrc/tests/emulation.h runs the kernels on CPU tensors.
#if !defined(MIXOUT_DEVICE)
#define MIXOUT_DEVICE CUDA
#endif

namespace mixout_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Only a CUDA torch has it, and PyTorch's libraries are in nobody's scope but their own: looked up, so that the library
// also loads beside a CPU torch.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "CUDA tensors, but this PyTorch has no libtorch_cuda.so with a current stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// A tensor's device is the current one as long as this lives.
struct OnDevice {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  Launch launch{nullptr, 0};

  explicit OnDevice(const Tensor& tensor) {
    if (!tensor.is_cuda()) return;
    launch.device = tensor.get_device_index();
    guard.emplace(launch.device);
    launch.stream = current_stream(launch.device);
  }
};

void check(const char* error) { STD_TORCH_CHECK(!error, error); }

Dtype dtype_of(ScalarType type) { return kernel_dtype<Dtype>(type); }

Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

// (N, K), or (N, K, R) seen as (N, K * R).
Matrix matrix_of(const Tensor& tensor) {
  Matrix matrix{tensor.const_data_ptr(), tensor.stride(0), 0, false};
  if (tensor.dim() == 2) {
    matrix.column_stride = tensor.stride(1);
  } else {
    STD_TORCH_CHECK(tensor.dim() == 3, "takes 2 or 3 dimensions");
    STD_TORCH_CHECK(tensor.stride(1) == tensor.size(2) * tensor.stride(2) || tensor.size(1) <= 1,
                    "the last two of three dimensions must be laid out as one");
    matrix.column_stride = tensor.stride(2);
  }
  matrix.vectors = matrix.column_stride == 1 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
                   matrix.row_stride * static_cast<int64_t>(tensor.element_size()) % 16 == 0;
  return matrix;
}

// One pass takes matrices whose columns are neighbours in memory; others are mixed first.
bool is_by_rows(const Matrix& matrix, int64_t columns) {
  return !matrix.data || matrix.column_stride == 1 || columns <= 1;
}

bool takes_one_pass(const Mixing& mixing, const Matrix& x, int64_t length) {
  return is_by_rows(mixing.weight, mixing.columns) && is_by_rows(mixing.target, mixing.columns) &&
         is_by_rows(x, length) && mixing.columns <= one_pass_columns;
}

int64_t repeats_of(const Tensor& tensor) { return tensor.dim() == 3 ? tensor.size(2) : 1; }

Mask mask_of(const Tensor& seed, int64_t threshold, std::optional<int64_t> capacity, int64_t entries,
             int64_t repeats = 1) {
  return {static_cast<const int64_t*>(seed.const_data_ptr()),
          static_cast<uint64_t>(threshold),
          !capacity,
          entries,
          capacity.value_or(0),
          repeats};
}

Mixing mixing_of(const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed, int64_t threshold,
                 double scale, std::optional<int64_t> capacity) {
  const int64_t repeats = repeats_of(weight);
  return {matrix_of(weight),
          target ? matrix_of(*target) : Matrix{},
          weight.size(0),
          weight.size(1) * repeats,
          scale,
          mask_of(seed, threshold, capacity, weight.size(1), repeats)};
}

Tensor like_weight(const Tensor& weight, ScalarType dtype) {
  return weight.dim() == 3 ? allocate(weight, {weight.size(0), weight.size(1), weight.size(2)}, dtype)
                           : allocate(weight, {weight.size(0), weight.size(1)}, dtype);
}

// The kept columns of rows, as tensors and as what the kernels take.
struct Gathered {
  Tensor index, columns;
  Gather gather;

  Gathered(const Tensor& rows, int64_t capacity)
      : index(allocate(rows, {capacity}, ScalarType::Int)),
        columns(allocate(rows, {rows.size(0), capacity}, rows.scalar_type())),
        gather{matrix_of(rows),
               rows.size(0),
               rows.size(1),
               capacity,
               static_cast<int32_t*>(index.mutable_data_ptr()),
               columns.mutable_data_ptr()} {}
};

// Nothing, or why the current device cannot run the kernels.
std::string why_no_kernels_here() {
  const char* reason = why_no_kernels();
  return reason ? reason : "";
}

Tensor mix(const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed, int64_t threshold,
           double scale, std::optional<int64_t> capacity, ScalarType dtype) {
  const OnDevice device(weight);
  const Mixing mixing = mixing_of(weight, target, seed, threshold, scale, capacity);
  Tensor out = like_weight(weight, dtype);
  check(launch_mix(dtype_of(weight), dtype_of(dtype), mixing, out.mutable_data_ptr(), {}, device.launch));
  return out;
}

Tensor mask_grad(const Tensor& grad, const Tensor& seed, int64_t threshold, std::optional<int64_t> capacity,
                 double factor, ScalarType dtype) {
  const OnDevice device(grad);
  const int64_t repeats = repeats_of(grad);
  Tensor out = like_weight(grad, dtype);
  check(launch_mask_grad(dtype_of(grad), dtype_of(dtype), matrix_of(grad), grad.size(0), grad.size(1) * repeats,
                         mask_of(seed, threshold, capacity, grad.size(1), repeats), factor, out.mutable_data_ptr(),
                         device.launch));
  return out;
}

std::tuple<Tensor, Tensor> gather(const Tensor& rows, const Tensor& seed, int64_t threshold, int64_t capacity) {
  const OnDevice device(rows);
  Gathered gathered(rows, capacity);
  check(
      launch_gather(dtype_of(rows), mask_of(seed, threshold, capacity, rows.size(1)), gathered.gather, device.launch));
  return {gathered.index, gathered.columns};
}

std::tuple<Tensor, Tensor, Tensor> linear(const Tensor& input, const Tensor& weight,
                                          const std::optional<Tensor>& target, const std::optional<Tensor>& bias,
                                          const Tensor& seed, int64_t threshold, double scale,
                                          std::optional<int64_t> capacity, bool one_pass, bool tf32, bool gathers) {
  const OnDevice device(weight);
  const ScalarType dtype = input.scalar_type();
  const Mixing mixing = mixing_of(weight, target, seed, threshold, scale, capacity);
  const bool is_matrix = input.dim() == 2;
  const Tensor rows = is_matrix ? input : torch::stable::reshape(input, {-1, mixing.columns});
  std::optional<Gathered> gathered;
  if (gathers) gathered.emplace(rows, *capacity);
  const Gather gather = gathered ? gathered->gather : Gather{};
  const Tensor index = gathered ? gathered->index : allocate(weight, {0}, ScalarType::Int);
  const Tensor columns = gathered ? gathered->columns : allocate(weight, {0, 0}, dtype);

  const Matrix x = matrix_of(rows);
  if (!one_pass || !takes_one_pass(mixing, x, mixing.columns)) {
    Tensor mixed = allocate(weight, {mixing.rows, mixing.columns}, dtype);
    check(launch_mix(dtype_of(weight), dtype_of(dtype), mixing, mixed.mutable_data_ptr(), gather, device.launch));
    return {library_linear(input, mixed, bias), index, columns};
  }
  Tensor output = allocate(weight, {rows.size(0), mixing.rows}, dtype);
  const Matrix bias_row = bias ? Matrix{bias->const_data_ptr(), 0, bias->stride(0), false} : Matrix{};
  check(launch_linear(dtype_of(weight), dtype_of(dtype), mixing, x, rows.size(0), bias_row, tf32,
                      output.mutable_data_ptr(), gather, device.launch));
  if (is_matrix) return {output, index, columns};
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = mixing.rows;
  return {torch::stable::view(output, sizes), index, columns};
}

Tensor grad_input(const Tensor& grad, const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed,
                  int64_t threshold, double scale, std::optional<int64_t> capacity, bool one_pass, bool tf32) {
  const OnDevice device(weight);
  const Mixing mixing = mixing_of(weight, target, seed, threshold, scale, capacity);
  const Matrix x = matrix_of(grad);
  if (!one_pass || !takes_one_pass(mixing, x, mixing.rows))
    return library_mm(grad, mix(weight, target, seed, threshold, scale, capacity, grad.scalar_type()));
  Tensor out = allocate(weight, {grad.size(0), mixing.columns}, grad.scalar_type());
  check(launch_grad_input(dtype_of(weight), dtype_of(grad), mixing, x, grad.size(0), tf32, out.mutable_data_ptr(),
                          device.launch));
  return out;
}

Tensor grad_weight(const Tensor& columns, const Tensor& grad, const Tensor& index, int64_t in_features, double factor,
                   ScalarType dtype) {
  const OnDevice device(columns);
  const Tensor compact = library_mm(torch::stable::transpose(columns, 0, 1), grad);
  Tensor out = allocate(columns, {compact.size(1), in_features}, dtype);
  check(launch_expand(dtype_of(compact), dtype_of(dtype), matrix_of(compact),
                      static_cast<const int32_t*>(index.const_data_ptr()), index.numel(), compact.size(1), in_features,
                      factor, out.mutable_data_ptr(), device.launch));
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY(mixout_fast_cuda, m) {
  m.def("why_no_kernels() -> str");
  m.def("mix(Tensor weight, Tensor? target, Tensor seed, int threshold, float scale, int? capacity, ScalarType dtype)"
        " -> Tensor");
  m.def("mask_grad(Tensor grad, Tensor seed, int threshold, int? capacity, float factor, ScalarType dtype) -> Tensor");
  m.def("gather(Tensor rows, Tensor seed, int threshold, int capacity) -> (Tensor, Tensor)");
  m.def("linear(Tensor input, Tensor weight, Tensor? target, Tensor? bias, Tensor seed, int threshold, float scale,"
        " int? capacity, bool one_pass, bool tf32, bool gathers) -> (Tensor, Tensor, Tensor)");
  m.def("grad_input(Tensor grad, Tensor weight, Tensor? target, Tensor seed, int threshold, float scale, int? capacity,"
        " bool one_pass, bool tf32) -> Tensor");
  m.def("grad_weight(Tensor columns, Tensor grad, Tensor index, int in_features, float factor, ScalarType dtype)"
        " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixout_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("why_no_kernels", TORCH_BOX(&why_no_kernels_here));
}

STABLE_TORCH_LIBRARY_IMPL(mixout_fast_cuda, MIXOUT_DEVICE, m) {
  m.impl("mix", TORCH_BOX(&mix));
  m.impl("mask_grad", TORCH_BOX(&mask_grad));
  m.impl("gather", TORCH_BOX(&gather));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("grad_input", TORCH_BOX(&grad_input));
  m.impl("grad_weight", TORCH_BOX(&grad_weight));
}

} // namespace mixout_fast::cuda
