// Masks, drawn where they are used: Philox costs less than a second launch or a pass over memory.
#pragma once

#include "block.cuh"

namespace mixout_fast::cuda {
namespace {

// Bit i: is entry 4 * group + i kept.
__device__ __forceinline__ uint32_t keep_bits(uint64_t seed, uint64_t threshold, uint64_t group) {
  const Words<uint32_t> words = mask_words(seed, group);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(is_kept(words.word[i], threshold)) << i;
  return bits;
}

// Bit i: is entry first + i of an element mask kept.
template <int count>
__device__ __forceinline__ uint32_t element_keep_bits(uint64_t seed, uint64_t threshold, uint64_t first) {
  static_assert(count % 4 == 0);
  const uint64_t group = first / 4;
  const int offset = first % 4;
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < count / 4; ++i) bits |= keep_bits(seed, threshold, group + i) << 4 * i;
  if (offset) bits |= keep_bits(seed, threshold, group + count / 4) << count;
  return bits >> offset;
}

// The block's sum of `value`, returned to every thread; `sums` has room for one int per warp.
__device__ int block_sum(int value, int* sums) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(whole_warp, value, distance);
  if (lane_of_thread() == 0) sums[warp_of_thread()] = value;
  __syncthreads();
  int sum = 0;
#pragma unroll
  for (int warp = 0; warp < warps; ++warp) sum += sums[warp];
  return sum;
}

// Draws entries [first, first + count) of an input mask: entry k is bit k % 32 of keep[k / 32 - first / 32]. Bits of
// entries that do not exist are 0.
template <int64_t entries>
__device__ void draw(const Mask& mask, uint64_t seed, int64_t first, int64_t count, MaskBits<entries>& drawn) {
  auto& [keep, sums] = drawn;
  const int64_t last = first + count < mask.entries ? first + count : mask.entries;
  // Where more entries could be kept than the capacity, those before `first` are counted too.
  const bool counts = mask.capacity < last;
  const int lane = lane_of_thread();
  int kept = 0;
  for (int64_t base = (counts ? 0 : first / 32 * 8) + 32 * warp_of_thread(); 4 * base < last; base += threads) {
    const int64_t left = last - 4 * (base + lane);
    uint32_t bits = left > 0 ? keep_bits(seed, mask.threshold, base + lane) : 0;
    if (left < 4 && left > 0) bits &= (1u << left) - 1;
    kept += __popc(bits);
    if (4 * (base + 32) <= first) continue; // counted, not wanted
    uint32_t word = bits << 4 * (lane % 8);
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) word |= __shfl_xor_sync(whole_warp, word, distance);
    const int64_t slot = (base + lane) / 8 - first / 32;
    if (lane % 8 == 0 && left > 0 && slot >= 0) keep[slot] = word;
  }
  if (counts) {
    // Less than once in 1e8 masks there is an excess: one thread drops the last kept entries.
    int64_t excess = block_sum(kept, sums) - mask.capacity;
    if (threadIdx.x == 0)
      for (int64_t k = last - 1; k >= first && excess > 0; --k) {
        uint32_t& word = keep[k / 32 - first / 32];
        excess -= word >> k % 32 & 1;
        word &= ~(1u << k % 32);
      }
  }
  __syncthreads();
}

// Bit i: is column + i kept, of a mask drawn from `first` on.
template <int count>
__device__ __forceinline__ uint32_t column_keep_bits(const Mask& mask, const uint32_t* keep, int64_t first,
                                                     int64_t column) {
  const int64_t base = first / 32;
  if (mask.repeats == 1) return column < mask.entries ? keep[column / 32 - base] >> column % 32 : 0;
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int64_t entry = (column + i) / mask.repeats;
    if (entry < mask.entries) bits |= (keep[entry / 32 - base] >> entry % 32 & 1) << i;
  }
  return bits;
}

} // namespace
} // namespace mixout_fast::cuda
