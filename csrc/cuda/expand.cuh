// The kept columns or rows of a gradient, spread into the dense gradient.
#pragma once

#include "column_sums.cuh"

namespace mixout_fast::cuda {
namespace {

// slots[i]: the place in `index` of the number `first` + i, or -1. The index ascends: its padding, -1, is the largest
// number as an unsigned one.
template <int places>
__device__ __forceinline__ void find_slots(const int32_t* index, int64_t count, int64_t first,
                                           int32_t (&slots)[places]) {
  static_assert(places <= threads);
  if (threadIdx.x < places) slots[threadIdx.x] = -1;
  __syncthreads();
  // The first wanted entry is in [start, start + spread], which is halved until each thread need read at most two
  // entries. Each halving waits for a read from memory; short indices need none.
  int64_t start = 0, spread = count;
  while (spread + places > 2 * threads) {
    const int64_t half = (spread + 1) / 2;
    if (static_cast<uint32_t>(index[start + half - 1]) < first) start += half;
    spread -= half;
  }
  const int64_t end = start + spread + places < count ? start + spread + places : count;
#pragma unroll 1
  for (int64_t j = start + threadIdx.x; j < end; j += threads) {
    const int64_t place = index[j] - first;
    if (place >= 0 && place < places) slots[place] = static_cast<int32_t>(j);
  }
  __syncthreads();
}

// Spreads compact (count, rows) into its columns of out (rows, columns), transposed by way of a tile in shared memory.
// The first blocks add up the parts of the column sums.
template <typename Operand, typename Result>
__global__ void __launch_bounds__(threads)
    expand_kernel(Matrix compact, const int32_t* index, int64_t count, int64_t rows, int64_t columns, double factor,
                  Result* out, ColumnSums sums, int64_t sum_blocks) {
  using T = Compute<Operand>;
  if (blockIdx.x < sum_blocks) return sum_parts_block<Operand>(sums, blockIdx.x);
  const int64_t block = blockIdx.x - sum_blocks;
  constexpr int width = 16 / sizeof(Result);
  constexpr int vectors = expand_columns / width;
  // 16 bytes of padding, so that the vectors that 8 lanes write into their rows are in different banks.
  alignas(16) __shared__ Result tile[expand_rows][expand_columns + width];
  __shared__ int32_t slots[expand_columns];
  const int64_t strips = blocks_of(columns, expand_columns), band = block / strips;
  const int64_t first_column = (block - band * strips) * expand_columns, first_row = band * expand_rows;
  find_slots(index, count, first_column, slots);
  const int lane = lane_of_thread();
  const int64_t row = first_row + lane;
  // A warp's `own` columns. It reads those that are kept, in groups of `depth` loads that wait for memory together.
  constexpr int own = expand_columns / warps, depth = 4;
  const int first = warp_of_thread() * own;
  const Result zeros[own] = {};
  memcpy(&tile[lane][first], zeros, sizeof(zeros));
  const Operand* from = static_cast<const Operand*>(compact.data) + row;
  uint32_t left = __ballot_sync(whole_warp, lane < own && slots[first + lane % own] >= 0);
  if (row >= rows) left = 0;
#pragma unroll 1
  while (left) {
    Operand entries[depth];
    int places[depth];
#pragma unroll
    for (int i = 0; i < depth; ++i) {
      places[i] = first + __ffs(left) - 1;
      entries[i] = left ? from[slots[places[i]] * compact.row_stride] : Operand{};
      if (!left) places[i] = -1;
      left &= left - 1;
    }
#pragma unroll
    for (int i = 0; i < depth; ++i)
      if (places[i] >= 0) tile[lane][places[i]] = narrow<Result>(multiply(widen(entries[i]), static_cast<T>(factor)));
  }
  __syncthreads();
  static_assert(expand_rows * vectors % threads == 0);
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < expand_rows * vectors; i += threads) {
    const int64_t column = first_column + i % vectors * width;
    if (first_row + i / vectors >= rows || column >= columns) continue;
    Result values[width];
    load_vector(&tile[i / vectors][i % vectors * width], values);
    store_row(out, first_row + i / vectors, columns, column, values);
  }
}

// Spreads compact (count, rows) into its rows of out (columns, rows), in parts as in mix_kernel. The first blocks add
// up the parts of the column sums.
template <typename Operand, typename Result>
__global__ void __launch_bounds__(threads)
    expand_rows_kernel(Matrix compact, const int32_t* index, int64_t count, int64_t rows, int64_t columns,
                       double factor, Result* out, ColumnSums sums, int64_t sum_blocks) {
  using T = Compute<Operand>;
  constexpr int width = lane_columns<Operand, Result>;
  if (blockIdx.x < sum_blocks) return sum_parts_block<Operand>(sums, blockIdx.x);
  __shared__ int32_t slots[warps * mix_rows];
  const Part<width> part(rows, blockIdx.x - sum_blocks);
  find_slots(index, count, part.first_row - warp_of_thread(), slots);
  Operand values[mix_rows][width];
#pragma unroll
  for (int i = 0; i < mix_rows; ++i) {
    const int32_t slot = slots[part.row(i) % (warps * mix_rows)];
    load_row<false>(compact, slot, part.column, slot >= 0 ? rows - part.column : 0, values[i]);
  }
#pragma unroll
  for (int i = 0; i < mix_rows; ++i) {
    if (part.row(i) >= columns || part.column >= rows) break;
    Result scaled[width];
#pragma unroll
    for (int j = 0; j < width; ++j) scaled[j] = narrow<Result>(multiply(widen(values[i][j]), static_cast<T>(factor)));
    store_row(out, part.row(i), rows, part.column, scaled);
  }
}

} // namespace
} // namespace mixout_fast::cuda
