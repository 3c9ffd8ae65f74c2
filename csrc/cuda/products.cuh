// y = x W'^T + bias and dx = dy W' in one pass over W and U.
#pragma once

#include "gather.cuh"
#include "masks.cuh"

namespace mixout_fast::cuda {
namespace {

// A warp of a product has 8 * outputs outputs: rows of W' or, transposed, its columns. With g = lane / 4 and
// t = lane % 4, a lane has the `outputs` outputs of its g at the `depth` places of the sum of its t: 8 neighbouring
// entries of each of 2 rows of W' or, transposed, 4 of each of 4 rows.
template <bool transposed>
struct Share {
  static constexpr int outputs = transposed ? 4 : 2;
  static constexpr int depth = transposed ? 4 : 8;
};

// The row of x, and the output among its g's, to which one of a lane's sums belongs.
struct Place {
  int row, output;
};

// How a warp multiplies up to max_rows rows of x on tensor cores.
template <typename Value, typename Multiply, bool transposed>
struct TensorCores : Share<transposed> {
  using Result = Value;
  using Sum = float;
  using Share<transposed>::outputs, Share<transposed>::depth;
  static constexpr int max_rows = 64;
  static constexpr int lanes_a_sum = 1; // tensor cores sum over the lanes of a g
  static constexpr int sums = max_rows / 8 * outputs / 2 * 4;
  static constexpr int registers = depth * sizeof(Value) / 4;

  static __device__ __forceinline__ void pack(const Value (&values)[depth], uint32_t (&packed)[registers]) {
#pragma unroll
    for (int i = 0; i < registers; ++i)
      if constexpr (sizeof(Value) == 2) {
        packed[i] = values[2 * i].bits | static_cast<uint32_t>(values[2 * i + 1].bits) << 16;
      } else {
        packed[i] = round_to_tf32(values[i]);
      }
  }

  // load_x(row, values) loads the lane's places of a row of x.
  template <typename LoadX>
  static __device__ __forceinline__ void multiply(const Value (&weights)[outputs][depth], int rows, LoadX load_x,
                                                  Sum (&sum)[sums]) {
    uint32_t a[outputs][registers];
#pragma unroll
    for (int o = 0; o < outputs; ++o) pack(weights[o], a[o]);
    // The loads of `loaded` tiles wait for memory together; with all 8 tiles, y's kernel spills.
    constexpr int loaded = 4;
#pragma unroll
    for (int first = 0; first < max_rows / 8; first += loaded) {
      if (8 * first >= rows) break;
      Value x[loaded][depth];
#pragma unroll
      for (int i = 0; i < loaded; ++i) load_x(8 * (first + i) + lane_of_thread() / 4, x[i]);
#pragma unroll
      for (int tile = first; tile < first + loaded; ++tile) {
        uint32_t b[registers];
        pack(x[tile - first], b);
#pragma unroll
        for (int o = 0; o < outputs; o += 2)
#pragma unroll
          for (int i = 0; i < registers; i += 2)
            Multiply{}(&sum[(tile * outputs + o) * 2], {{a[o][i], a[o + 1][i], a[o][i + 1], a[o + 1][i + 1]}},
                       {{b[i], b[i + 1]}});
      }
    }
  }

  static __device__ __forceinline__ Place place(int i, int lane) {
    return {i / (2 * outputs) * 8 + 2 * (lane % 4) + i % 2, i / 4 % (outputs / 2) * 2 + i / 2 % 2};
  }
};

// The same by fused multiply-adds in IEEE fp32 and fp64.
template <typename Value, bool transposed>
struct FusedMultiplyAdd : Share<transposed> {
  using Result = Value;
  using Sum = Value;
  using Share<transposed>::outputs, Share<transposed>::depth;
  static constexpr int max_rows = 16;
  static constexpr int lanes_a_sum = 4; // the lanes of a g each sum over their own places
  static constexpr int sums = max_rows * outputs;

  template <typename LoadX>
  static __device__ __forceinline__ void multiply(const Value (&weights)[outputs][depth], int rows, LoadX load_x,
                                                  Sum (&sum)[sums]) {
    // The loads of `loaded` rows wait for memory together; with 2 rows of fp64, y's kernel spills on sm_100.
    constexpr int loaded = sizeof(Value) == 4 ? 4 : 1;
#pragma unroll
    for (int first = 0; first < max_rows; first += loaded) {
      if (first >= rows) break;
      Value x[loaded][depth];
#pragma unroll
      for (int r = 0; r < loaded; ++r) load_x(first + r, x[r]);
#pragma unroll
      for (int r = 0; r < loaded; ++r)
#pragma unroll
        for (int o = 0; o < outputs; ++o) {
          Sum& total = sum[(first + r) * outputs + o];
#pragma unroll
          for (int i = 0; i < depth; ++i) total = fma(weights[o][i], x[r][i], total);
        }
    }
  }

  static __device__ __forceinline__ Place place(int i, int) { return {i / outputs, i % outputs}; }
};

struct Product {
  Mixing mixing;
  Matrix x;
  int64_t m;
  Matrix bias;
  void* out;
  int64_t tiles;  // of the outputs
  int64_t chunks; // of x's rows
};

// x W'^T, or x W' where transposed, with W' mixed in registers. A block has a tile of the outputs and a chunk of x's
// rows; its warps divide up the terms of the sums, whose parts are then added in a fixed order.
template <typename Operand, typename Engine, bool transposed>
__global__ void __launch_bounds__(threads, sizeof(Operand) == 2 && !transposed ? 2 : 1)
    product_kernel(Product product, Gather gather) {
  using Result = typename Engine::Result;
  using Sum = typename Engine::Sum;
  using T = Compute<Operand>;
  constexpr int outputs = Engine::outputs, depth = Engine::depth, sums = Engine::sums;
  __shared__ Scratch<one_pass_columns, 32 * 1024> scratch;
  const Mixing& mixing = product.mixing;
  const Mask& mask = mixing.mask;
  if constexpr (!transposed) {
    const int64_t blocks = product.tiles * product.chunks;
    if (blockIdx.x >= blocks) return gather_block<Element<Result>>(gather, mask, blockIdx.x - blocks, scratch.gather);
  }
  const int lane = lane_of_thread(), warp = warp_of_thread(), g = lane / 4, t = lane % 4;
  const int64_t first_output = blockIdx.x / product.chunks * 8 * outputs;
  const int64_t first_row = blockIdx.x % product.chunks * Engine::max_rows;
  const int rows =
      static_cast<int>(product.m - first_row < Engine::max_rows ? product.m - first_row : Engine::max_rows);
  const int64_t length = transposed ? mixing.rows : mixing.columns;
  uint32_t keep = 0;
  if (!mask.per_element) {
    // The seed is read wherever it is used: kept in registers, it makes mixing fp32 into 16 bits take 154 of them on
    // sm_80, not 122.
    draw(mask, *mask.seed, transposed ? first_output : 0, transposed ? 8 * outputs : mixing.columns, scratch.mask);
    if (transposed) keep = scratch.mask.keep[0] >> 4 * g;
  }
  Sum sum[sums] = {};
#pragma unroll 1
  for (int64_t step = int64_t{4} * depth * warp; step < length; step += 4 * depth * warps) {
    const int64_t place = step + depth * t;
    constexpr int lines = transposed ? depth : outputs, width = transposed ? outputs : depth;
    const int64_t column = transposed ? first_output + outputs * g : place;
    Operand weight[lines][width], target[lines][width];
#pragma unroll
    for (int i = 0; i < lines; ++i) {
      const int64_t row = transposed ? place + i : first_output + g + 8 * i;
      const int64_t valid = row < mixing.rows ? mixing.columns - column : 0;
      load_row<true>(mixing.weight, row, column, valid, weight[i]);
      load_row<true>(mixing.target, row, column, valid, target[i]);
    }
    if (!transposed && !mask.per_element)
      keep = column < mixing.columns ? scratch.mask.keep[column / 32] >> column % 32 : 0;
    Result mixed[outputs][depth];
#pragma unroll
    for (int i = 0; i < lines; ++i) {
      if (mask.per_element) {
        const int64_t row = transposed ? place + i : first_output + g + 8 * i;
        keep = element_keep_bits<width>(*mask.seed, mask.threshold, row * mixing.columns + column);
      }
#pragma unroll
      for (int j = 0; j < width; ++j)
        mixed[transposed ? j : i][transposed ? i : j] = narrow<Result>(
            mix_entry<T>(widen(weight[i][j]), widen(target[i][j]), static_cast<T>(mixing.scale), keep >> j & 1));
    }
    Engine::multiply(
        mixed, rows,
        [&](int row, Result(&x)[depth]) {
          load_row<true>(product.x, first_row + row, place, row < rows ? length - place : 0, x);
        },
        sum);
  }

  // In rounds, each with as many of every thread's sums as shared memory holds.
  constexpr int fitting = sizeof(scratch.partial) / (sizeof(Sum) * threads);
  constexpr int round = sums < fitting ? sums : fitting;
  constexpr int lanes = 32 / Engine::lanes_a_sum;
  Sum* partial = reinterpret_cast<Sum*>(scratch.partial);
  Result* out = static_cast<Result*>(product.out);
  const int64_t stride = transposed ? mixing.columns : mixing.rows;
#pragma unroll
  for (int first = 0; first < sums; first += round) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < round; ++i) partial[i * threads + threadIdx.x] = sum[first + i];
    __syncthreads();
#pragma unroll 1
    for (int item = threadIdx.x; item < round * lanes; item += threads) {
      const int i = item / lanes, summed_lane = item % lanes * Engine::lanes_a_sum;
      const auto [row, which] = Engine::place(first + i, summed_lane);
      const int64_t output =
          first_output + (transposed ? outputs * (summed_lane / 4) + which : summed_lane / 4 + 8 * which);
      if (row >= rows || output >= stride) continue;
      Sum total =
          sum_in_pairs<0, warps * Engine::lanes_a_sum, Engine::lanes_a_sum>(partial + i * threads + summed_lane);
      if (product.bias.data)
        total += widen(static_cast<const Result*>(product.bias.data)[output * product.bias.column_stride]);
      out[(first_row + row) * stride + output] = narrow<Result>(total);
    }
  }
}

} // namespace
} // namespace mixout_fast::cuda
