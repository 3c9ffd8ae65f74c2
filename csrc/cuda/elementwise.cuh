// W' and mask * grad.
#pragma once

#include "column_sums.cuh"
#include "gather.cuh"
#include "masks.cuh"

namespace mixout_fast::cuda {
namespace {

// Which entries of a lane's part are kept.
template <int width, bool neurons_are_rows>
struct Kept {
  const Mask& mask;
  const Part<width>& part;
  const uint64_t seed;
  uint32_t drawn = 0; // by the whole block. Bit j: is column + j kept, or neurons_are_rows, bit i * warps: is row(i)

  __device__ Kept(const Mask& mask, uint64_t seed, const Part<width>& part, MaskBits<strip_entries>& bits)
      : mask(mask), part(part), seed(seed) {
    if constexpr (neurons_are_rows) {
      static_assert(warps * mix_rows == 32);
      draw(mask, seed, part.first_row - warp_of_thread(), 32, bits);
      drawn = bits.keep[0] >> warp_of_thread();
    } else if (!mask.per_element) {
      const bool once = mask.repeats == 1;
      const int64_t first = once ? part.strip : part.strip / mask.repeats;
      const int64_t last = once ? part.strip + 32 * width : blocks_of(part.strip + 32 * width, mask.repeats);
      draw(mask, seed, first, last - first, bits);
      drawn = column_keep_bits<width>(mask, bits.keep, first, part.column);
    }
  }

  // Whether row(i) can have kept entries, as far as the block's own draw tells; W is not read where it has none.
  __device__ bool any(int i) const { return !neurons_are_rows || drawn >> i * warps & 1; }

  // Bit j: is column + j of row(i) kept.
  __device__ uint32_t bits(int i, int64_t columns) const {
    if (neurons_are_rows) return any(i) ? ~0u : 0;
    if (!mask.per_element) return drawn;
    return element_keep_bits<width>(seed, mask.threshold, part.row(i) * columns + part.column);
  }
};

// W'. The gather and the parts of the sums take longest, and so have the first blocks. Rounding fp32 to 16 bits needs
// 90 and more registers: without a least number of blocks (0), the compiler uses 80 on sm_90a and spills.
template <typename Operand, typename Result, bool neurons_are_rows>
__global__ void __launch_bounds__(threads, sizeof(Operand) > sizeof(Result) ? 2 : 0)
    mix_kernel(Mixing mixing, Result* out, Gather gather, int64_t gathers, ColumnSums sums, int64_t others) {
  using T = Compute<Operand>;
  constexpr int width = lane_columns<Operand, Result>;
  __shared__ Scratch<strip_entries, sum_rows_bytes> scratch;
  const Mask& mask = mixing.mask;
  if (blockIdx.x < gathers) return gather_block<Element<Result>>(gather, mask, blockIdx.x, scratch.gather);
  if (blockIdx.x < others) return sum_rows_block<Result>(sums, blockIdx.x - gathers, scratch.partial);
  // Read first, because most of what follows waits for it.
  const uint64_t seed = *mask.seed;
  const Part<width> part(mixing.columns, blockIdx.x - others);
  const int64_t column = part.column;
  const Kept<width, neurons_are_rows> kept(mask, seed, part, scratch.mask);
  Operand weight[mix_rows][width], target[mix_rows][width];
#pragma unroll
  for (int i = 0; i < mix_rows; ++i) {
    const int64_t row = part.row(i), valid = row < mixing.rows ? mixing.columns - column : 0;
    load_row<false>(mixing.weight, row, column, kept.any(i) ? valid : 0, weight[i]);
    load_row<false>(mixing.target, row, column, valid, target[i]);
  }
#pragma unroll
  for (int i = 0; i < mix_rows; ++i) {
    const int64_t row = part.row(i);
    if (row >= mixing.rows || column >= mixing.columns) break;
    const uint32_t keep = kept.bits(i, mixing.columns);
    Result mixed[width];
#pragma unroll
    for (int j = 0; j < width; ++j)
      mixed[j] = narrow<Result>(
          mix_entry<T>(widen(weight[i][j]), widen(target[i][j]), static_cast<T>(mixing.scale), keep >> j & 1));
    store_row(out, row, mixing.columns, column, mixed);
  }
}

// mask * grad * factor, in parts as in mix_kernel. The first blocks add up the parts of the column sums.
template <typename Operand, typename Result, bool neurons_are_rows>
__global__ void __launch_bounds__(threads)
    mask_grad_kernel(Matrix grad, int64_t rows, int64_t columns, Mask mask, double factor, Result* out, ColumnSums sums,
                     int64_t sum_blocks) {
  using T = Compute<Operand>;
  constexpr int width = lane_columns<Operand, Result>;
  __shared__ MaskBits<strip_entries> bits;
  if (blockIdx.x < sum_blocks) return sum_parts_block<Operand>(sums, blockIdx.x);
  const uint64_t seed = *mask.seed;
  const Part<width> part(columns, blockIdx.x - sum_blocks);
  const int64_t column = part.column;
  const Kept<width, neurons_are_rows> kept(mask, seed, part, bits);
  Operand values[mix_rows][width];
#pragma unroll
  for (int i = 0; i < mix_rows; ++i) {
    const int64_t row = part.row(i);
    load_row<false>(grad, row, column, row < rows && kept.any(i) ? columns - column : 0, values[i]);
  }
#pragma unroll
  for (int i = 0; i < mix_rows; ++i) {
    const int64_t row = part.row(i);
    if (row >= rows || column >= columns) break;
    const uint32_t keep = kept.bits(i, columns);
    Result scaled[width];
#pragma unroll
    for (int j = 0; j < width; ++j)
      scaled[j] = narrow<Result>(keep >> j & 1 ? multiply(widen(values[i][j]), static_cast<T>(factor)) : T{0});
    store_row(out, row, columns, column, scaled);
  }
}

} // namespace
} // namespace mixout_fast::cuda
