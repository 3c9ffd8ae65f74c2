// Included once per instruction set, inside a region compiled for it, with MIXOUT_ISA its namespace and
// MIXOUT_VECTOR_BYTES its vector width. No function templates of the standard library here: an instantiation compiled
// for a newer instruction set could be the one that the linker keeps for all. mixing.h belongs inside the region
// because its templates call this file's functions.

#include "../mixing.h"

namespace mixout_fast::cpu::MIXOUT_ISA {
namespace {

template <typename T>
using Compute = decltype(widen(T{}));

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(MIXOUT_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(MIXOUT_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int lanes = MIXOUT_VECTOR_BYTES / sizeof(T);

template <typename T>
MIXOUT_INLINE Vector<T> load(const T* source) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(source);
}
template <typename T>
MIXOUT_INLINE void store(T* destination, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(destination) = value;
}
// What the vector extensions leave slow or cannot say: broadcasts, fused multiply-add (the products only; mixing rounds
// each step), and the product of the lanes' low halves.
#if MIXOUT_VECTOR_BYTES == 64
MIXOUT_INLINE Vector<float> broadcast(float value) { return _mm512_set1_ps(value); }
MIXOUT_INLINE Vector<double> broadcast(double value) { return _mm512_set1_pd(value); }
MIXOUT_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
MIXOUT_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
MIXOUT_INLINE Vector<uint64_t> multiply_low_halves(Vector<uint64_t> a, uint32_t b) {
  return (Vector<uint64_t>)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}
MIXOUT_INLINE void stream_vector(const void* source, void* destination) {
  _mm512_stream_si512(static_cast<__m512i*>(destination), _mm512_load_si512(source));
}
constexpr int tile_rows = 8; // 8 x 3 sums, 3 operands and a broadcast in 32 registers
#elif MIXOUT_VECTOR_BYTES == 32
MIXOUT_INLINE Vector<float> broadcast(float value) { return _mm256_set1_ps(value); }
MIXOUT_INLINE Vector<double> broadcast(double value) { return _mm256_set1_pd(value); }
MIXOUT_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
MIXOUT_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
MIXOUT_INLINE Vector<uint64_t> multiply_low_halves(Vector<uint64_t> a, uint32_t b) {
  return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}
MIXOUT_INLINE void stream_vector(const void* source, void* destination) {
  _mm256_stream_si256(static_cast<__m256i*>(destination), _mm256_load_si256(static_cast<const __m256i*>(source)));
}
constexpr int tile_rows = 4; // 4 x 3 sums, 3 operands and a broadcast in 16 registers
#else
template <typename T>
MIXOUT_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{}; // not +: it would turn -0 into 0
}
template <typename V>
MIXOUT_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
MIXOUT_INLINE Vector<uint64_t> multiply_low_halves(Vector<uint64_t> a, uint32_t b) { return (a & 0xFFFFFFFF) * b; }
#if defined(__x86_64__)
MIXOUT_INLINE void stream_vector(const void* source, void* destination) {
  _mm_stream_si128(static_cast<__m128i*>(destination), _mm_load_si128(static_cast<const __m128i*>(source)));
}
#endif
constexpr int tile_rows = 4;
#endif

struct MultiplyVectors {
  MIXOUT_INLINE Product<Vector<uint64_t>> operator()(uint32_t multiplier, Vector<uint64_t> word) const {
    const Vector<uint64_t> product = multiply_low_halves(word, multiplier);
    return {product >> 32, product};
  }
};

template <typename T>
constexpr int64_t panel = 3 * lanes<T>;

// Per-thread memory that only grows; it holds one block of a product and never a whole operand.
enum class Slot { mask, weight, target, block };
template <typename T>
T* scratch(Slot slot, int64_t count) {
  struct Buffer {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { free(data); }
  };
  static thread_local Buffer buffers[4];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  if (buffer.bytes < bytes) {
    free(buffer.data);
    buffer.data = aligned_alloc(64, bytes);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return static_cast<T*>(buffer.data);
}

// a's and b's lanes in turn, lower and upper half.
template <size_t... lane>
MIXOUT_INLINE void interleave(Vector<uint64_t> a, Vector<uint64_t> b, uint64_t* out, std::index_sequence<lane...>) {
  constexpr int width = lanes<uint64_t>;
  store<uint64_t>(out, __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * width)...));
  store<uint64_t>(out + width, __builtin_shufflevector(a, b, (width / 2 + lane / 2 + lane % 2 * width)...));
}

void draw(uint64_t seed, uint64_t threshold, int64_t first, int64_t count, uint32_t* keep) {
  constexpr int width = lanes<uint64_t>;
  Vector<uint64_t> lane_number;
  for (int lane = 0; lane < width; ++lane) lane_number[lane] = lane;
  for (int64_t start = first & ~int64_t{3}; start < first + count; start += 4 * width) {
    const Vector<uint64_t> group = lane_number + static_cast<uint64_t>(start / 4);
    const auto drawn = mask_words(seed, group, group >> 32, MultiplyVectors{});
    Vector<uint64_t> kept[4];
    for (int i = 0; i < 4; ++i) kept[i] = (Vector<uint64_t>)((drawn.word[i] & 0xFFFFFFFF) >= threshold);
    uint64_t pairs[2 * width]; // entries 2j and 2j + 1 in the low and the high half
    interleave((kept[0] & 0xFFFFFFFF) | kept[1] << 32, (kept[2] & 0xFFFFFFFF) | kept[3] << 32, pairs,
               std::make_index_sequence<width>{});
    const int64_t skip = start < first ? first - start : 0;
    const int64_t end = first + count - start < 4 * width ? first + count - start : 4 * width;
    memcpy(keep + start + skip - first, reinterpret_cast<uint32_t*>(pairs) + skip, (end - skip) * sizeof(uint32_t));
  }
}

// Entries [column, column + count) of a row's mask.
MIXOUT_INLINE const uint32_t* mask_segment(const Mask& mask, int64_t columns, int64_t row, int64_t column,
                                           int64_t count) {
  if (mask.keep) return mask.keep + column;
  uint32_t* keep = scratch<uint32_t>(Slot::mask, count);
  draw(mask.seed, mask.threshold, row * columns + column, count, keep);
  return keep;
}

// Elements [column, column + count) of a row, staged through `slot` where columns are not adjacent.
template <typename T>
MIXOUT_INLINE const T* row_segment(const Matrix& matrix, int64_t row, int64_t column, int64_t count, Slot slot) {
  const T* source = static_cast<const T*>(matrix.data) + row * matrix.row_stride + column * matrix.column_stride;
  if (matrix.column_stride == 1) return source;
  T* staged = scratch<T>(slot, count);
  for (int64_t i = 0; i < count; ++i) staged[i] = source[i * matrix.column_stride];
  return staged;
}

// Round to the result dtype, keep in the wider one: what a product reads.
template <typename Result, typename T>
MIXOUT_INLINE void put(T value, Result* out) {
  *out = narrow<Result>(value);
}
template <typename Result, typename Stored, typename T>
MIXOUT_INLINE void put_rounded(T value, Stored* out) {
  *out = static_cast<Stored>(widen(narrow<Result>(value)));
}

template <typename Operand, typename Result, typename Stored>
MIXOUT_INLINE void mix_segment(const Mixing& mixing, int64_t row, int64_t column, int64_t count,
                               Stored* __restrict out) {
  using C = Compute<Operand>;
  const uint32_t* __restrict keep = mask_segment(mixing.mask, mixing.columns, row, column, count);
  const Operand* __restrict weight = row_segment<Operand>(mixing.weight, row, column, count, Slot::weight);
  const C scale = static_cast<C>(mixing.scale);
  auto mix_all = [&](auto target_at) {
    for (int64_t i = 0; i < count; ++i) {
      const C mixed = mix_entry<C>(widen(weight[i]), target_at(i), scale, keep[i] != 0);
      if constexpr (std::is_same_v<Stored, Result>) put<Result>(mixed, out + i);
      else put_rounded<Result>(mixed, out + i);
    }
  };
  if (mixing.target.data) {
    const Operand* __restrict target = row_segment<Operand>(mixing.target, row, column, count, Slot::target);
    mix_all([=](int64_t i) { return widen(target[i]); });
  } else {
    mix_all([](int64_t) { return C{0}; });
  }
}

template <typename Operand, typename Result>
void mix(const Mixing& mixing, int64_t begin, int64_t end, void* out) {
  for (int64_t row = begin; row < end; ++row)
    mix_segment<Operand, Result>(mixing, row, 0, mixing.columns, static_cast<Result*>(out) + row * mixing.columns);
}

template <typename Operand, typename Result>
void mask_grad(Matrix grad, int64_t columns, const Mask& mask, double factor, int64_t begin, int64_t end, void* out) {
  using C = Compute<Operand>;
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t* __restrict keep = mask_segment(mask, columns, row, 0, columns);
    const Operand* __restrict source = row_segment<Operand>(grad, row, 0, columns, Slot::weight);
    Result* __restrict destination = static_cast<Result*>(out) + row * columns;
    for (int64_t i = 0; i < columns; ++i) {
      const C scaled = multiply(widen(source[i]), static_cast<C>(factor));
      put<Result>(keep[i] ? scaled : C{0}, destination + i);
    }
  }
}

template <typename T>
void gather_elements(Matrix x, const int32_t* __restrict index, int64_t count, int64_t begin, int64_t end, void* out) {
  int64_t kept = count;
  while (kept > 0 && index[kept - 1] < 0) --kept;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict source = row_segment<T>(x, row, 0, count ? index[kept ? kept - 1 : 0] + 1 : 0, Slot::weight);
    T* __restrict destination = static_cast<T*>(out) + row * count;
    for (int64_t j = 0; j < kept; ++j) destination[j] = source[index[j]];
    for (int64_t j = kept; j < count; ++j) destination[j] = T{0};
  }
}

void gather(Matrix x, int64_t element_size, const int32_t* index, int64_t count, int64_t begin, int64_t end,
            void* out) {
  if (element_size == 2) gather_elements<uint16_t>(x, index, count, begin, end, out);
  else if (element_size == 4) gather_elements<uint32_t>(x, index, count, begin, end, out);
  else gather_elements<uint64_t>(x, index, count, begin, end, out);
}

// A vector of `count` elements, the rest 0, and back. The full, contiguous case has a constant trip count and
// vectorises.
template <typename T, typename Element>
MIXOUT_INLINE Vector<T> load_widened(const Element* source, int64_t stride, int64_t count) {
  T values[lanes<T>] = {};
  if (count == lanes<T> && stride == 1)
    for (int lane = 0; lane < lanes<T>; ++lane) values[lane] = widen(source[lane]);
  else
    for (int64_t lane = 0; lane < count; ++lane) values[lane] = widen(source[lane * stride]);
  return load(values);
}
template <typename T, typename Element>
MIXOUT_INLINE void store_narrowed(Vector<T> value, int64_t count, Element* destination) {
  T values[lanes<T>];
  store(values, value);
  if (count == lanes<T>)
    for (int lane = 0; lane < lanes<T>; ++lane) put<Element>(values[lane], destination + lane);
  else
    for (int64_t lane = 0; lane < count; ++lane) put<Element>(values[lane], destination + lane);
}

// Transposes a square block held in registers: at step s, lane bit s and row bit s change places.
template <typename T, int step, size_t... lane>
MIXOUT_INLINE void exchange(Vector<T>& a, Vector<T>& b, std::index_sequence<lane...>) {
  constexpr int width = lanes<T>;
  const Vector<T> low = __builtin_shufflevector(a, b, (lane & step ? width + lane - step : lane)...);
  const Vector<T> high = __builtin_shufflevector(a, b, (lane & step ? width + lane : lane + step)...);
  a = low;
  b = high;
}
template <typename T, int step = 1>
MIXOUT_INLINE void transpose(Vector<T>* rows) {
  if constexpr (step < lanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i)
      if (!(i & step)) exchange<T, step>(rows[i], rows[i + step], std::make_index_sequence<lanes<T>>{});
    transpose<T, 2 * step>(rows);
  }
}

// Copies a finished row past the caches: the dense gradient is next read by the optimizer, long after it would have
// been evicted, and a streamed line is not first read from memory (1024x4096 at p = 0.9, with the compact product: 1.4
// against 2.0 ms).
template <typename T>
void stream_row(const T* source, int64_t count, T* destination) {
#if defined(__x86_64__)
  if (reinterpret_cast<uintptr_t>(destination) % MIXOUT_VECTOR_BYTES == 0) {
    constexpr int64_t step = MIXOUT_VECTOR_BYTES / sizeof(T);
    for (; count >= step; count -= step, source += step, destination += step) stream_vector(source, destination);
  }
#endif
  memcpy(destination, source, count * sizeof(T));
}

template <typename Operand, typename Result>
void expand(Matrix compact, const int32_t* index, int64_t count, int64_t columns, double factor, int64_t begin,
            int64_t end, void* out) {
  using T = Compute<Operand>;
  constexpr int64_t width = lanes<T>;
  while (count > 0 && index[count - 1] < 0) --count;
  const int64_t padded = round_up(count, width);
  T* rows = scratch<T>(Slot::block, width * padded);
  // Rows are filled four at a time and then copied: a vector load right behind the single stores that it covers stalls.
  constexpr int64_t group = width < 4 ? width : 4;
  const int64_t stride = round_up(columns, 64 / sizeof(Result));
  Result* dense = scratch<Result>(Slot::weight, group * stride);
  memset(dense, 0, group * stride * sizeof(Result));
  for (int64_t first = begin; first < end; first += width) {
    const int64_t height = end - first < width ? end - first : width;
    const Operand* source = static_cast<const Operand*>(compact.data) + first * compact.column_stride;
    if (compact.row_stride == 1) {
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < count; ++j)
          rows[i * padded + j] = multiply(widen(source[i * compact.column_stride + j]), static_cast<T>(factor));
    } else {
      for (int64_t j = 0; j < count; j += width) {
        Vector<T> block[width] = {};
        for (int64_t i = 0; i < width && j + i < count; ++i)
          block[i] = load_widened<T>(source + (j + i) * compact.row_stride, compact.column_stride, height) *
                     static_cast<T>(factor);
        transpose<T>(block);
        for (int64_t i = 0; i < width; ++i) store(rows + i * padded + j, block[i]);
      }
    }
    for (int64_t i = 0; i < height; i += group) {
      for (int64_t j = 0; j < count; ++j) {
        const int64_t column = index[j];
        for (int64_t l = 0; l < group; ++l) put<Result>(rows[(i + l) * padded + j], dense + l * stride + column);
      }
      for (int64_t l = 0; l < group && i + l < height; ++l)
        stream_row(dense + l * stride, columns, static_cast<Result*>(out) + (first + i + l) * columns);
    }
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A part of W: rows and columns that are mixed together.
struct Range {
  int64_t row, rows, column, columns;
};

// The next part of W and U on its way to L2 while this one is multiplied, a line of each at a time: mixing waits for
// memory, and multiplying leaves it idle.
struct Prefetch {
  const char* weight;
  const char* target;
  int64_t weight_stride, target_stride; // bytes
  int64_t rows, lines;
  int64_t line = 0;

  MIXOUT_INLINE void step() {
    if (rows == 0) return;
    __builtin_prefetch(weight + line * 64, 0, 2);
    if (target) __builtin_prefetch(target + line * 64, 0, 2);
    if (++line < lines) return;
    line = 0;
    --rows;
    weight += weight_stride;
    if (target) target += target_stride;
  }
};

template <typename Operand>
Prefetch prefetch_of(const Mixing& mixing, Range next) {
  constexpr int64_t size = sizeof(Operand);
  const auto start = [=](const Matrix& matrix) {
    return static_cast<const char*>(matrix.data) + (next.row * matrix.row_stride + next.column) * size;
  };
  const bool adjacent = mixing.weight.column_stride == 1;
  const bool has_target = mixing.target.data && mixing.target.column_stride == 1;
  return {start(mixing.weight),
          has_target ? start(mixing.target) : nullptr,
          mixing.weight.row_stride * size,
          mixing.target.row_stride * size,
          adjacent ? next.rows : 0,
          (next.columns * size + 63) / 64};
}

// How a block of W' lies: as in W, so [outputs][depth] for y = x W'^T and [depth][outputs] for dx = dy W'.
template <bool forward>
struct Block {
  static constexpr int64_t outputs = forward ? linear_block : grad_input_block;
  static constexpr int64_t depth = forward ? linear_depth : grad_input_depth;
  // Off the power of two, whose rows would share one L1 set.
  static constexpr int64_t stride = (forward ? depth : outputs) + 16;
  static constexpr int64_t output_stride = forward ? stride : 1;
  static constexpr int64_t depth_stride = forward ? 1 : stride;
  static constexpr int64_t size = (forward ? outputs : depth) * stride;
};

// c[tile_rows][vectors] (+)= block[tile_rows][depth] * b[depth][vectors]. Each depth block is summed from zero: summing
// on from c doubles the error at 1023 terms, to twice the library's.
template <bool forward, typename T, int vectors>
MIXOUT_INLINE void multiply_tile(int64_t depth, const T* __restrict a, const T* __restrict b, T* __restrict c,
                                 int64_t c_stride, bool accumulate, Prefetch& prefetch) {
  using A = Block<forward>;
  Vector<T> sum[tile_rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) sum[i][v] = Vector<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    if (k % 4 == 0) prefetch.step();
    Vector<T> right[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) right[v] = load(b + (k * vectors + v) * lanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i) {
      const Vector<T> left = broadcast(a[i * A::output_stride + k * A::depth_stride]);
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) sum[i][v] = multiply_add(left, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      T* out = c + i * c_stride + v * lanes<T>;
      store(out, accumulate ? load(out) + sum[i][v] : sum[i][v]);
    }
}

template <bool forward, typename T, int vectors>
MIXOUT_INLINE void multiply_pieces(int64_t piece, int64_t depth, const T* a, const T* b, T* c, int64_t c_stride,
                                   bool accumulate, Prefetch& prefetch) {
  for (int64_t k = 0; k < depth; k += piece)
    multiply_tile<forward, T, vectors>(depth - k < piece ? depth - k : piece, a + k * Block<forward>::depth_stride,
                                       b + k * vectors * lanes<T>, c, c_stride, accumulate || k > 0, prefetch);
}

// c[outputs][width] (+)= block * b, b in panels [depth][panel], the last one narrower where width ends.
template <bool forward, typename T>
void multiply_block(int64_t outputs, int64_t width, int64_t depth, const T* a, const T* b, T* c, bool accumulate,
                    Prefetch prefetch) {
  // Where one side is a vector or little more, the library sums in as many parts as its vectors have lanes, and 255
  // terms one by one would have 3 times its error.
  const int64_t piece = outputs <= tile_rows || width <= lanes<T> ? 32 : depth;
  for (int64_t column = 0; column < width; column += panel<T>) {
    for (int64_t row = 0; row < outputs; row += tile_rows) {
      const T* left = a + row * Block<forward>::output_stride;
      const T* right = b + column * depth;
      T* out = c + row * width + column;
      const int64_t vectors = (width - column) / lanes<T>;
      if (vectors >= 3) multiply_pieces<forward, T, 3>(piece, depth, left, right, out, width, accumulate, prefetch);
      else if (vectors == 2)
        multiply_pieces<forward, T, 2>(piece, depth, left, right, out, width, accumulate, prefetch);
      else multiply_pieces<forward, T, 1>(piece, depth, left, right, out, width, accumulate, prefetch);
    }
  }
}

// x (m, columns), transposed for the vector operand: [depth blocks][panels of m][depth][panel]. A unit is a depth block
// of one vector's rows.
template <typename Element>
void pack(Matrix x, int64_t m, int64_t columns, int64_t block, int64_t begin, int64_t end, void* packed) {
  using T = Compute<Element>;
  constexpr int64_t width = lanes<T>;
  const int64_t padded = round_up(m, width);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t start = unit / (padded / width) * block;
    const int64_t row = unit % (padded / width) * width;
    const int64_t depth = columns - start < block ? columns - start : block;
    const int64_t first = row / panel<T> * panel<T>;
    const int64_t stride = padded - first < panel<T> ? padded - first : panel<T>;
    T* out = static_cast<T*>(packed) + start * padded + first * depth + (row - first);
    const Element* source = static_cast<const Element*>(x.data) + row * x.row_stride + start * x.column_stride;
    const int64_t height = m - row < width ? m - row : width;
    for (int64_t k = 0; k < depth; k += width) {
      const int64_t count = depth - k < width ? depth - k : width;
      Vector<T> rows[width] = {};
      for (int64_t i = 0; i < height; ++i)
        rows[i] = load_widened<T>(source + i * x.row_stride + k * x.column_stride, x.column_stride, count);
      transpose<T>(rows);
      for (int64_t l = 0; l < count; ++l) store(out + (k + l) * stride, rows[l]);
    }
  }
}

// x W'^T + bias (forward) or dy W': its columns [begin, end), for x or dy of m rows.
template <bool forward, typename Operand, typename Result>
void multiply(const Mixing& mixing, const void* packed, int64_t m, int64_t begin, int64_t end, const void* bias,
              void* result) {
  using T = Compute<Operand>;
  using B = Block<forward>;
  constexpr int64_t width = lanes<T>;
  const int64_t terms = forward ? mixing.columns : mixing.rows;
  const int64_t result_stride = forward ? mixing.rows : mixing.columns;
  const int64_t padded = round_up(m, width);
  T* mixed = scratch<T>(Slot::block, B::size + B::outputs * padded);
  T* sum = mixed + B::size;
  const auto range = [=](int64_t first, int64_t start) -> Range {
    const int64_t outputs = end - first < B::outputs ? end - first : B::outputs;
    const int64_t depth = terms - start < B::depth ? terms - start : B::depth;
    if (outputs <= 0) return {};
    return forward ? Range{first, outputs, start, depth} : Range{start, depth, first, outputs};
  };
  for (int64_t first = begin; first < end; first += B::outputs) {
    for (int64_t start = 0; start < terms; start += B::depth) {
      const Range part = range(first, start);
      for (int64_t row = 0; row < part.rows; ++row)
        mix_segment<Operand, Result>(mixing, part.row + row, part.column, part.columns, mixed + row * B::stride);
      const int64_t outputs = forward ? part.rows : part.columns, depth = forward ? part.columns : part.rows;
      const int64_t filled = round_up(outputs, tile_rows);
      for (int64_t i = outputs; i < filled; ++i)
        for (int64_t k = 0; k < depth; ++k) mixed[i * B::output_stride + k * B::depth_stride] = T{0};
      const bool last = start + B::depth >= terms;
      const Range next = last ? range(first + B::outputs, 0) : range(first, start + B::depth);
      multiply_block<forward>(filled, padded, depth, mixed, static_cast<const T*>(packed) + start * padded, sum,
                              start > 0, prefetch_of<Operand>(mixing, next));
    }
    const int64_t outputs = end - first < B::outputs ? end - first : B::outputs;
    for (int64_t column = 0; column < outputs; column += width) {
      const int64_t count = outputs - column < width ? outputs - column : width;
      Result* out = static_cast<Result*>(result) + first + column;
      const Vector<T> offset =
          bias ? load_widened<T>(static_cast<const Result*>(bias) + first + column, 1, count) : Vector<T>{};
      for (int64_t row = 0; row < m; row += width) {
        Vector<T> values[width];
        for (int64_t i = 0; i < width; ++i) values[i] = load(sum + (column + i) * padded + row);
        transpose<T>(values);
        for (int64_t i = 0; i < width && row + i < m; ++i)
          store_narrowed<T>(values[i] + offset, count, out + (row + i) * result_stride);
      }
    }
  }
}

template <typename Operand, typename Result>
constexpr Kernels kernels_for = {
    mix<Operand, Result>,
    pack<Result>,
    multiply<true, Operand, Result>,
    multiply<false, Operand, Result>,
    mask_grad<Operand, Result>,
    expand<Operand, Result>,
};

const Kernels* kernels(Dtype operand, Dtype result) {
  switch (operand) {
  case Dtype::f64:
    return result == Dtype::f64 ? &kernels_for<double, double> : nullptr;
  case Dtype::f32:
    return result == Dtype::f32    ? &kernels_for<float, float>
           : result == Dtype::bf16 ? &kernels_for<float, bfloat16>
           : result == Dtype::f16  ? &kernels_for<float, float16>
                                   : nullptr;
  case Dtype::bf16:
    return result == Dtype::bf16  ? &kernels_for<bfloat16, bfloat16>
           : result == Dtype::f32 ? &kernels_for<bfloat16, float>
                                  : nullptr;
  case Dtype::f16:
    return result == Dtype::f16   ? &kernels_for<float16, float16>
           : result == Dtype::f32 ? &kernels_for<float16, float>
                                  : nullptr;
  }
  return nullptr;
}

} // namespace

extern const InstructionSet instruction_set = {MIXOUT_ISA_NAME, MIXOUT_VECTOR_BYTES, draw, gather, kernels};

} // namespace mixout_fast::cpu::MIXOUT_ISA
