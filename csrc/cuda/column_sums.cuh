// The sums of x's columns, computed by additional blocks of other kernels.
#pragma once

#include "block.cuh"

namespace mixout_fast::cuda {
namespace {

// The bytes of a block's partial sums: for 16-bit dtypes a float for each of a lane's 8 columns; others need half.
constexpr int sum_rows_bytes = 8 * sizeof(float) * threads;

// One part, of rows_a_part rows, of the sums of 32 lanes' columns. Two rows at a time: with four, bf16's mix_kernel
// spills on sm_90a.
template <typename Value>
__device__ void sum_rows_block(const ColumnSums& sums, int64_t block, unsigned char* scratch) {
  using T = Compute<Value>;
  constexpr int width = 16 / sizeof(Value);
  const int64_t strips = blocks_of(sums.columns, 32 * width), part = block / strips;
  const int64_t first_column = block % strips * 32 * width, column = first_column + lane_of_thread() * width;
  T sum[width] = {};
#pragma unroll 1
  for (int first = 0; first < rows_a_part; first += 2 * warps) {
    Value values[2][width];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = part * rows_a_part + first + i * warps + warp_of_thread();
      load_row<false>(sums.x, row, column, row < sums.rows ? sums.columns - column : 0, values[i]);
    }
#pragma unroll
    for (int i = 0; i < 2 * width; ++i) sum[i % width] += widen(values[i / width][i % width]);
  }
  T* partial = reinterpret_cast<T*>(scratch);
#pragma unroll
  for (int j = 0; j < width; ++j) partial[j * threads + threadIdx.x] = sum[j];
  __syncthreads();
  const int64_t item = threadIdx.x;
  if (item < 32 * width && first_column + item < sums.columns)
    static_cast<T*>(sums.parts)[part * sums.columns + first_column + item] =
        sum_in_pairs<0, warps, 1>(partial + item % width * threads + item / width);
}

// Adds up the parts of 32 columns' sums: 16 parts at a time, and the results in fp64. Added one by one, their error
// would grow with x's rows. Two loads at a time: with four, expand_kernel takes 38 registers on sm_100, so that an SM
// holds 6 blocks instead of 8.
template <typename Value>
__device__ void sum_parts_block(const ColumnSums& sums, int64_t block) {
  using T = Compute<Value>;
  __shared__ double partial[threads];
  const int64_t parts = blocks_of(sums.rows, rows_a_part), column = block * 32 + lane_of_thread();
  double sum = 0;
  for (int64_t first = warp_of_thread(); first < parts && column < sums.columns; first += 16 * warps) {
    T piece{0};
#pragma unroll 2
    for (int i = 0; i < 16; ++i)
      if (first + i * warps < parts)
        piece += static_cast<const T*>(sums.parts)[(first + i * warps) * sums.columns + column];
    sum += piece;
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (warp_of_thread() == 0 && column < sums.columns)
    static_cast<Value*>(sums.out)[column] =
        narrow<Value>(static_cast<T>(sum_in_pairs<0, warps, 1>(partial + lane_of_thread())));
}

template <typename Value>
int64_t sum_rows_blocks(const ColumnSums& sums) {
  return sums.out ? blocks_of(sums.rows, rows_a_part) * blocks_of(sums.columns, 32 * (16 / sizeof(Value))) : 0;
}

int64_t sum_parts_blocks(const ColumnSums& sums) { return sums.out ? blocks_of(sums.columns, 32) : 0; }

} // namespace
} // namespace mixout_fast::cuda
