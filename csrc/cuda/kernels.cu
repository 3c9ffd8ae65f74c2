// The CUDA kernels. Compiled by nvcc without fused multiply-adds, so that mixing rounds as mixing.h says; the products
// ask for them by name. csrc/tests/emulation.h compiles the same source for the CPU.
//
// A block has 8 warps. Masks are drawn where they are used: Philox costs less than a second launch or a pass over
// memory.
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
constexpr int mix_rows = 4; // of a warp: 4 loads of 16 bytes each of W and U in flight a lane
constexpr int gather_rows_per_warp = 2;
constexpr int gather_chunk = 8192; // columns, a word of mask bits a thread
constexpr int expand_rows = 32;
constexpr int expand_columns = 128;

template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

MIXOUT_INLINE constexpr int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Shared memory of a block, one use after the other.
union Scratch {
  struct {
    uint32_t keep[one_pass_columns / 32];
    int sums[warps];
  } mask;
  struct {
    uint32_t keep[gather_chunk / 32];
    int sums[warps];
    uint16_t list[gather_chunk];
  } gather;
  alignas(16) unsigned char partial[32 * 1024];
};

__device__ int lane_of_thread() { return threadIdx.x % 32; }
__device__ int warp_of_thread() { return threadIdx.x / 32; }

// `count` entries of T in accesses of 16 bytes, or 8 where they are no more.
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

// Entries [column, column + count) of a row, of which the first `valid` exist; the others are 0. Unit: neighbouring
// columns are neighbours in memory, as the compiler should know where registers are short.
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

// The same entries of a row-major matrix of `columns` columns.
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

// The sum over the block, for every thread; sums holds one int a warp.
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

// Draws entries [first, first + count) of an input mask: that of entry k is bit k % 32 of keep[k / 32 - first / 32].
// Bits of entries that do not exist are 0.
__device__ void draw(const Mask& mask, int64_t first, int64_t count, uint32_t* keep, int* sums) {
  const uint64_t seed = *mask.seed;
  const int64_t last = first + count < mask.entries ? first + count : mask.entries;
  // Where more entries could be kept than the capacity, those before count too.
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
    // Once in 1e8 masks: one thread drops the last kept entries.
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

// Rows [block * warps * gather_rows_per_warp, ...) of the kept columns; block 0 also writes the index. Element has the
// size of x's.
template <typename Element>
__device__ void gather_block(const Gather& gather, const Mask& mask, int64_t block, Scratch& scratch) {
  auto& [keep, sums, list] = scratch.gather;
  const int lane = lane_of_thread(), thread = threadIdx.x;
  const int64_t first_row = (block * warps + warp_of_thread()) * gather_rows_per_warp;
  const int64_t last_row =
      first_row + gather_rows_per_warp < gather.rows ? first_row + gather_rows_per_warp : gather.rows;
  const Element* x = static_cast<const Element*>(gather.x.data);
  Element* out = static_cast<Element*>(gather.out);
  // Loads that a lane has in flight: all before their stores, for the compiler keeps a load behind a store through
  // another pointer. Two rows at a time, mix_kernel spills or takes more than the 64 registers of 4 blocks an SM.
  constexpr int depth = sizeof(Element) == 8 ? 4 : 8;
  Mask unbounded = mask;
  unbounded.capacity = mask.entries;
  int64_t before = 0;
  for (int64_t start = 0; start < gather.columns && before < gather.capacity; start += gather_chunk) {
    draw(unbounded, start, gather_chunk, keep, sums);
    uint32_t word = start + 32 * thread < gather.columns ? keep[thread] : 0;
    int inclusive = __popc(word);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(whole_warp, inclusive, distance);
      if (lane >= distance) inclusive += below;
    }
    if (lane == 31) sums[warp_of_thread()] = inclusive;
    __syncthreads();
    int slot = inclusive - __popc(word), kept = 0;
#pragma unroll
    for (int warp = 0; warp < warps; ++warp) {
      slot += warp < warp_of_thread() ? sums[warp] : 0;
      kept += sums[warp];
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

template <int size>
struct ElementOfSize;
template <>
struct ElementOfSize<2> {
  using type = uint16_t;
};
template <>
struct ElementOfSize<4> {
  using type = uint32_t;
};
template <>
struct ElementOfSize<8> {
  using type = uint64_t;
};
template <typename T>
using Element = typename ElementOfSize<sizeof(T)>::type;

// The sum of parts [first, first + count), of which each warp has `of_warp`, its first lanes'. In pairs: one by one, 32
// would have twice the error of the library's sum.
template <int first, int count, int of_warp, typename Sum>
__device__ __forceinline__ Sum sum_in_pairs(const Sum* parts) {
  if constexpr (count == 1) return parts[first / of_warp * 32 + first % of_warp];
  else
    return sum_in_pairs<first, count / 2, of_warp>(parts) + sum_in_pairs<first + count / 2, count / 2, of_warp>(parts);
}

// One part of the sums of 32 lanes' columns. Two rows at a time: of four, bf16's mix_kernel spills on sm_90a.
template <typename Value>
__device__ void sum_rows_block(const ColumnSums& sums, int64_t block, Scratch& scratch) {
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
  T* partial = reinterpret_cast<T*>(scratch.partial);
#pragma unroll
  for (int j = 0; j < width; ++j) partial[j * threads + threadIdx.x] = sum[j];
  __syncthreads();
  const int64_t item = threadIdx.x;
  if (item < 32 * width && first_column + item < sums.columns)
    static_cast<T*>(sums.parts)[part * sums.columns + first_column + item] =
        sum_in_pairs<0, warps, 1>(partial + item % width * threads + item / width);
}

// 32 columns' sums of their parts, 16 at a time and those in fp64: one by one, the error would grow with x's rows. Two
// loads at a time: with four, expand_kernel takes 38 registers on sm_100, so that an SM holds 6 blocks and not 8.
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

MIXOUT_INLINE int64_t gather_blocks(const Gather& gather) {
  if (!gather.index) return 0;
  const int64_t blocks = blocks_of(gather.rows, warps * gather_rows_per_warp);
  return blocks > 0 ? blocks : 1;
}

// A lane's columns: 16 bytes of the narrower type, and a whole number of Philox blocks.
template <typename Operand, typename Result>
constexpr int lane_columns = sizeof(Operand) == 2 || sizeof(Result) == 2 ? 8 : 4;

// A lane's part of a matrix in mix_kernel, mask_grad_kernel and expand_rows_kernel: `width` columns of mix_rows rows,
// `warps` apart. Blocks stand along strips of 32 lanes' columns.
template <int width>
struct Part {
  int64_t strip, column, first_row;

  __device__ Part(int64_t columns, int64_t block) {
    const int64_t strips = blocks_of(columns, 32 * width);
    strip = block % strips * 32 * width;
    column = strip + lane_of_thread() * width;
    first_row = block / strips * warps * mix_rows + warp_of_thread();
  }

  // The row that a lane takes i-th.
  __device__ int64_t row(int i) const { return first_row + i * warps; }
};

// Which entries of a lane's part are kept.
template <int width, bool neurons_are_rows>
struct Kept {
  const Mask& mask;
  const Part<width>& part;
  uint32_t drawn = 0; // for all the block: bit j: is column + j kept, or bit i * warps: is row(i)

  __device__ Kept(const Mask& mask, const Part<width>& part, Scratch& scratch) : mask(mask), part(part) {
    auto& [keep, sums] = scratch.mask;
    if constexpr (neurons_are_rows) {
      static_assert(warps * mix_rows == 32);
      draw(mask, part.first_row - warp_of_thread(), 32, keep, sums);
      drawn = keep[0] >> warp_of_thread();
    } else if (!mask.per_element) {
      const int64_t first = part.strip / mask.repeats;
      draw(mask, first, blocks_of(part.strip + 32 * width, mask.repeats) - first, keep, sums);
      drawn = column_keep_bits<width>(mask, keep, first, part.column);
    }
  }

  // Whether row(i) has kept entries, as far as all the block knows: W is not read where it has none.
  __device__ bool any(int i) const { return !neurons_are_rows || drawn >> i * warps & 1; }

  // Bit j: is column + j of row(i) kept.
  __device__ uint32_t bits(int i, int64_t columns) const {
    if (neurons_are_rows) return any(i) ? ~0u : 0;
    if (!mask.per_element) return drawn;
    return element_keep_bits<width>(*mask.seed, mask.threshold, part.row(i) * columns + part.column);
  }
};

template <typename Operand, typename Result>
int64_t blocks_of_parts(int64_t rows, int64_t columns) {
  return blocks_of(columns, 32 * lane_columns<Operand, Result>) * blocks_of(rows, warps * mix_rows);
}

// W', and before it, for these take longest, the gather and the parts of sums. Rounded to 16 bits, fp32 needs 90 and
// more registers: left alone (0), the compiler takes 80 on sm_90a and spills.
template <typename Operand, typename Result, bool neurons_are_rows>
__global__ void __launch_bounds__(threads, sizeof(Operand) > sizeof(Result) ? 2 : 0)
    mix_kernel(Mixing mixing, Result* out, Gather gather, int64_t gathers, ColumnSums sums, int64_t others) {
  using T = Compute<Operand>;
  constexpr int width = lane_columns<Operand, Result>;
  __shared__ Scratch scratch;
  const Mask& mask = mixing.mask;
  if (blockIdx.x < gathers) return gather_block<Element<Result>>(gather, mask, blockIdx.x, scratch);
  if (blockIdx.x < others) return sum_rows_block<Result>(sums, blockIdx.x - gathers, scratch);
  const Part<width> part(mixing.columns, blockIdx.x - others);
  const int64_t column = part.column;
  const Kept<width, neurons_are_rows> kept(mask, part, scratch);
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

// mask * grad * factor, laid out as mix_kernel, and before it the sums of parts.
template <typename Operand, typename Result, bool neurons_are_rows>
__global__ void __launch_bounds__(threads)
    mask_grad_kernel(Matrix grad, int64_t rows, int64_t columns, Mask mask, double factor, Result* out, ColumnSums sums,
                     int64_t sum_blocks) {
  using T = Compute<Operand>;
  constexpr int width = lane_columns<Operand, Result>;
  __shared__ Scratch scratch;
  if (blockIdx.x < sum_blocks) return sum_parts_block<Operand>(sums, blockIdx.x);
  const Part<width> part(columns, blockIdx.x - sum_blocks);
  const int64_t column = part.column;
  const Kept<width, neurons_are_rows> kept(mask, part, scratch);
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

// slots[i]: which entry of the index is `first` + i, or -1. The index ascends, -1 being its largest number.
template <int places>
__device__ __forceinline__ void find_slots(const int32_t* index, int64_t count, int64_t first,
                                           int32_t (&slots)[places]) {
  for (int i = threadIdx.x; i < places; i += threads) slots[i] = -1;
  __syncthreads();
  // The first entry wanted stands in [start, start + spread], halved until a thread reads two entries at most: a read
  // waits for memory, and of short indices there is none more.
  int64_t start = 0, spread = count;
  while (spread + places > 2 * threads) {
    const int64_t half = (spread + 1) / 2;
    if (static_cast<uint32_t>(index[start + half - 1]) < first) start += half;
    spread -= half;
  }
  const int64_t end = start + spread + places < count ? start + spread + places : count;
  for (int64_t j = start + threadIdx.x; j < end; j += threads) {
    const int64_t place = index[j] - first;
    if (place >= 0 && place < places) slots[place] = static_cast<int32_t>(j);
  }
  __syncthreads();
}

// compact (count, rows) into its columns of out (rows, columns), through a tile in shared memory that turns it, and
// before it the sums of parts.
template <typename Operand, typename Result>
__global__ void __launch_bounds__(threads)
    expand_kernel(Matrix compact, const int32_t* index, int64_t count, int64_t rows, int64_t columns, double factor,
                  Result* out, ColumnSums sums, int64_t sum_blocks) {
  using T = Compute<Operand>;
  if (blockIdx.x < sum_blocks) return sum_parts_block<Operand>(sums, blockIdx.x);
  const int64_t block = blockIdx.x - sum_blocks;
  constexpr int width = 16 / sizeof(Result);
  constexpr int vectors = expand_columns / width;
  // With 16 bytes more, the vectors that 8 lanes write of their rows are in different banks.
  alignas(16) __shared__ Result tile[expand_rows][expand_columns + width];
  __shared__ int32_t slots[expand_columns];
  const int64_t strips = blocks_of(columns, expand_columns);
  const int64_t first_column = block % strips * expand_columns;
  find_slots(index, count, first_column, slots);
  const int64_t first_row = block / strips * expand_rows;
  const int lane = lane_of_thread();
  const int64_t row = first_row + lane;
  const Operand* from = static_cast<const Operand*>(compact.data) + row;
#pragma unroll 1
  for (int vector = warp_of_thread(); vector < vectors; vector += warps) {
    Operand entries[width];
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const int32_t slot = slots[vector * width + i];
      entries[i] = slot >= 0 && row < rows ? from[slot * compact.row_stride] : Operand{};
    }
    Result values[width];
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = narrow<Result>(multiply(widen(entries[i]), static_cast<T>(factor)));
    memcpy(&tile[lane][vector * width], values, sizeof(values));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < expand_rows * vectors; i += threads) {
    const int64_t column = first_column + i % vectors * width;
    if (first_row + i / vectors >= rows || column >= columns) continue;
    Result values[width];
    load_vector(&tile[i / vectors][i % vectors * width], values);
    store_row(out, first_row + i / vectors, columns, column, values);
  }
}

// compact (count, rows) into its rows of out (columns, rows), laid out as mix_kernel, and before it the sums of parts.
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

// A warp of a product has 8 * outputs outputs, weights' rows or, transposed, their columns. A lane, with g = lane / 4
// and t = lane % 4, has `outputs` of them, g's own, at `depth` places of the sum, t's own: of 2 weight rows 8
// neighbouring entries each, or transposed of 4 rows 4.
template <bool transposed>
struct Share {
  static constexpr int outputs = transposed ? 4 : 2;
  static constexpr int depth = transposed ? 4 : 8;
};

// Which row of x and which of its g's outputs one of a lane's sums belongs to.
struct Place {
  int row, output;
};

// How a warp multiplies up to max_rows rows of x.
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

  // load_x(row, values): the lane's places of that row.
  template <typename LoadX>
  static __device__ __forceinline__ void multiply(const Value (&weights)[outputs][depth], int rows, LoadX load_x,
                                                  Sum (&sum)[sums]) {
    uint32_t a[outputs][registers];
#pragma unroll
    for (int o = 0; o < outputs; ++o) pack(weights[o], a[o]);
    // Their loads wait for memory together; of all 8 tiles, y's kernel spills.
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

// IEEE fp32 and fp64.
template <typename Value, bool transposed>
struct FusedMultiplyAdd : Share<transposed> {
  using Result = Value;
  using Sum = Value;
  using Share<transposed>::outputs, Share<transposed>::depth;
  static constexpr int max_rows = 16;
  static constexpr int lanes_a_sum = 4; // the lanes of a g, each over its own places
  static constexpr int sums = max_rows * outputs;

  template <typename LoadX>
  static __device__ __forceinline__ void multiply(const Value (&weights)[outputs][depth], int rows, LoadX load_x,
                                                  Sum (&sum)[sums]) {
#pragma unroll
    for (int row = 0; row < max_rows; ++row) {
      if (row >= rows) break;
      Value x[depth];
      load_x(row, x);
#pragma unroll
      for (int o = 0; o < outputs; ++o)
#pragma unroll
        for (int i = 0; i < depth; ++i) sum[row * outputs + o] = fma(weights[o][i], x[i], sum[row * outputs + o]);
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

// x W'^T, or x W' where transposed, W' mixed in registers. A block has a tile of the outputs and a chunk of x's rows;
// its warps share out the depth of the sum, and add up in a fixed order.
template <typename Operand, typename Engine, bool transposed>
__global__ void __launch_bounds__(threads, sizeof(Operand) == 2 && !transposed ? 2 : 1)
    product_kernel(Product product, Gather gather) {
  using Result = typename Engine::Result;
  using Sum = typename Engine::Sum;
  using T = Compute<Operand>;
  constexpr int outputs = Engine::outputs, depth = Engine::depth, sums = Engine::sums;
  __shared__ Scratch scratch;
  const Mixing& mixing = product.mixing;
  const Mask& mask = mixing.mask;
  if constexpr (!transposed) {
    const int64_t blocks = product.tiles * product.chunks;
    if (blockIdx.x >= blocks) return gather_block<Element<Result>>(gather, mask, blockIdx.x - blocks, scratch);
  }
  const int lane = lane_of_thread(), warp = warp_of_thread(), g = lane / 4, t = lane % 4;
  const int64_t first_output = blockIdx.x / product.chunks * 8 * outputs;
  const int64_t first_row = blockIdx.x % product.chunks * Engine::max_rows;
  const int rows =
      static_cast<int>(product.m - first_row < Engine::max_rows ? product.m - first_row : Engine::max_rows);
  const int64_t length = transposed ? mixing.rows : mixing.columns;
  uint32_t keep = 0;
  if (!mask.per_element) {
    draw(mask, transposed ? first_output : 0, transposed ? 8 * outputs : mixing.columns, scratch.mask.keep,
         scratch.mask.sums);
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

  // As many of every thread's sums at a time as shared memory holds.
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

template <typename A, typename B>
struct Pair {
  using Operand = A;
  using Result = B;
};

const char* unserved = "a result may be of the operand's dtype, or float32 with bfloat16 or float16";

template <typename Function>
const char* with_types(Dtype operand, Dtype result, Function function) {
  if (operand == Dtype::f64 && result == Dtype::f64) return function(Pair<double, double>{});
  if (operand == Dtype::f32 && result == Dtype::f32) return function(Pair<float, float>{});
  if (operand == Dtype::f32 && result == Dtype::bf16) return function(Pair<float, bfloat16>{});
  if (operand == Dtype::f32 && result == Dtype::f16) return function(Pair<float, float16>{});
  if (operand == Dtype::bf16 && result == Dtype::bf16) return function(Pair<bfloat16, bfloat16>{});
  if (operand == Dtype::f16 && result == Dtype::f16) return function(Pair<float16, float16>{});
  return unserved;
}

// The gradient may also be narrower than the weight.
template <typename Function>
const char* with_gradient_types(Dtype operand, Dtype result, Function function) {
  if (operand == Dtype::bf16 && result == Dtype::f32) return function(Pair<bfloat16, float>{});
  if (operand == Dtype::f16 && result == Dtype::f32) return function(Pair<float16, float>{});
  return with_types(operand, result, function);
}

// CUDA refuses a grid of no blocks: of tensors without entries there is nothing to launch.
template <typename... Parameters>
const char* launch_blocks(void (*kernel)(Parameters...), int64_t blocks, Launch launch,
                          std::type_identity_t<Parameters>... parameters) {
  if (blocks == 0) return nullptr;
  return launch_kernel(kernel, blocks, threads, launch.stream, launch.device, parameters...);
}

template <typename Value>
int64_t sum_rows_blocks(const ColumnSums& sums) {
  return sums.out ? blocks_of(sums.rows, rows_a_part) * blocks_of(sums.columns, 32 * (16 / sizeof(Value))) : 0;
}

int64_t sum_parts_blocks(const ColumnSums& sums) { return sums.out ? blocks_of(sums.columns, 32) : 0; }

template <typename Operand, typename Engine, bool transposed>
const char* launch_product(const Product& product, const Gather& gather, Launch launch) {
  Product tiled = product;
  const Mixing& mixing = product.mixing;
  tiled.tiles = blocks_of(transposed ? mixing.columns : mixing.rows, transposed ? 32 : 16);
  tiled.chunks = blocks_of(product.m, Engine::max_rows);
  return launch_blocks(product_kernel<Operand, Engine, transposed>, tiled.tiles * tiled.chunks + gather_blocks(gather),
                       launch, tiled, gather);
}

template <bool transposed>
const char* multiply(Dtype operand, Dtype result, const Product& product, bool tf32, const Gather& gather,
                     Launch launch) {
  return with_types(operand, result, [&](auto types) {
    using Operand = typename decltype(types)::Operand;
    using Result = typename decltype(types)::Result;
    if constexpr (std::is_same_v<Result, bfloat16>) {
      return launch_product<Operand, TensorCores<bfloat16, MultiplyBfloat16, transposed>, transposed>(product, gather,
                                                                                                      launch);
    } else if constexpr (std::is_same_v<Result, float16>) {
      return launch_product<Operand, TensorCores<float16, MultiplyFloat16, transposed>, transposed>(product, gather,
                                                                                                    launch);
    } else {
      if constexpr (std::is_same_v<Result, float>)
        if (tf32)
          return launch_product<float, TensorCores<float, MultiplyTf32, transposed>, transposed>(product, gather,
                                                                                                 launch);
      return launch_product<Operand, FusedMultiplyAdd<Result, transposed>, transposed>(product, gather, launch);
    }
  });
}

} // namespace

const char* why_no_kernels() { return why_no_kernel(mix_kernel<float, float, false>); }

const char* launch_mix(Dtype operand, Dtype result, const Mixing& mixing, void* out, const Gather& gather,
                       const ColumnSums& sums, Launch launch) {
  return with_types(operand, result, [&](auto types) {
    using Operand = typename decltype(types)::Operand;
    using Result = typename decltype(types)::Result;
    const int64_t mix_blocks = blocks_of_parts<Operand, Result>(mixing.rows, mixing.columns);
    const int64_t gathers = gather_blocks(gather), others = gathers + sum_rows_blocks<Result>(sums);
    return launch_blocks(mixing.mask.neurons_are_rows ? mix_kernel<Operand, Result, true>
                                                      : mix_kernel<Operand, Result, false>,
                         others + mix_blocks, launch, mixing, static_cast<Result*>(out), gather, gathers, sums, others);
  });
}

const char* launch_mask_grad(Dtype operand, Dtype result, Matrix grad, int64_t rows, int64_t columns, const Mask& mask,
                             double factor, void* out, const ColumnSums& sums, Launch launch) {
  return with_gradient_types(operand, result, [&](auto types) {
    using Operand = typename decltype(types)::Operand;
    using Result = typename decltype(types)::Result;
    const int64_t blocks = blocks_of_parts<Operand, Result>(rows, columns);
    const int64_t sum_blocks = sum_parts_blocks(sums);
    return launch_blocks(
        mask.neurons_are_rows ? mask_grad_kernel<Operand, Result, true> : mask_grad_kernel<Operand, Result, false>,
        sum_blocks + blocks, launch, grad, rows, columns, mask, factor, static_cast<Result*>(out), sums, sum_blocks);
  });
}

const char* launch_gather(Dtype dtype, const Mask& mask, const Gather& gather, const ColumnSums& sums, Launch launch) {
  Mixing nothing{};
  nothing.mask = mask;
  return launch_mix(dtype, dtype, nothing, nullptr, gather, sums, launch);
}

const char* launch_linear(Dtype operand, Dtype result, const Mixing& mixing, Matrix x, int64_t m, Matrix bias,
                          bool tf32, void* out, const Gather& gather, Launch launch) {
  return multiply<false>(operand, result, {mixing, x, m, bias, out, 0, 0}, tf32, gather, launch);
}

const char* launch_grad_input(Dtype operand, Dtype result, const Mixing& mixing, Matrix x, int64_t m, bool tf32,
                              void* out, Launch launch) {
  return multiply<true>(operand, result, {mixing, x, m, {}, out, 0, 0}, tf32, {}, launch);
}

const char* launch_expand(Dtype operand, Dtype result, Matrix compact, const int32_t* index, int64_t count,
                          int64_t rows, int64_t columns, bool by_rows, double factor, void* out, const ColumnSums& sums,
                          Launch launch) {
  return with_gradient_types(operand, result, [&](auto types) {
    using Operand = typename decltype(types)::Operand;
    using Result = typename decltype(types)::Result;
    const int64_t blocks = by_rows ? blocks_of_parts<Operand, Result>(columns, rows)
                                   : blocks_of(columns, expand_columns) * blocks_of(rows, expand_rows);
    const int64_t sum_blocks = sum_parts_blocks(sums);
    return launch_blocks(by_rows ? expand_rows_kernel<Operand, Result> : expand_kernel<Operand, Result>,
                         sum_blocks + blocks, launch, compact, index, count, rows, columns, factor,
                         static_cast<Result*>(out), sums, sum_blocks);
  });
}

} // namespace mixout_fast::cuda
