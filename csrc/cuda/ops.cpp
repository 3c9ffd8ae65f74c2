// The operators on CUDA tensors: checks and allocation. A library of its own, so that the CPU library loads where there
// is no CUDA. mixout_fast/reference.py says what each computes.
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
#include <utility>

#include "../checks.h"
#include "../library.h"
#include "kernels.h"

// csrc/tests/emulation.h runs the kernels on CPU tensors.
#if defined(MIXOUT_EMULATION)
#define MIXOUT_DEVICE CPU
#else
#define MIXOUT_DEVICE CUDA
#endif

namespace mixout_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Only a CUDA torch has this function, and PyTorch loads its libraries into a local scope; looked up at run time, so
// that this library also loads beside a CPU torch.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "CUDA tensors, but this PyTorch has no libtorch_cuda.so with a current stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// Makes a tensor's device the current one as long as this object lives.
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

Matrix matrix_of(const Tensor& tensor, int64_t row_stride, int64_t column_stride) {
  const bool vectors = column_stride == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 &&
                       row_stride * static_cast<int64_t>(tensor.element_size()) % 16 == 0;
  return {tensor.const_data_ptr(), row_stride, column_stride, vectors};
}

Matrix matrix_of(const Tensor& tensor) { return matrix_of(tensor, tensor.stride(0), tensor.stride(1)); }

// How the kernels see a weight: (N, K) as it is or, where it is column-major and seen `transposed`, as row-major
// (K, N); (N, K, R) as (N, K * R) or, with one output, as (K, R), which is how a Conv1D's weight is mixed on its own.
struct View {
  bool transposed;
  int64_t rows, columns, in_features;
  bool neurons_are_rows;

  explicit View(const Tensor& weight, bool seen_transposed = false)
      : transposed(seen_transposed), rows(weight.size(0)), columns(weight.size(1)), in_features(weight.size(1)),
        neurons_are_rows(seen_transposed) {
    STD_TORCH_CHECK(weight.dim() == 2 || weight.dim() == 3, "takes 2 or 3 dimensions");
    if (transposed) std::swap(rows, columns);
    if (weight.dim() == 2) return;
    neurons_are_rows = rows == 1;
    if (neurons_are_rows) rows = columns, columns = weight.size(2);
    else columns *= weight.size(2);
  }

  Matrix matrix(const Tensor& tensor) const {
    if (transposed) return matrix_of(tensor, tensor.stride(1), tensor.stride(0));
    if (tensor.dim() == 2) return matrix_of(tensor);
    if (neurons_are_rows) return matrix_of(tensor, tensor.stride(1), tensor.stride(2));
    // With R = 1 the last stride can be anything: in channels_last it is K.
    if (tensor.size(2) == 1) return matrix_of(tensor);
    STD_TORCH_CHECK(tensor.stride(1) == tensor.size(2) * tensor.stride(2) || tensor.size(1) <= 1,
                    "the last two of three dimensions must be laid out as one");
    return matrix_of(tensor, tensor.stride(0), tensor.stride(2));
  }

  Mask mask(const Tensor& seed, double p, bool per_neuron) const {
    return {static_cast<const int64_t*>(seed.const_data_ptr()),
            threshold_of(p),
            !per_neuron,
            per_neuron && neurons_are_rows,
            in_features,
            per_neuron ? capacity_of(in_features, p) : 0,
            neurons_are_rows || in_features == 0 ? 1 : columns / in_features};
  }

  // A new tensor with the weight's dimensions, whose memory holds the view's rows, as the kernels write them.
  Tensor result(const Tensor& weight, ScalarType dtype) const {
    if (transposed) return torch::stable::transpose(allocate(weight, {rows, columns}, dtype), 0, 1);
    return torch::stable::new_empty(weight, weight.sizes(), dtype);
  }
};

// One pass needs matrices whose columns are neighbours in memory; otherwise W' is mixed first.
bool is_row_major(const Matrix& matrix, int64_t columns) {
  return !matrix.data || matrix.column_stride == 1 || columns <= 1;
}

bool takes_one_pass(const Mixing& mixing, const Matrix& x, int64_t length) {
  return !mixing.mask.neurons_are_rows && is_row_major(mixing.weight, mixing.columns) &&
         is_row_major(mixing.target, mixing.columns) && is_row_major(x, length) && mixing.columns <= one_pass_columns;
}

Mixing mixing_of(const View& view, const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed,
                 double p, bool per_column) {
  return {view.matrix(weight),           target ? view.matrix(*target) : Matrix{}, view.rows, view.columns, scale_of(p),
          view.mask(seed, p, per_column)};
}

// The view of a layer's weight (N, K).
View view_of(const Tensor& weight, const std::optional<Tensor>& target, bool per_column) {
  return View(weight, per_column && is_column_major(weight, target));
}

// The kept columns of `rows`, as tensors and as the kernels' argument.
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

// The sums of the columns of `rows`, as a tensor and as the kernels' argument, and the memory for their parts.
struct Summed {
  Tensor out, parts;
  ColumnSums sums;

  explicit Summed(const Tensor& rows)
      : out(allocate(rows, {rows.size(1)}, rows.scalar_type())),
        parts(allocate(rows, {(rows.size(0) + rows_a_part - 1) / rows_a_part, rows.size(1)},
                       rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float)),
        sums{matrix_of(rows), rows.size(0), rows.size(1), parts.mutable_data_ptr(), out.mutable_data_ptr()} {}
};

// Empty, or why the current device cannot run the kernels.
std::string why_no_kernels_here() {
  const char* reason = why_no_kernels();
  return reason ? reason : "";
}

// W'. The same launch gathers, and computes the parts of the column sums.
Tensor mixed(const View& view, const Tensor& weight, const Mixing& mixing, ScalarType dtype, const Gather& gather,
             const ColumnSums& sums, Launch launch) {
  Tensor out = view.result(weight, dtype);
  check(launch_mix(dtype_of(weight), dtype_of(dtype), mixing, out.mutable_data_ptr(), gather, sums, launch));
  return out;
}

Tensor mix(const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed, double p, bool per_column,
           ScalarType dtype) {
  check_seed(seed);
  check_target(weight, target);
  const OnDevice device(weight);
  const View view(weight);
  return mixed(view, weight, mixing_of(view, weight, target, seed, p, per_column), dtype, {}, {}, device.launch);
}

// mask * grad * factor. The same launch adds up the parts of the column sums.
Tensor masked(const View& view, const Tensor& grad, const Mask& mask, double factor, ScalarType dtype,
              const ColumnSums& sums, Launch launch) {
  Tensor out = view.result(grad, dtype);
  check(launch_mask_grad(dtype_of(grad), dtype_of(dtype), view.matrix(grad), view.rows, view.columns, mask, factor,
                         out.mutable_data_ptr(), sums, launch));
  return out;
}

Tensor mask_grad(const Tensor& grad, const Tensor& seed, double p, bool per_column, double factor, ScalarType dtype) {
  check_seed(seed);
  const OnDevice device(grad);
  const View view(grad);
  return masked(view, grad, view.mask(seed, p, per_column), factor, dtype, {}, device.launch);
}

Output linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& target,
              const std::optional<Tensor>& bias, const Tensor& seed, double p, bool per_column, bool one_pass,
              bool tf32, bool gathers, bool /*fixed_size*/) {
  check_linear(input, weight, target, bias, seed);
  const OnDevice device(weight);
  const ScalarType dtype = input.scalar_type();
  const View view = view_of(weight, target, per_column);
  const Mixing mixing = mixing_of(view, weight, target, seed, p, per_column);
  const Tensor rows = rows_of(input, weight.size(1));
  std::optional<Gathered> gathered;
  if (gathers) gathered.emplace(rows, mixing.mask.capacity);
  const Gather gather = gathered ? gathered->gather : Gather{};
  std::optional<Tensor> index, columns;
  if (gathered) index = gathered->index, columns = gathered->columns;

  const Matrix x = matrix_of(rows);
  if (!one_pass || !takes_one_pass(mixing, x, weight.size(1)))
    return {library_linear(input, mixed(view, weight, mixing, dtype, gather, {}, device.launch), bias), index, columns};
  Tensor output = allocate(weight, {rows.size(0), mixing.rows}, dtype);
  const Matrix bias_row = bias ? Matrix{bias->const_data_ptr(), 0, bias->stride(0), false} : Matrix{};
  check(launch_linear(dtype_of(weight), dtype_of(dtype), mixing, x, rows.size(0), bias_row, tf32,
                      output.mutable_data_ptr(), gather, device.launch));
  return {shaped_as(input, output), index, columns};
}

// dW under an input mask: the library's product of the kept columns of x with dY, spread into the dense dW. The launch
// that spreads it adds up the parts of the column sums.
Tensor expanded(const View& view, const Tensor& columns, const Tensor& grad, const Tensor& index, const Tensor& weight,
                double factor, const ColumnSums& sums, Launch launch) {
  const Tensor compact = library_mm(torch::stable::transpose(columns, 0, 1), grad);
  Tensor out = view.result(weight, weight.scalar_type());
  check(launch_expand(dtype_of(compact), dtype_of(out), matrix_of(compact),
                      static_cast<const int32_t*>(index.const_data_ptr()), index.numel(), weight.size(0),
                      weight.size(1), view.transposed, factor, out.mutable_data_ptr(), sums, launch));
  return out;
}

// dYᵀ X (N, K), laid out in memory as the view has it.
Tensor full_product(const View& view, const Tensor& grad, const Tensor& x) {
  const auto product = [](const Tensor& a, const Tensor& b) {
    return library_mm(torch::stable::transpose(a, 0, 1), b);
  };
  return view.transposed ? torch::stable::transpose(product(x, grad), 0, 1) : product(grad, x);
}

Gradients linear_backward(const Tensor& grad_output, const std::optional<Tensor>& input,
                          const std::optional<Tensor>& kept_index, const std::optional<Tensor>& kept_columns,
                          const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed,
                          bool needs_input, bool needs_weight, bool needs_bias, double p, bool per_column,
                          double factor, bool one_pass, bool tf32, bool in_full_product) {
  check_linear_backward(grad_output, input, kept_index, kept_columns, weight, target, seed, needs_weight);
  const OnDevice device(weight);
  const ScalarType dtype = grad_output.scalar_type();
  const View view = view_of(weight, target, per_column);
  const Mixing mixing = mixing_of(view, weight, target, seed, p, per_column);
  const Tensor grad = rows_of(grad_output, weight.size(0));
  std::optional<Tensor> x;
  if (needs_weight && input) x = rows_of(*input, weight.size(1));
  std::optional<Gathered> gathered;
  if (x && !in_full_product) gathered.emplace(*x, mixing.mask.capacity);
  const Gather gather = gathered ? gathered->gather : Gather{};

  std::optional<Tensor> grad_input, grad_weight, grad_bias;
  const Matrix dy = matrix_of(grad);
  const bool input_in_one_pass = one_pass && takes_one_pass(mixing, dy, weight.size(0));
  const bool mixes = needs_input && !input_in_one_pass;
  // db is summed within two of the other launches where there are two; the library's sum is one launch more.
  std::optional<Summed> summed;
  if (needs_bias && needs_weight && (mixes || gathered)) summed.emplace(grad);
  const ColumnSums sums = summed ? summed->sums : ColumnSums{};
  if (needs_bias) grad_bias = summed ? summed->out : sum_of_rows(grad);

  if (needs_input && input_in_one_pass) {
    Tensor out = allocate(weight, {grad.size(0), mixing.columns}, dtype);
    check(launch_grad_input(dtype_of(weight), dtype_of(dtype), mixing, dy, grad.size(0), tf32, out.mutable_data_ptr(),
                            device.launch));
    grad_input = shaped_as(grad_output, out);
  } else if (needs_input) {
    grad_input =
        shaped_as(grad_output, library_mm(grad, mixed(view, weight, mixing, dtype, gather, sums, device.launch)));
  }
  if (gathered && !mixes) check(launch_gather(dtype_of(dtype), mixing.mask, gather, sums, device.launch));

  if (x && in_full_product)
    grad_weight =
        masked(view, full_product(view, grad, *x), mixing.mask, factor, weight.scalar_type(), sums, device.launch);
  else if (needs_weight)
    grad_weight = expanded(view, gathered ? gathered->columns : *kept_columns, grad,
                           gathered ? gathered->index : *kept_index, weight, factor, sums, device.launch);
  return {grad_input, grad_weight, grad_bias};
}

} // namespace

STABLE_TORCH_LIBRARY(mixout_fast_cuda, m) {
  m.def("why_no_kernels() -> str");
  m.def(mix_schema);
  m.def(mask_grad_schema);
  m.def(linear_schema);
  m.def(linear_backward_schema);
}

STABLE_TORCH_LIBRARY_IMPL(mixout_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("why_no_kernels", TORCH_BOX(&why_no_kernels_here));
}

STABLE_TORCH_LIBRARY_IMPL(mixout_fast_cuda, MIXOUT_DEVICE, m) {
  m.impl("mix", TORCH_BOX(&mix));
  m.impl("mask_grad", TORCH_BOX(&mask_grad));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

} // namespace mixout_fast::cuda
