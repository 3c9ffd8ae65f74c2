// The operators on CPU tensors: checks, allocation, threads and the choice of instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../library.h"
#include "kernels.h"

namespace mixout_fast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__x86_64__)
// What oneDNN's environment variable may forbid, and with it PyTorch's products in 16 bits.
enum class Products { bf16, fp16, amx };

// The variable names the widest instruction set that oneDNN may use; it ignores names that it does not know.
bool onednn_may_use(Products products) {
  constexpr std::string_view without_bf16[] = {
      "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"};
  constexpr std::string_view without_fp16[] = {"AVX512_CORE_BF16"};
  constexpr std::string_view without_amx[] = {"AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2"};
  const char* variable = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (!variable || !*variable) variable = std::getenv("DNNL_MAX_CPU_ISA"); // its older name
  std::string limit = variable ? variable : "";
  for (char& letter : limit) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
  const auto is_one_of = [&](const auto& names) { return std::ranges::find(names, limit) != std::end(names); };
  return !(is_one_of(without_bf16) || (products != Products::bf16 && is_one_of(without_fp16)) ||
           (products == Products::amx && is_one_of(without_amx)));
}

// For features of the processor that some compilers' __builtin_cpu_supports has no names for.
bool has_feature(int bit) {
  uint32_t eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx >> bit & 1;
}
constexpr int amx_bf16 = 22, avx512_fp16 = 23, amx_tile = 24;

bool has_bf16_products() { return __builtin_cpu_supports("avx512bf16") && onednn_may_use(Products::bf16); }

// AVX-512, with the instructions that this processor has for bf16 products.
const InstructionSet& choose_avx512() {
  if (!has_bf16_products() || !__builtin_cpu_supports("avx512vbmi2")) return avx512::instruction_set;
#if defined(__linux__)
  // Linux lets a process use the tile registers once it has asked for them.
  constexpr int request = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, which headers older than Linux 5.16 lack
  if (has_feature(amx_bf16) && has_feature(amx_tile) && onednn_may_use(Products::amx) &&
      syscall(SYS_arch_prctl, request, tile_data) == 0)
    return avx512::with_amx;
#endif
  return avx512::with_bf16;
}
#endif

// The widest instruction set of this processor, or a narrower one where ATen's environment variable asks for it; ATen
// ignores other values.
const InstructionSet& choose_instruction_set() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = variable ? variable : "";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && limit != "avx2" && limit != "default") return choose_avx512();
  if (has_avx2 && limit != "default") return avx2::instruction_set;
#endif
  return baseline::instruction_set;
}

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose_instruction_set();
  return chosen;
}

// Whether the library lacks instructions for products of a 16-bit dtype, which then take many times as long as in fp32.
bool multiplies_in_fp32([[maybe_unused]] ScalarType dtype) {
#if defined(__x86_64__)
  static const bool has_bf16 = has_bf16_products();
  static const bool has_fp16 = has_feature(avx512_fp16) && onednn_may_use(Products::fp16);
  return (dtype == ScalarType::BFloat16 && !has_bf16) || (dtype == ScalarType::Half && !has_fp16);
#else
  return false;
#endif
}

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// rows weight^T + bias, computed in fp32 and rounded once to the matrices' own dtype. Calls linear.out: for the plain
// linear, autocast would narrow the operands again.
Tensor linear_in_fp32(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  const auto widened = [](const Tensor& tensor) { return torch::stable::to(tensor, ScalarType::Float); };
  std::optional<Tensor> wide_bias;
  if (bias) wide_bias = widened(*bias);
  std::array<StableIValue, 4> stack{from(widened(rows)), from(widened(weight)), from(wide_bias),
                                    from(allocate({rows.size(0), weight.size(0)}, ScalarType::Float))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::to(torch::stable::detail::to<Tensor>(stack[0]), rows.scalar_type());
}

// The library's product, in whichever dtype is faster.
Tensor product(const Tensor& a, const Tensor& b) {
  return multiplies_in_fp32(a.scalar_type()) ? linear_in_fp32(a, transposed(b), std::nullopt) : library_mm(a, b);
}

Tensor linear_product(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (!multiplies_in_fp32(input.scalar_type())) return library_linear(input, weight, bias);
  return shaped_as(input, linear_in_fp32(rows_of(input, weight.size(1)), weight, bias));
}

const Kernels& kernels_of(ScalarType operand, ScalarType result) {
  const Kernels* kernels = instruction_set().kernels(kernel_dtype<Dtype>(operand), kernel_dtype<Dtype>(result));
  STD_TORCH_CHECK(kernels, "dtype: a result may be of the operand's dtype, or float32 with bfloat16 or float16");
  return *kernels;
}

// (N, K), or (N, K, R) seen as (N, K * R).
Matrix matrix_of(const Tensor& tensor) {
  if (tensor.dim() == 2) return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
  STD_TORCH_CHECK(tensor.dim() == 3, "takes 2 or 3 dimensions");
  // With R = 1 the last stride can be anything: in channels_last it is K.
  if (tensor.size(2) == 1) return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
  STD_TORCH_CHECK(tensor.stride(1) == tensor.size(2) * tensor.stride(2) || tensor.size(1) <= 1,
                  "the last two of three dimensions must be laid out as one");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(2)};
}

int64_t repeats_of(const Tensor& tensor) { return tensor.dim() == 3 ? tensor.size(2) : 1; }

// A mask and its memory: an input mask is drawn here, an element mask where it is used.
struct DrawnMask {
  std::vector<uint32_t> keep, alike;
  Mask mask;
  int64_t kept = 0;

  DrawnMask(const DrawnMask&) = delete; // `mask` points into `keep`
  DrawnMask(const Tensor& seed, double p, bool per_column, int64_t columns, int64_t repeats = 1) {
    const uint64_t key = *static_cast<const uint64_t*>(seed.const_data_ptr());
    mask = {nullptr, nullptr, key, threshold_of(p)};
    if (!per_column) return;
    const int64_t capacity = capacity_of(columns, p);
    keep.resize(columns);
    instruction_set().draw(key, mask.threshold, 0, columns, keep.data());
    for (uint32_t flag : keep) kept += flag & 1;
    for (int64_t k = columns - 1; kept > capacity; --k) {
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

  // The same mask by row, for a transposed matrix of `columns` columns.
  Mask by_row(int64_t columns) {
    alike.assign(2 * columns, 0);
    std::fill_n(alike.begin(), columns, ~0u);
    return {alike.data(), keep.data(), mask.seed, mask.threshold};
  }

  // The kept columns' numbers, ascending, padded with -1 to `size`.
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

Mixing mixing_of(const Tensor& weight, const std::optional<Tensor>& target, double p, const Mask& mask) {
  const int64_t columns = weight.size(1) * repeats_of(weight);
  const Matrix target_matrix = target ? matrix_of(*target) : Matrix{nullptr, 0, 0};
  return {matrix_of(weight), target_matrix, weight.size(0), columns, scale_of(p), mask};
}

// W and U of a layer, their mask and mixing. Where W and U are column-major, as in GPT-2's Conv1D, and the mask is an
// input mask, the kernels work on the row-major transposes (K, N) with a mask by row: dX's kernel then computes y, and
// y's kernel dX.
struct Layer {
  int64_t outputs, in_features;
  bool is_transposed;
  Tensor weight; // (K, N) where is_transposed
  DrawnMask drawn;
  Mixing mixing;

  Layer(const Tensor& w, const std::optional<Tensor>& u, const Tensor& seed, double p, bool per_column)
      : outputs(w.size(0)), in_features(w.size(1)), is_transposed(per_column && is_column_major(w, u)),
        weight(is_transposed ? transposed(w) : w), drawn(seed, p, per_column, in_features) {
    if (is_transposed) mixing = mixing_of(weight, u ? std::optional(transposed(*u)) : u, p, drawn.by_row(outputs));
    else mixing = mixing_of(weight, u, p, drawn.mask);
  }

  // The (N, K) view of a matrix that is laid out as `weight` is.
  Tensor by_outputs(const Tensor& matrix) const { return is_transposed ? transposed(matrix) : matrix; }
};

// One thread's part of the work.
struct Slice {
  int64_t begin, end, slices;
  // `count` items are split only at multiples of `unit`.
  int64_t first(int64_t count, int64_t unit = 1) const { return round_up(count, unit) / unit * begin / slices * unit; }
  int64_t last(int64_t count, int64_t unit = 1) const {
    return std::min(round_up(count, unit) / unit * end / slices * unit, count);
  }
};

// Into how many parts the rows of a product are split where there are more slices than panels of outputs: a divisor of
// `slices`, and few enough that mixing does not take longer than multiplying. bf16 products compute 32 outputs at once,
// so that 48 take as long as 64; with 16-bit entries a slice therefore has two panels. With 16 threads, y at
// 2048x768x768 in bf16 then takes 13.1 ms of CPU time, and 16.4 with slices of one panel (in fp32 25.9 and 24.8).
int64_t rows_split(int64_t slices, int64_t rows, int64_t outputs, int64_t entry_bytes) {
  const int64_t width = entry_bytes == 2 ? 2 * panel_outputs : panel_outputs;
  const int64_t panels = (outputs + width - 1) / width;
  const int64_t most = std::max<int64_t>(rows / 128, 1);
  int64_t parts = std::min((slices + panels - 1) / panels, most);
  while (slices % parts && parts < most) ++parts;
  while (slices % parts) --parts;
  return parts;
}

// Each slice gets at least this much memory traffic: moving it (about 3 us at 20 GB/s) is faster than waking a thread.
constexpr int64_t bytes_per_slice = 64 * 1024;

template <typename Function>
void in_slices(int64_t bytes, const Function& function) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t slices = std::clamp<int64_t>(bytes / bytes_per_slice, 1, threads);
  std::atomic<bool> out_of_memory = false; // parallel_for would report an exception as one of its own
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    try {
      function(Slice{begin, end, slices});
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "out of memory: no room for a thread's copies of operands and sums");
}

int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }

Tensor allocate_like(const Tensor& tensor, ScalarType dtype) { return torch::stable::empty(tensor.sizes(), dtype); }

Tensor masked(const Tensor& grad, const Mask& mask, double factor, ScalarType dtype) {
  const Matrix matrix = matrix_of(grad);
  const int64_t rows = grad.size(0), columns = grad.size(1) * repeats_of(grad);
  const Kernels& kernels = kernels_of(grad.scalar_type(), dtype);
  Tensor out = allocate_like(grad, dtype);
  void* data = out.mutable_data_ptr();
  in_slices(2 * bytes_of(grad), [&](Slice slice) {
    kernels.mask_grad(matrix, columns, mask, factor, slice.first(rows), slice.last(rows), data);
  });
  return out;
}

Tensor mask_grad(const Tensor& grad, const Tensor& seed, double p, bool per_column, double factor, ScalarType dtype) {
  check_seed(seed);
  const DrawnMask drawn(seed, p, per_column, grad.size(1), repeats_of(grad));
  return masked(grad, drawn.mask, factor, dtype);
}

void gather_rows(const Tensor& rows, const Tensor& index, const Tensor& columns, Slice slice) {
  const int64_t m = rows.size(0);
  instruction_set().gather(matrix_of(rows), rows.element_size(), static_cast<const int32_t*>(index.const_data_ptr()),
                           index.numel(), slice.first(m), slice.last(m), columns.mutable_data_ptr());
}

// W'. `beside`, which moves bytes_beside bytes, runs in the same slices.
template <typename Function>
Tensor mixed(const Tensor& weight, const Mixing& mixing, ScalarType dtype, int64_t bytes_beside,
             const Function& beside) {
  const Kernels& kernels = kernels_of(weight.scalar_type(), dtype);
  Tensor out = allocate_like(weight, dtype);
  void* data = out.mutable_data_ptr();
  in_slices(3 * bytes_of(out) + bytes_beside, [&](Slice slice) {
    kernels.mix(mixing, slice.first(mixing.rows), slice.last(mixing.rows), data);
    beside(slice);
  });
  return out;
}

Tensor mix(const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed, double p, bool per_column,
           ScalarType dtype) {
  check_seed(seed);
  check_target(weight, target);
  const DrawnMask drawn(seed, p, per_column, weight.size(1), repeats_of(weight));
  return mixed(weight, mixing_of(weight, target, p, drawn.mask), dtype, 0, [](Slice) {});
}

// The product of rows (m, terms) with W'^T or W', plus `bias`, reading W and U once and writing no W'. `kernel` is
// Kernels::times_transposed or Kernels::times; `beside`, which moves bytes_beside bytes, runs in the same slices.
template <typename Kernel, typename Function>
Tensor one_pass(const Tensor& rows, const Mixing& mixing, int64_t outputs, const std::optional<Tensor>& bias,
                Kernel kernel, int64_t bytes_beside, const Function& beside) {
  const int64_t m = rows.size(0);
  Tensor out = allocate({m, outputs}, rows.scalar_type());
  STD_TORCH_CHECK(rows.size(1) > 0 && outputs > 0, "weight: empty");
  char* data = static_cast<char*>(out.mutable_data_ptr());
  STD_TORCH_CHECK(!bias || bias->is_contiguous(), "bias: must be contiguous");
  const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
  const int64_t size = rows.element_size();
  // Each thread's kernel makes its own copy of what is not laid out in rows; many rows are copied here, once.
  const Tensor left = rows.stride(1) == 1 || m <= few_rows ? rows : torch::stable::contiguous(rows);
  const Matrix x = matrix_of(left);
  const int64_t bytes = 2 * mixing.rows * mixing.columns * size + bytes_of(rows) + bytes_of(out);
  // 16-bit rows that our kernels multiply in fp32 (fp16 always, bf16 where the processor has no products of it) are
  // processed in groups of rows and outputs: each thread keeps a group's copy and sums in fp32.
  const bool in_groups = rows.scalar_type() == ScalarType::Half || multiplies_in_fp32(rows.scalar_type());
  const int64_t group_rows = in_groups ? 512 : m, group_outputs = in_groups ? 4096 : outputs;
  in_slices(bytes + bytes_beside, [&](Slice slice) {
    beside(slice);
    if (m == 0) return;
    // Threads divide up the outputs, so that W' is mixed once, and the rows only where the outputs are too few.
    const int64_t row_parts = rows_split(slice.slices, m, outputs, size);
    for (int64_t i = slice.begin; i < slice.end; ++i) {
      const Slice of_rows{i % row_parts, i % row_parts + 1, row_parts};
      const Slice of_outputs{i / row_parts, i / row_parts + 1, slice.slices / row_parts};
      const int64_t last = of_rows.last(m), last_output = of_outputs.last(outputs, output_unit);
      for (int64_t first = of_rows.first(m); first < last; first += group_rows) {
        const char* row = static_cast<const char*>(x.data) + first * x.row_stride * size;
        for (int64_t output = of_outputs.first(outputs, output_unit); output < last_output; output += group_outputs)
          kernel(mixing, {row, x.row_stride, x.column_stride}, std::min(group_rows, last - first), m, output,
                 std::min(output + group_outputs, last_output), bias_data, data + first * outputs * size);
      }
    }
  });
  return out;
}

Output linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& target,
              const std::optional<Tensor>& bias, const Tensor& seed, double p, bool per_column, bool in_one_pass,
              bool /*tf32*/, bool gathers, bool fixed_size) {
  check_linear(input, weight, target, bias, seed);
  const ScalarType dtype = input.scalar_type();
  const Layer layer(weight, target, seed, p, per_column);
  const Tensor rows = rows_of(input, layer.in_features);

  std::optional<Tensor> index, columns;
  if (gathers) {
    const int64_t width = fixed_size ? capacity_of(layer.in_features, p) : layer.drawn.kept;
    index = layer.drawn.indices(width);
    columns = allocate({rows.size(0), width}, dtype);
  }
  const int64_t gathered_bytes = gathers ? bytes_of(rows) : 0;
  const auto gather = [&](Slice slice) {
    if (gathers) gather_rows(rows, *index, *columns, slice);
  };

  if (in_one_pass) {
    const Kernels& kernels = kernels_of(weight.scalar_type(), dtype);
    const auto kernel = layer.is_transposed ? kernels.times : kernels.times_transposed;
    const Tensor output = one_pass(rows, layer.mixing, layer.outputs, bias, kernel, gathered_bytes, gather);
    return {shaped_as(input, output), index, columns};
  }
  const Tensor mixed_weight = layer.by_outputs(mixed(layer.weight, layer.mixing, dtype, gathered_bytes, gather));
  return {linear_product(input, mixed_weight, bias), index, columns};
}

// THIN_OUTPUT of mixout_fast/reference.py.
constexpr int64_t thin_output = 16;

// The kept columns of x, padded with columns of zeros where they are few: see THIN_OUTPUT there.
Tensor filled_up(const Tensor& columns) {
  constexpr int64_t width = thin_output;
  const int64_t m = columns.size(0), count = columns.size(1);
  if (count == 0 || count >= width) return columns;
  Tensor filled = allocate({m, width}, columns.scalar_type());
  int32_t index[width];
  for (int64_t j = 0; j < width; ++j) index[j] = j < count ? static_cast<int32_t>(j) : -1;
  instruction_set().gather(matrix_of(columns), columns.element_size(), index, width, 0, m, filled.mutable_data_ptr());
  return filled;
}

// dW under an input mask: the library's product of the kept columns of x with dY, spread into the dense dW.
Tensor expanded(const Layer& layer, const Tensor& kept_columns, const Tensor& grad, const Tensor& index,
                double factor) {
  const Tensor columns = filled_up(kept_columns), weight = layer.weight;
  // (C, N) where few columns of many rows are kept: at 2048x768x768, p = 0.9, fp32 takes 1.25 ms, and 1.48 as (N, C),
  // with the expansion; bf16's product alone takes 0.36 and 0.53. Otherwise (N, C), which takes as long there and
  // expands without a transpose.
  const bool columns_first = layer.is_transposed || (columns.size(0) > 256 && 2 * columns.size(1) < layer.in_features);
  Tensor compact = columns_first ? product(transposed(columns), grad) : product(transposed(grad), columns);
  if (!columns_first) compact = transposed(compact);
  const Kernels& kernels = kernels_of(compact.scalar_type(), weight.scalar_type());
  const auto expand = layer.is_transposed ? kernels.expand_rows : kernels.expand;
  const Matrix matrix = matrix_of(compact);
  Tensor out = allocate_like(weight, weight.scalar_type());
  void* data = out.mutable_data_ptr();
  const int32_t* indices = static_cast<const int32_t*>(index.const_data_ptr());
  const int64_t rows = out.size(0);
  in_slices(bytes_of(out) + bytes_of(compact), [&](Slice slice) {
    expand(matrix, indices, index.numel(), out.size(1), factor, slice.first(rows), slice.last(rows), data);
  });
  return layer.by_outputs(out);
}

// dW under either mask: the library's product of all of x with dY, then masked.
Tensor masked_product(const Layer& layer, const Tensor& x, const Tensor& grad, double factor) {
  const Tensor dense = layer.is_transposed ? product(transposed(x), grad) : product(transposed(grad), x);
  return layer.by_outputs(masked(dense, layer.mixing.mask, factor, layer.weight.scalar_type()));
}

// Whether the numbers are below `end` and each is larger than the one before it.
bool ascend(const int32_t* numbers, int64_t count, int64_t end) {
  bool ascends = count == 0 || (numbers[0] >= 0 && numbers[count - 1] < end);
  for (int64_t j = 1; j < count; ++j) ascends &= numbers[j - 1] < numbers[j];
  return ascends;
}

Gradients linear_backward(const Tensor& grad_output, const std::optional<Tensor>& input,
                          const std::optional<Tensor>& kept_index, const std::optional<Tensor>& kept_columns,
                          const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed,
                          bool needs_input, bool needs_weight, bool needs_bias, double p, bool per_column,
                          double factor, bool in_one_pass, bool /*tf32*/, bool in_full_product) {
  check_linear_backward(grad_output, input, kept_index, kept_columns, weight, target, seed, needs_weight);
  const Layer layer(weight, target, seed, p, per_column);
  const int64_t outputs = layer.outputs, in_features = layer.in_features;
  const ScalarType dtype = grad_output.scalar_type();
  const Tensor grad = rows_of(grad_output, outputs);
  const int64_t m = grad.size(0);
  std::optional<Tensor> x;
  if (needs_weight && input) x = rows_of(*input, in_features);

  const Kernels& of_weight = kernels_of(dtype, weight.scalar_type());
  const bool in_kernel = needs_weight && per_column && of_weight.grad_weight && outputs >= thin_output;
  const bool is_full = x && in_full_product && !in_kernel, gathers = x && !is_full && !in_kernel;
  // The kept columns: of x, or those that forward gathered.
  std::optional<Tensor> index = kept_index, columns = kept_columns;
  if (x && !is_full) index = layer.drawn.indices(layer.drawn.kept);
  const int32_t* indices = index ? static_cast<const int32_t*>(index->const_data_ptr()) : nullptr;
  const int64_t kept = index ? kept_count(indices, index->numel()) : 0;
  STD_TORCH_CHECK(ascend(indices, kept, in_features), "index: takes ascending numbers of columns, then -1");
  if (gathers) columns = allocate({m, kept}, dtype);
  KeptX kept_x;
  std::optional<Tensor> staged;
  if (in_kernel) {
    kept_x = {matrix_of(x ? *x : *columns), m, x ? indices : nullptr, kept};
    staged = allocate({round_up(m, staged_unit), round_up(kept + 1, staged_unit)}, dtype);
  }
  // x is gathered or staged for dW in dX's slices.
  const int64_t bytes_beside = gathers ? bytes_of(*x) : staged ? bytes_of(*staged) : 0;
  const auto beside = [&](Slice slice) {
    if (gathers) gather_rows(*x, *index, *columns, slice);
    if (staged)
      of_weight.stage_kept(kept_x, slice.first(m, staged_unit), slice.last(m, staged_unit), staged->mutable_data_ptr());
  };

  std::optional<Tensor> grad_input, grad_weight, grad_bias;
  if (needs_input) {
    const Kernels& kernels = kernels_of(weight.scalar_type(), dtype);
    const auto kernel = layer.is_transposed ? kernels.times_transposed : kernels.times;
    const Tensor matrix =
        in_one_pass ? one_pass(grad, layer.mixing, in_features, std::nullopt, kernel, bytes_beside, beside)
                    : product(grad, layer.by_outputs(mixed(layer.weight, layer.mixing, dtype, bytes_beside, beside)));
    grad_input = shaped_as(grad_output, matrix);
  } else {
    in_slices(bytes_beside, beside);
  }

  if (in_kernel) {
    grad_weight = allocate_like(layer.weight, weight.scalar_type());
    if (needs_bias) grad_bias = allocate({outputs}, dtype);
    in_slices(bytes_of(*grad_weight) + bytes_of(grad), [&](Slice slice) {
      of_weight.grad_weight(kept_x, staged->const_data_ptr(), matrix_of(grad), outputs, indices, in_features, factor,
                            slice.first(outputs, output_unit), slice.last(outputs, output_unit), layer.is_transposed,
                            grad_weight->mutable_data_ptr(), grad_bias ? grad_bias->mutable_data_ptr() : nullptr);
    });
    return {grad_input, layer.by_outputs(*grad_weight), grad_bias};
  }
  if (is_full) grad_weight = masked_product(layer, *x, grad, factor);
  else if (needs_weight) grad_weight = expanded(layer, *columns, grad, *index, factor);
  if (needs_bias) grad_bias = sum_of_rows(grad);
  return {grad_input, grad_weight, grad_bias};
}

std::string instruction_set_name() { return instruction_set().name; }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mixout_fast, CPU, m) {
  m.impl("mix", TORCH_BOX(&mix));
  m.impl("mask_grad", TORCH_BOX(&mask_grad));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

STABLE_TORCH_LIBRARY_IMPL(mixout_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&instruction_set_name));
  m.impl("cpu_multiplies_in_fp32", TORCH_BOX(&multiplies_in_fp32));
}

} // namespace mixout_fast::cpu
