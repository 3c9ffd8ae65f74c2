// The CUDA kernels' launchers, in plain C++: ops.cpp checks tensors and allocates, kernels.cu launches.
//
// Every launcher is asynchronous, does not make the host wait, and returns null or why the launch failed. The mask is
// drawn inside each kernel from the seed on the device, so that nothing about it is known on the host.
#pragma once

#include <cstdint>

namespace mixout_fast::cuda {

enum class Dtype { f64, f32, bf16, f16 };

struct Matrix {
  const void* data;   // null: a matrix of zeros
  int64_t row_stride; // in elements
  int64_t column_stride;
  bool vectors; // rows and data start at multiples of 16 bytes and neighbouring columns are neighbours in memory
};

struct Mask {
  const int64_t* seed; // on the device
  uint64_t threshold;
  bool per_element;      // one entry per element, row-major; else one per input neuron, as the fields below say
  bool neurons_are_rows; // a neuron's weights are a row; else `repeats` neighbouring columns
  int64_t entries;
  int64_t capacity; // kept entries past it count as dropped
  int64_t repeats;  // columns that share an entry: the offsets of a convolution's input channel
};

// W' = U + m (W - U) scale.
struct Mixing {
  Matrix weight;
  Matrix target;
  int64_t rows;
  int64_t columns;
  double scale;
  Mask mask;
};

// The kept columns of x (rows, columns) go into out (rows, capacity), and their numbers, ascending and padded with -1,
// into index (capacity,). index null: nothing to gather.
struct Gather {
  Matrix x;
  int64_t rows;
  int64_t columns;
  int64_t capacity;
  int32_t* index;
  void* out;
};

// The sums of x's columns, in two launches: the first sums every rows_a_part rows into a row of `parts` (in fp32, or
// fp64 for an x of fp64), the second sums the parts into out (columns,), of x's type. out null: nothing to sum.
struct ColumnSums {
  Matrix x;
  int64_t rows;
  int64_t columns;
  void* parts;
  void* out;
};
constexpr int64_t rows_a_part = 64; // a block reads 32 KiB of them, as much as a block that mixes

struct Launch {
  void* stream; // a cudaStream_t
  int device;
};

// Null, or why the current device cannot run the kernels: it is older than those that they were compiled for, or newer
// and there is no PTX, or its driver is too old for this runtime.
const char* why_no_kernels();

// W' into out (rows, columns). The same launch gathers and computes the sums' parts; both their x have the result's
// type.
const char* launch_mix(Dtype operand, Dtype result, const Mixing& mixing, void* out, const Gather& gather,
                       const ColumnSums& sums, Launch launch);

// mask * grad * factor into out (rows, columns). The same launch adds up the parts of the column sums, whose x is of
// grad's type.
const char* launch_mask_grad(Dtype operand, Dtype result, Matrix grad, int64_t rows, int64_t columns, const Mask& mask,
                             double factor, void* out, const ColumnSums& sums, Launch launch);

// launch_mix with nothing to mix: only the gather and the parts of the column sums.
const char* launch_gather(Dtype dtype, const Mask& mask, const Gather& gather, const ColumnSums& sums, Launch launch);

// One pass over W and U that writes no W'. Neighbouring columns of W, U and x are neighbours in memory, and neurons are
// not rows. launch_linear: out (m, rows) = x W'^T + bias; bias.data is null for none. launch_grad_input: out (m,
// columns) = x W'. x is of the result's type; tf32 allows fp32 products to round their operands.
const char* launch_linear(Dtype operand, Dtype result, const Mixing& mixing, Matrix x, int64_t m, Matrix bias,
                          bool tf32, void* out, const Gather& gather, Launch launch);
const char* launch_grad_input(Dtype operand, Dtype result, const Mixing& mixing, Matrix x, int64_t m, bool tf32,
                              void* out, Launch launch);
// The most columns that launch_linear accepts: their mask is held in shared memory, one bit each.
constexpr int64_t one_pass_columns = 1 << 18;

// Spreads compact (count, rows) into out: column index[j] of out (rows, columns) or, by_rows, row index[j] of out
// (columns, rows) is compact's row j times factor; the others are 0. Neighbouring columns of compact are neighbours in
// memory. The same launch adds up the parts of the column sums, whose x is of compact's type.
const char* launch_expand(Dtype operand, Dtype result, Matrix compact, const int32_t* index, int64_t count,
                          int64_t rows, int64_t columns, bool by_rows, double factor, void* out, const ColumnSums& sums,
                          Launch launch);

} // namespace mixout_fast::cuda
