// A block of 8 warps: its part of a matrix, its shared memory, vector loads and stores of rows, pairwise sums.
#pragma once

#if defined(__CUDACC__)
#include "intrinsics.h"
#else
#include "../tests/emulation.h"
#endif

#include <type_traits>

#include "../mixing.h"
#include "kernels.h"

namespace mixout_fast::cuda {
namespace {

constexpr int warps = 8;
constexpr int threads = 32 * warps;

// The block sizes below follow from 16-byte accesses and from shared memory. None has been measured on a GPU yet.
constexpr int mix_rows = 4; // per warp: a lane has 4 loads of 16 bytes of W and 4 of U in flight
constexpr int gather_rows_per_warp = 2;
constexpr int gather_chunk = 8192; // columns: one word of mask bits per thread
constexpr int expand_rows = 32;
constexpr int expand_columns = 128;

template <typename T>
using Compute = decltype(widen(T{}));

MIXOUT_INLINE constexpr int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Shared memory of a block: MaskBits has a mask's bits and the sums for counting them, GatherScratch what a gather
// needs; Scratch serves kernels that use several of these one after the other.
template <int64_t entries>
struct MaskBits {
  uint32_t keep[entries / 32];
  int sums[warps];
};
struct GatherScratch {
  MaskBits<gather_chunk> mask;
  uint16_t list[gather_chunk];
};
template <int64_t entries, int bytes>
union Scratch {
  MaskBits<entries> mask;
  GatherScratch gather;
  alignas(16) unsigned char partial[bytes];
};

__device__ int lane_of_thread() { return threadIdx.x % 32; }
__device__ int warp_of_thread() { return threadIdx.x / 32; }

// How many columns a lane has: 16 bytes of the narrower type (32 of fp64), and a whole number of Philox blocks of 4.
template <typename Operand, typename Result>
constexpr int lane_columns = sizeof(Operand) == 2 || sizeof(Result) == 2 ? 8 : 4;

// Room for the mask entries of a strip, 32 lanes' columns, which may begin anywhere in a word of the mask's bits.
constexpr int strip_entries = 32 * 8 + 32;

// A lane's part of a matrix in mix_kernel, mask_grad_kernel and expand_rows_kernel: `width` columns of mix_rows rows,
// `warps` rows apart. Consecutive blocks have neighbouring strips of 32 lanes' columns.
template <int width>
struct Part {
  int64_t strip, column, first_row;

  __device__ Part(int64_t columns, int64_t block) {
    const int64_t strips = blocks_of(columns, 32 * width);
    strip = block % strips * 32 * width;
    column = strip + lane_of_thread() * width;
    first_row = block / strips * warps * mix_rows + warp_of_thread();
  }

  // The lane's i-th row.
  __device__ int64_t row(int i) const { return first_row + i * warps; }
};

template <typename Operand, typename Result>
int64_t blocks_of_parts(int64_t rows, int64_t columns) {
  return blocks_of(columns, 32 * lane_columns<Operand, Result>) * blocks_of(rows, warps * mix_rows);
}

// Loads or stores `count` entries of T in accesses of 16 bytes, or of 8 where 16 do not divide them.
template <typename T, int count>
__device__ __forceinline__ void load_vector(const T* source, T (&out)[count]) {
  using Piece = std::conditional_t<sizeof(T) * count % 16 == 0, uint4, uint2>;
  Piece pieces[sizeof(T) * count / sizeof(Piece)];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pieces) / sizeof(Piece)); ++i)
    pieces[i] = reinterpret_cast<const Piece*>(source)[i];
  memcpy(out, pieces, sizeof(out));
}
template <typename T, int count>
__device__ __forceinline__ void store_vector(const T (&values)[count], T* out) {
  uint4 pieces[sizeof(T) * count / 16];
  memcpy(pieces, values, sizeof(values));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pieces) / 16); ++i) store_16_bytes(pieces[i], out + i * 16 / sizeof(T));
}

// Loads entries [column, column + count) of a row, of which the first `valid` exist; the others are 0. `unit` tells the
// compiler that the column stride is 1, for kernels that are short of registers.
template <bool unit, typename T, int count>
__device__ __forceinline__ void load_row(const Matrix& matrix, int64_t row, int64_t column, int64_t valid,
                                         T (&out)[count]) {
  const int64_t stride = unit ? 1 : matrix.column_stride;
  const T* source = static_cast<const T*>(matrix.data) + row * matrix.row_stride + column * stride;
  if (matrix.vectors && valid >= count) {
    load_vector(source, out);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) out[i] = matrix.data && i < valid ? source[i * stride] : T{};
  }
}

// Stores entries [column, column + count) of a row of a row-major matrix of `columns` columns.
template <typename T, int count>
__device__ __forceinline__ void store_row(T* matrix, int64_t row, int64_t columns, int64_t column,
                                          const T (&values)[count]) {
  T* out = matrix + row * columns + column;
  if (columns * sizeof(T) % 16 == 0 && column + count <= columns) {
    store_vector(values, out);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (column + i < columns) out[i] = values[i];
  }
}

// The pairwise sum of parts [first, first + count); each warp has `of_warp` parts, those of its first lanes. Summed one
// by one, 32 parts would have twice the error of the library's sum.
template <int first, int count, int of_warp, typename Sum>
__device__ __forceinline__ Sum sum_in_pairs(const Sum* parts) {
  if constexpr (count == 1) return parts[first / of_warp * 32 + first % of_warp];
  else
    return sum_in_pairs<first, count / 2, of_warp>(parts) + sum_in_pairs<first + count / 2, count / 2, of_warp>(parts);
}

} // namespace
} // namespace mixout_fast::cuda
