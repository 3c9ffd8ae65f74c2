// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the mask drawn from it.
// One source for the CPU and CUDA: mixout_fast/reference.py says the same in PyTorch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define MIXOUT_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MIXOUT_INLINE inline __attribute__((always_inline))
#else
#define MIXOUT_INLINE inline
#endif

namespace mixout_fast {

struct Words {
  uint32_t word[4];
};

MIXOUT_INLINE Words philox4x32_10(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = Words{{
        static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
        static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
        static_cast<uint32_t>(product0),
    }};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// The words of mask entries 4 * group … 4 * group + 3.
MIXOUT_INLINE Words mask_words(uint64_t seed, uint64_t group) {
  const Words counter{{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0, 0}};
  return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// threshold is round(p * 2^32) in [0, 2^32]: at 2^32 (p = 1) no entry is kept.
MIXOUT_INLINE bool is_kept(uint32_t word, uint64_t threshold) {
  return word >= threshold;
}

} // namespace mixout_fast
