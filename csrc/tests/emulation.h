// Emulates a GPU on the CPU, for tests: what csrc/cuda/kernels.cu uses of CUDA, so that the kernels' index arithmetic,
// masks and barriers can be checked where there is no GPU. Blocks run one after the other, in a random order, and find
// huge numbers in shared memory. A thread is a fibre that runs until it waits; threads take turns in a random order. So
// a read of shared memory before it is written, for instance because a barrier is missing, shows as a wrong result.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "../mixing.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time. The library has no other thread-local memory, so that fill_shared_memory finds all of it.
#define __shared__ static thread_local

// Set and read by tests, through tests/cuda_emulation.py.
extern "C" {
__attribute__((visibility("default"))) int64_t capacity_limit = INT64_MAX; // see csrc/library.h
__attribute__((visibility("default"))) int64_t launches = 0;
}

namespace mixout_fast::cuda {

struct Index {
  unsigned x;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline Index threadIdx, blockIdx;
constexpr unsigned whole_warp = 0xFFFFFFFF;

namespace emulation {

constexpr int block_threads = 256;
constexpr size_t stack_bytes = 256 * 1024;

// Threads that wait for each other; the last to arrive acts for all, on what each of them brought.
struct Meeting {
  int size = 0, arrived = 0;
  uint64_t met = 0;
  void* brought[block_threads] = {};
};

class Block {
public:
  Block() : stacks(block_threads * stack_bytes) {
    for (int i = 0; i < block_threads; ++i) {
      ucontext_t& fibre = start[i];
      getcontext(&fibre);
      fibre.uc_stack.ss_sp = stacks.data() + i * stack_bytes;
      fibre.uc_stack.ss_size = stack_bytes;
      fibre.uc_link = nullptr;
      makecontext(&fibre, &Block::live, 0);
    }
  }

  void run(const std::function<void()>& kernel) {
    body = &kernel;
    block.size = block_threads;
    for (Meeting& warp : warps) warp.size = 32;
    std::fill(done, done + block_threads, false);
    int order[block_threads];
    for (int i = 0; i < block_threads; ++i) order[i] = i;
    uint64_t seen = 0;
    for (int left = block_threads; left > 0;) {
      std::shuffle(order, order + block_threads, random);
      for (int i : order)
        if (!done[i]) left -= turn(i);
      if (progress == seen) fail("threads wait for others that have ended");
      seen = progress;
    }
  }

  template <typename Act>
  void meet(Meeting& meeting, int place, void* brought, const Act& act) {
    meeting.brought[place] = brought;
    const uint64_t met = meeting.met;
    ++progress;
    if (++meeting.arrived == meeting.size) {
      act(meeting.brought);
      meeting.arrived = 0;
      ++meeting.met;
      return;
    }
    while (meeting.met == met) wait();
  }

  Meeting block, warps[block_threads / 32];

private:
  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "emulated block %u: %s\n", blockIdx.x, what);
    std::abort();
  }

  // Lets thread i run until it waits or ends; returns whether it ended.
  bool turn(int i) {
    current = i;
    threadIdx.x = i;
    if (_setjmp(scheduler) == 0) {
      if (alive[i]) _longjmp(fibres[i], 1);
      alive[i] = true;
      setcontext(&start[i]);
    }
    return done[i];
  }

  void wait() {
    if (_setjmp(fibres[current]) == 0) _longjmp(scheduler, 1);
  }

  static void live();

  const std::function<void()>* body = nullptr;
  std::vector<char> stacks;
  ucontext_t start[block_threads];
  jmp_buf fibres[block_threads], scheduler;
  bool alive[block_threads] = {}, done[block_threads] = {};
  int current = 0;
  uint64_t progress = 0;
  std::mt19937 random{0};
};

// Called for each loaded library: fills this one's thread-local memory with numbers that are huge, or NaN in fp16.
inline int fill_shared_memory(dl_phdr_info* library, size_t, void*) {
  Dl_info own;
  dladdr(&launches, &own);
  if (own.dli_fbase != reinterpret_cast<void*>(library->dlpi_addr) || !library->dlpi_tls_data) return 0;
  for (int i = 0; i < library->dlpi_phnum; ++i)
    if (library->dlpi_phdr[i].p_type == PT_TLS)
      std::memset(library->dlpi_tls_data, 0x7F, library->dlpi_phdr[i].p_memsz);
  return 1;
}

inline Block& the_block() {
  static Block block;
  return block;
}

inline void Block::live() {
  Block& block = the_block();
  for (;;) {
    (*block.body)();
    block.done[block.current] = true;
    ++block.progress;
    block.wait();
  }
}

template <typename Act>
void meet_warp(void* brought, const Act& act) {
  const unsigned thread = threadIdx.x;
  the_block().meet(the_block().warps[thread / 32], thread % 32, brought, act);
}

// Every lane gets the value of lane source(lane).
template <typename T, typename Source>
T exchange(T value, const Source& source) {
  struct {
    T given, taken;
  } mine{value, value};
  using Mine = decltype(mine);
  meet_warp(&mine, [&](void** brought) {
    for (int lane = 0; lane < 32; ++lane)
      static_cast<Mine*>(brought[lane])->taken = static_cast<Mine*>(brought[source(lane)])->given;
  });
  return mine.taken;
}

} // namespace emulation

inline void __syncthreads() {
  const unsigned thread = threadIdx.x;
  emulation::the_block().meet(emulation::the_block().block, thread, nullptr, [](void**) {});
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulation::exchange(value, [=](int lane) { return lane ^ distance; });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  return emulation::exchange(value, [=](int lane) { return lane < distance ? lane : lane - distance; });
}
inline uint32_t __ballot_sync(unsigned, bool vote) {
  struct {
    bool vote;
    uint32_t votes;
  } mine{vote, 0};
  using Mine = decltype(mine);
  emulation::meet_warp(&mine, [](void** brought) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= uint32_t{static_cast<Mine*>(brought[lane])->vote} << lane;
    for (int lane = 0; lane < 32; ++lane) static_cast<Mine*>(brought[lane])->votes = votes;
  });
  return mine.votes;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }

inline void store_16_bytes(uint4 value, void* out) { *static_cast<uint4*>(out) = value; }

struct FragmentA {
  uint32_t part[4];
};
struct FragmentB {
  uint32_t part[2];
};

namespace emulation {

// mma.m16n8k16, or k8 for tf32, in the layout of the PTX manual: element i of a register is at k =
// per_register * t + i, and 4 * per_register further for the upper half of the registers.
template <typename Element>
void multiply(float* c, const FragmentA& a, const FragmentB& b) {
  constexpr int per_register = 4 / sizeof(Element), depth = 8 * per_register;
  struct Lane {
    float* c;
    const FragmentA* a;
    const FragmentB* b;
  } mine{c, &a, &b};
  meet_warp(&mine, [&](void** brought) {
    static float left[16][depth], right[depth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& from = *static_cast<Lane*>(brought[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int part = 0; part < 4; ++part) {
        Element elements[per_register];
        memcpy(elements, &from.a->part[part], 4);
        for (int i = 0; i < per_register; ++i)
          left[g + 8 * (part % 2)][part / 2 * depth / 2 + per_register * t + i] = widen(elements[i]);
        if (part > 1) continue;
        memcpy(elements, &from.b->part[part], 4);
        for (int i = 0; i < per_register; ++i) right[part * depth / 2 + per_register * t + i][g] = widen(elements[i]);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* sum = static_cast<Lane*>(brought[lane])->c;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < depth; ++k) sum[i] += left[row][k] * right[k][column];
      }
    }
  });
}

} // namespace emulation

struct MultiplyBfloat16 {
  void operator()(float* c, FragmentA a, FragmentB b) const { emulation::multiply<bfloat16>(c, a, b); }
};
struct MultiplyFloat16 {
  void operator()(float* c, FragmentA a, FragmentB b) const { emulation::multiply<float16>(c, a, b); }
};
struct MultiplyTf32 {
  void operator()(float* c, FragmentA a, FragmentB b) const { emulation::multiply<float>(c, a, b); }
};

inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  return (bits & 0x7F800000) == 0x7F800000 ? bits : (bits + 0x1000) & 0xFFFFE000;
}

template <typename... Parameters>
const char* why_no_kernel(void (*)(Parameters...)) {
  return nullptr;
}

template <typename... Parameters>
const char* launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, void*, int,
                          Parameters... parameters) {
  if (threads != emulation::block_threads) return "the emulation has blocks of 256 threads";
  if (blocks < 1 || blocks > 0x7FFFFFFF) return "invalid configuration argument";
  ++launches;
  const std::function<void()> body = [&] { kernel(parameters...); };
  static std::mt19937 random{0};
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned block : order) {
    blockIdx.x = block;
    dl_iterate_phdr(emulation::fill_shared_memory, nullptr);
    emulation::the_block().run(body);
  }
  return nullptr;
}

} // namespace mixout_fast::cuda
