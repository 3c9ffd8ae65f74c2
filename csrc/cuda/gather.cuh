// The kept columns of x, gathered by blocks of the kernels that mix or multiply.
#pragma once

#include "masks.cuh"

namespace mixout_fast::cuda {
namespace {

// Gathers rows [block * warps * gather_rows_per_warp, ...) of the kept columns; block 0 also writes the index. Element
// has the size of x's elements.
template <typename Element>
__device__ void gather_block(const Gather& gather, const Mask& mask, int64_t block, GatherScratch& scratch) {
  auto& [bits, list] = scratch;
  const int lane = lane_of_thread(), thread = threadIdx.x;
  const int64_t first_row = (block * warps + warp_of_thread()) * gather_rows_per_warp;
  const int64_t last_row =
      first_row + gather_rows_per_warp < gather.rows ? first_row + gather_rows_per_warp : gather.rows;
  const Element* x = static_cast<const Element*>(gather.x.data);
  Element* out = static_cast<Element*>(gather.out);
  // How many loads a lane has in flight. All precede their stores, because the compiler keeps a load behind a store
  // through another pointer. With two rows at a time, mix_kernel spills or takes more than the 64 registers that 4
  // blocks an SM leave it.
  constexpr int depth = sizeof(Element) == 8 ? 4 : 8;
  Mask unbounded = mask;
  unbounded.capacity = mask.entries;
  const uint64_t seed = *mask.seed;
  int64_t before = 0;
  for (int64_t start = 0; start < gather.columns && before < gather.capacity; start += gather_chunk) {
    draw(unbounded, seed, start, gather_chunk, bits);
    uint32_t word = start + 32 * thread < gather.columns ? bits.keep[thread] : 0;
    int inclusive = __popc(word);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(whole_warp, inclusive, distance);
      if (lane >= distance) inclusive += below;
    }
    if (lane == 31) bits.sums[warp_of_thread()] = inclusive;
    __syncthreads();
    int slot = inclusive - __popc(word), kept = 0;
#pragma unroll
    for (int warp = 0; warp < warps; ++warp) {
      slot += warp < warp_of_thread() ? bits.sums[warp] : 0;
      kept += bits.sums[warp];
    }
    for (; word; word &= word - 1) list[slot++] = static_cast<uint16_t>(32 * thread + __ffs(word) - 1);
    __syncthreads();
    if (kept > gather.capacity - before) kept = static_cast<int>(gather.capacity - before);
    if (first_row == 0)
      for (int j = lane; j < kept; j += 32) gather.index[before + j] = static_cast<int32_t>(start + list[j]);
#pragma unroll 1
    for (int64_t row = first_row; row < last_row; ++row) {
      const Element* from = x + row * gather.x.row_stride + start * gather.x.column_stride;
      Element* to = out + row * gather.capacity + before;
#pragma unroll 1
      for (int first = lane; first < kept; first += 32 * depth) {
        Element entries[depth];
#pragma unroll
        for (int i = 0; i < depth; ++i)
          entries[i] = first + 32 * i < kept ? from[list[first + 32 * i] * gather.x.column_stride] : Element{};
#pragma unroll
        for (int i = 0; i < depth; ++i)
          if (first + 32 * i < kept) to[first + 32 * i] = entries[i];
      }
    }
    before += kept;
    __syncthreads();
  }
  for (int64_t j = before + lane; j < gather.capacity; j += 32) {
    if (first_row == 0) gather.index[j] = -1;
    for (int64_t row = first_row; row < last_row; ++row) out[row * gather.capacity + j] = Element{};
  }
}

template <typename T>
using Element = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

MIXOUT_INLINE int64_t gather_blocks(const Gather& gather) {
  if (!gather.index) return 0;
  const int64_t blocks = blocks_of(gather.rows, warps * gather_rows_per_warp);
  return blocks > 0 ? blocks : 1;
}

} // namespace
} // namespace mixout_fast::cuda
