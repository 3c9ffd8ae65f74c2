// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the mask drawn from it. One
// source for the CPU and CUDA; mixout_fast/reference.py computes the same in PyTorch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MIXOUT_INLINE __host__ __device__ __forceinline__
#define MIXOUT_UNROLL _Pragma("unroll")
#else
#define MIXOUT_INLINE inline __attribute__((always_inline))
#define MIXOUT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace mixout_fast {

// A word is a uint32_t, or a vector of 64-bit lanes whose low halves are words and whose high halves are anything.
template <typename Word>
struct Words {
  Word word[4];
};

template <typename Word>
struct Product {
  Word high, low;
};

struct MultiplyWords {
  MIXOUT_INLINE Product<uint32_t> operator()(uint32_t multiplier, uint32_t word) const {
    const uint64_t product = uint64_t{multiplier} * word;
    return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
  }
};

template <typename Word, typename Multiply = MultiplyWords>
MIXOUT_INLINE Words<Word> philox4x32_10(Words<Word> counter, uint32_t key0, uint32_t key1,
                                        Multiply multiply_words = {}) {
  MIXOUT_UNROLL
  for (int round = 0; round < 10; ++round) {
    const Product<Word> product0 = multiply_words(0xD2511F53, counter.word[0]);
    const Product<Word> product1 = multiply_words(0xCD9E8D57, counter.word[2]);
    counter = {product1.high ^ counter.word[1] ^ key0, product1.low, product0.high ^ counter.word[3] ^ key1,
               product0.low};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// The words of mask entries 4 * group ... 4 * group + 3; group_low and group_high are the halves of that counter.
template <typename Word, typename Multiply = MultiplyWords>
MIXOUT_INLINE Words<Word> mask_words(uint64_t seed, Word group_low, Word group_high, Multiply multiply_words = {}) {
  const Words<Word> counter{{group_low, group_high, Word{}, Word{}}};
  return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), multiply_words);
}
MIXOUT_INLINE Words<uint32_t> mask_words(uint64_t seed, uint64_t group) {
  return mask_words(seed, static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32));
}

// threshold is round(p * 2^32) in [0, 2^32]: at 2^32 (p = 1) no entry is kept.
MIXOUT_INLINE bool is_kept(uint32_t word, uint64_t threshold) { return word >= threshold; }

} // namespace mixout_fast
