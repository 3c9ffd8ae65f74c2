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
MIXOUT_INLINE Vector<float> spread(const float* source, uint32_t kept) {
  return _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(kept), source);
}
MIXOUT_INLINE Vector<double> spread(const double* source, uint32_t kept) {
  return _mm512_maskz_expandloadu_pd(static_cast<__mmask8>(kept), source);
}
MIXOUT_INLINE Vector<float> compress(Vector<float> row, uint32_t kept) {
  return _mm512_maskz_compress_ps(static_cast<__mmask16>(kept), row);
}
MIXOUT_INLINE Vector<double> compress(Vector<double> row, uint32_t kept) {
  return _mm512_maskz_compress_pd(static_cast<__mmask8>(kept), row);
}
#define MIXOUT_HAS_COMPRESS
constexpr int tile_rows = 8, panel_vectors = 3; // 8 x 3 sums, 3 operands and a broadcast in 32 registers
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
// 6 x 2 sums, 2 operands and a broadcast in 16 registers. With 4 x 3, which take all 16, the compiler loads an operand
// for every product instead: y at 2048x768x768 13.4 and not 11.2 ms on AMD's Zen 4, where MKL's alone takes 12.1.
constexpr int tile_rows = 6, panel_vectors = 2;
#else
template <typename T>
MIXOUT_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{}; // not +: it would turn -0 into 0
}
#if defined(__aarch64__)
MIXOUT_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
MIXOUT_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <typename V>
MIXOUT_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif
MIXOUT_INLINE Vector<uint64_t> multiply_low_halves(Vector<uint64_t> a, uint32_t b) { return (a & 0xFFFFFFFF) * b; }
#if defined(__x86_64__)
MIXOUT_INLINE void stream_vector(const void* source, void* destination) {
  _mm_stream_si128(static_cast<__m128i*>(destination), _mm_load_si128(static_cast<const __m128i*>(source)));
}
#endif
constexpr int tile_rows = 4, panel_vectors = 3;
#endif

struct MultiplyVectors {
  MIXOUT_INLINE Product<Vector<uint64_t>> operator()(uint32_t multiplier, Vector<uint64_t> word) const {
    const Vector<uint64_t> product = multiply_low_halves(word, multiplier);
    return {product >> 32, product};
  }
};

// A product is computed in tiles of tile_rows x one panel of outputs.
template <typename T>
constexpr int64_t panel = panel_vectors * lanes<T>;
// How the broadcast operand of a tile lies: x, dy or a copy of them, or tiles of its transpose.
struct Rows {
  int64_t row_stride;
  static constexpr int64_t term_stride = 1;
};
struct TransposedTiles {
  static constexpr int64_t row_stride = 1, term_stride = tile_rows;
};
// How many terms are summed one by one, for an error near the library's: MKL sums blocks of 192 in fp64, in fp32 of 384
// on Intel's processors and of 192 on AMD's, where ours of 384 had 1.4 times its error. Up to 16 rows or outputs it
// sums in as many parts as its vectors have lanes. By the whole product and not a thread's part: the sums must not
// depend on the threads.
constexpr int64_t piece_terms = 192, short_piece = 32;
constexpr int64_t summed_at_once(int64_t rows, int64_t outputs) {
  return rows <= 16 || outputs <= 16 ? short_piece : piece_terms;
}

// Per-thread memory of each type that only grows; it holds blocks of a product, and of few rows whole operands.
enum class Slot { mask, weight, target, rows, block };
template <typename T>
T* scratch(Slot slot, int64_t count) {
  struct Buffer {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { free(data); }
  };
  static thread_local Buffer buffers[5];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)) + 1, 64); // one more: memset takes no null
  if (buffer.bytes < bytes) {
    free(buffer.data);
    buffer.bytes = 0;
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

// A row's mask where its entries are drawn already.
MIXOUT_INLINE const uint32_t* mask_row(const Mask& mask, int64_t columns, int64_t row) {
  return mask.keep_row && !mask.keep_row[row] ? mask.keep + columns : mask.keep;
}

// Entries [column, column + count) of a row's mask.
MIXOUT_INLINE const uint32_t* mask_segment(const Mask& mask, int64_t columns, int64_t row, int64_t column,
                                           int64_t count) {
  if (mask.keep) return mask_row(mask, columns, row) + column;
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
  const int64_t kept = kept_count(index, count);
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
  if (count == lanes<T> && stride == 1) {
    if constexpr (std::is_same_v<T, Element>) return load(source);
    T values[lanes<T>];
    for (int lane = 0; lane < lanes<T>; ++lane) values[lane] = widen(source[lane]);
    return load(values);
  }
  T values[lanes<T>] = {};
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

// The kept columns of a matrix, ascending: taken out of its rows, or put back between zeros.
template <typename T>
class KeptColumns {
public:
  KeptColumns(const int32_t* index, int64_t count) : index_(index), count_(count) {
#if defined(MIXOUT_HAS_COMPRESS)
    vectors_ = count ? index[count - 1] / lanes<T> + 1 : 0;
    kept_ = scratch<uint16_t>(Slot::mask, vectors_);
    memset(kept_, 0, vectors_ * sizeof(uint16_t));
    for (int64_t j = 0; j < count; ++j) kept_[index[j] / lanes<T>] |= 1 << index[j] % lanes<T>;
#endif
  }

#if defined(MIXOUT_HAS_COMPRESS)
  // Of `row` no more than up to the last of them is read; `out` has room for one vector more than they take.
  MIXOUT_INLINE void take(const T* row, T* out) const {
    if (count_ == 0) return;
    const int64_t last = vectors_ - 1;
    for (int64_t v = 0; v < last; ++v) {
      store(out, compress(load(row + v * lanes<T>), kept_[v]));
      out += __builtin_popcount(kept_[v]);
    }
    for (uint32_t kept = kept_[last]; kept; kept &= kept - 1) *out++ = row[last * lanes<T> + __builtin_ctz(kept)];
  }
#endif

#if defined(MIXOUT_HAS_COMPRESS)
  // Vector v of a row, whose kept columns from there on are `columns`, which move on.
  MIXOUT_INLINE Vector<T> next(int64_t v, const T*& columns) const {
    if (v >= vectors_) return Vector<T>{};
    const Vector<T> row = spread(columns, kept_[v]);
    columns += __builtin_popcount(kept_[v]);
    return row;
  }
#endif

  // `row` has room for whole vectors; its other columns are 0 already.
  MIXOUT_INLINE void put(const T* columns, T* row) const {
#if defined(MIXOUT_HAS_COMPRESS)
    for (int64_t v = 0; v < vectors_; ++v) store(row + v * lanes<T>, next(v, columns));
#else
    for (int64_t j = 0; j < count_; ++j) row[index_[j]] = columns[j];
#endif
  }

private:
  const int32_t* index_;
  int64_t count_;
#if defined(MIXOUT_HAS_COMPRESS)
  int64_t vectors_;
  uint16_t* kept_; // a bit per column, a word per vector
#endif
};

// Writes rows of the dense gradient from their kept columns; the other columns are 0.
template <typename T, typename Result>
class DenseRows {
public:
  DenseRows(const int32_t* index, int64_t count, int64_t columns)
      : kept_(index, count), columns_(columns), row_(scratch<T>(Slot::target, round_up(columns, lanes<T>))) {
    memset(row_, 0, columns * sizeof(T));
  }
  ~DenseRows() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }

  void put(const T* kept_columns, Result* destination) {
    kept_.put(kept_columns, row_);
    if constexpr (std::is_same_v<Result, T>) {
      stream_row(row_, columns_, destination);
    } else {
      Result* narrowed = scratch<Result>(Slot::weight, columns_);
      for (int64_t k = 0; k < columns_; ++k) narrowed[k] = narrow<Result>(row_[k]);
      stream_row(narrowed, columns_, destination);
    }
  }

private:
  KeptColumns<T> kept_;
  int64_t columns_;
  T* row_;
};

template <typename Operand, typename Result>
void expand(Matrix compact, const int32_t* index, int64_t count, int64_t columns, double factor, int64_t begin,
            int64_t end, void* out) {
  using T = Compute<Operand>;
  constexpr int64_t width = lanes<T>;
  count = kept_count(index, count);
  const int64_t padded = round_up(count, width);
  T* rows = scratch<T>(Slot::block, width * padded);
  DenseRows<T, Result> dense(index, count, columns);
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
    for (int64_t i = 0; i < height; ++i)
      dense.put(rows + i * padded, static_cast<Result*>(out) + (first + i) * columns);
  }
}

template <typename Operand, typename Result>
void expand_rows(Matrix compact, const int32_t* index, int64_t count, int64_t columns, double factor, int64_t begin,
                 int64_t end, void* out) {
  using T = Compute<Operand>;
  count = kept_count(index, count);
  Result* kept = scratch<Result>(Slot::weight, columns);
  Result* zeros = scratch<Result>(Slot::target, columns);
  memset(zeros, 0, columns * sizeof(Result));
  int64_t j = 0;
  while (j < count && index[j] < begin) ++j;
  for (int64_t row = begin; row < end; ++row) {
    const bool is_kept = j < count && index[j] == row;
    if (is_kept) {
      const Operand* __restrict source = static_cast<const Operand*>(compact.data) + j++ * compact.row_stride;
      for (int64_t k = 0; k < columns; ++k)
        put<Result>(multiply(widen(source[k * compact.column_stride]), static_cast<T>(factor)), kept + k);
    }
    stream_row(is_kept ? kept : zeros, columns, static_cast<Result*>(out) + row * columns);
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename T>
const char* address(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * static_cast<int64_t>(sizeof(T));
}

// A part of W' (N, K) that is mixed at once, for y = x W'^T (forward) or dx = dy W'. A product runs over its terms and
// gives outputs: K terms and N outputs forward, the other way round for dx.
struct Part {
  int64_t output, outputs, term, terms;
};

// W' as the vector operand of a product: panels of outputs, each [terms][panel], the last one narrower where the
// outputs end, filled up with 0 to a whole vector.
template <typename T>
struct Panels {
  T* data;
  int64_t terms;

  MIXOUT_INLINE T* at(int64_t output) const { return data + output * terms; }
  MIXOUT_INLINE static int64_t width(int64_t output, int64_t outputs) {
    const int64_t left = round_up(outputs, lanes<T>) - output;
    return left < panel<T> ? left : panel<T>;
  }
};

// Whether a vector of entries can be mixed as one: fp32, a mask drawn already, columns adjacent.
template <typename Operand, typename Result>
constexpr bool mixes_vectors = std::is_same_v<Operand, float> && std::is_same_v<Result, float>;

MIXOUT_INLINE bool takes_vectors(const Mixing& mixing) {
  return mixing.mask.keep && mixing.weight.column_stride == 1 &&
         (!mixing.target.data || mixing.target.column_stride == 1);
}

// As mix_entry: entries [column, column + lanes) of a row, whose mask is `keep_of_row`.
template <typename T>
MIXOUT_INLINE Vector<T> mix_vector(const Mixing& mixing, const uint32_t* keep_of_row, int64_t row, int64_t column) {
  typedef uint32_t Keep __attribute__((vector_size(lanes<T> * sizeof(uint32_t))));
  Keep keep;
  memcpy(&keep, keep_of_row + column, sizeof(keep));
  const Vector<T> weight = load(reinterpret_cast<const T*>(address<T>(mixing.weight, row, column)));
  const Vector<T> target =
      mixing.target.data ? load(reinterpret_cast<const T*>(address<T>(mixing.target, row, column))) : Vector<T>{};
  const Vector<T> difference = weight - target, scaled = difference * broadcast(static_cast<T>(mixing.scale));
  const Vector<T> kept = target + scaled;
  return keep ? kept : target;
}

template <bool forward, typename Operand, typename Result, typename T>
void mix_panels(const Mixing& mixing, Part part, Panels<T> panels) {
  constexpr int64_t width = lanes<T>;
  if constexpr (forward) {
    // Rows of W' are outputs: as many as a vector has lanes are mixed and transposed, in registers where they can be.
    const int64_t stride = round_up(part.terms, width);
    T* mixed = scratch<T>(Slot::rows, width * stride);
    for (int64_t output = 0; output < part.outputs; output += width) {
      const bool in_registers = mixes_vectors<Operand, Result> && takes_vectors(mixing) && part.terms % width == 0 &&
                                output + width <= part.outputs;
      for (int64_t i = 0; i < width && !in_registers; ++i)
        if (output + i < part.outputs)
          mix_segment<Operand, Result>(mixing, part.output + output + i, part.term, part.terms, mixed + i * stride);
        else memset(mixed + i * stride, 0, part.terms * sizeof(T));
      const int64_t first = output / panel<T> * panel<T>, step = panels.width(first, part.outputs);
      T* out = panels.at(first) + (output - first);
      const uint32_t* keep[width];
      for (int64_t i = 0; i < width && in_registers; ++i)
        keep[i] = mask_row(mixing.mask, mixing.columns, part.output + output + i);
      for (int64_t k = 0; k < part.terms; k += width) {
        Vector<T> block[width];
        if constexpr (mixes_vectors<Operand, Result>)
          if (in_registers) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < width; ++i)
              block[i] = mix_vector<T>(mixing, keep[i], part.output + output + i, part.term + k);
          }
        if (!in_registers)
          for (int64_t i = 0; i < width; ++i) block[i] = load(mixed + i * stride + k);
        transpose<T>(block);
        for (int64_t l = 0; l < width && k + l < part.terms; ++l) store(out + (k + l) * step, block[l]);
      }
    }
  } else {
    // Rows of W' are terms: mixed vector by vector on the way into the panels, where they can be.
    const int64_t padded = round_up(part.outputs, width);
    T* mixed = scratch<T>(Slot::rows, padded);
    memset(mixed, 0, padded * sizeof(T));
    const Mixing own = mixing; // which no store can change
    const bool by_vectors = mixes_vectors<Operand, Result> && takes_vectors(own) && part.outputs % width == 0;
    for (int64_t k = 0; k < part.terms; ++k) {
      const uint32_t* keep = mask_row(own.mask, own.columns, part.term + k);
      if (!by_vectors) mix_segment<Operand, Result>(own, part.term + k, part.output, part.outputs, mixed);
      for (int64_t output = 0; output < padded; output += panel<T>) {
        const int64_t step = panels.width(output, part.outputs);
        T* out = panels.at(output) + k * step;
        for (int64_t v = 0; v < step; v += width)
          if constexpr (mixes_vectors<Operand, Result>)
            store(out + v, by_vectors ? mix_vector<T>(own, keep, part.term + k, part.output + output + v)
                                      : load(mixed + output + v));
          else store(out + v, load(mixed + output + v));
      }
    }
  }
}

// The next part of one operand or two on its way to L2 while this one is multiplied, a line of each at a time: mixing
// and staging wait for memory, and multiplying leaves it idle.
struct Prefetch {
  const char* first = nullptr;
  const char* second = nullptr;
  int64_t first_stride = 0, second_stride = 0; // bytes
  int64_t rows = 0, lines = 0;
  int64_t line = 0;

  MIXOUT_INLINE void step() {
    if (rows == 0) return;
    __builtin_prefetch(first + line * 64, 0, 2);
    if (second) __builtin_prefetch(second + line * 64, 0, 2);
    if (++line < lines) return;
    line = 0;
    --rows;
    first += first_stride;
    if (second) second += second_stride;
  }
};

struct NoPrefetch {
  MIXOUT_INLINE void step() {}
};

template <bool forward, typename Operand>
Prefetch prefetch_of(const Mixing& mixing, Part next) {
  if (next.terms <= 0 || mixing.weight.column_stride != 1) return {};
  constexpr int64_t size = sizeof(Operand);
  const int64_t row = forward ? next.output : next.term, column = forward ? next.term : next.output;
  const bool has_target = mixing.target.data && mixing.target.column_stride == 1;
  return {address<Operand>(mixing.weight, row, column),
          has_target ? address<Operand>(mixing.target, row, column) : nullptr,
          mixing.weight.row_stride * size,
          mixing.target.row_stride * size,
          forward ? next.outputs : next.terms,
          ((forward ? next.terms : next.outputs) * size + 63) / 64};
}

// c[tile_rows][vectors] = base + left[tile_rows][terms] * right[terms][vectors]. The products are summed from zero:
// summing on from c doubles the error at 1023 terms, to twice the library's. A step of a Prefetch takes 4 % of the
// multiplications' slots.
template <typename Left, typename T, int vectors, typename Fetch>
MIXOUT_INLINE void multiply_tile(Left layout, int64_t terms, const T* __restrict left, const T* __restrict right,
                                 const T* base, int64_t base_stride, T* c, int64_t c_stride, Fetch& prefetch) {
  Vector<T> sum[tile_rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) sum[i][v] = Vector<T>{};
  // The parts of a large result come from far: fetched meanwhile, of 1024 rows y takes 2.5 % less, dx 1 %. Those of
  // dW's block are near: 3 % more.
  if constexpr (std::is_same_v<Left, Rows>) {
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) __builtin_prefetch(c + i * c_stride + v * lanes<T>, 1, 3);
  }
  const T* __restrict fourth = left + 3 * layout.row_stride;
  const auto add_term = [&](int64_t term, const T* right_term) __attribute__((always_inline)) {
    Vector<T> factor[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) factor[v] = load(right_term + v * lanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i) {
      const T* row = i < 3 ? left + i * layout.row_stride : fourth + (i - 3) * layout.row_stride;
      const Vector<T> value = broadcast(row[term * Left::term_stride]);
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) sum[i][v] = multiply_add(value, factor[v], sum[i][v]);
    }
  };
  // Two terms a turn: at one the loop's own instructions take the multiplications' slots, and at four it is 6 % slower,
  // for no reason that we found.
  constexpr int64_t step = vectors * lanes<T>;
  for (const T* end = right + (terms & ~int64_t{1}) * step; right != end; right += 2 * step) {
    prefetch.step();
    add_term(0, right);
    add_term(1, right + step);
    left += 2 * Left::term_stride;
    fourth += 2 * Left::term_stride;
  }
  if (terms & 1) add_term(0, right);
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v)
      store(c + i * c_stride + v * lanes<T>, load(base + i * base_stride + v * lanes<T>) + sum[i][v]);
}

// The same, summed in pieces of so many terms.
template <typename Left, typename T, int vectors, typename Fetch>
MIXOUT_INLINE void multiply_pieces(Left layout, int64_t piece, int64_t terms, const T* left, const T* right,
                                   const T* base, int64_t base_stride, T* c, int64_t c_stride, Fetch& prefetch) {
  for (int64_t k = 0; k < terms; k += piece) {
    multiply_tile<Left, T, vectors>(layout, terms - k < piece ? terms - k : piece, left + k * Left::term_stride,
                                    right + k * vectors * lanes<T>, base, base_stride, c, c_stride, prefetch);
    base = c;
    base_stride = c_stride;
  }
}

template <typename Left, typename T, typename Fetch>
void multiply_panel(Left layout, int64_t width, int64_t piece, int64_t terms, const T* left, const T* right,
                    const T* base, int64_t base_stride, T* c, int64_t c_stride, Fetch& prefetch) {
  const auto multiply = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int count = decltype(vectors)::value;
    multiply_pieces<Left, T, count>(layout, piece, terms, left, right, base, base_stride, c, c_stride, prefetch);
  };
  if (width == panel<T>) multiply(std::integral_constant<int, panel_vectors>{});
  else if (width == 2 * lanes<T>) multiply(std::integral_constant<int, 2>{});
  else multiply(std::integral_constant<int, 1>{});
}

// Terms [term, term + terms) of the rows of x or dy from `first` on, the last one repeated to fill a tile.
template <typename T, typename Element>
void stage_rows(Matrix x, int64_t first, int64_t m, int64_t term, int64_t terms, int64_t stride, T* staged) {
  for (int64_t row = first; row < round_up(m, tile_rows); ++row, staged += stride) {
    const Element* source =
        static_cast<const Element*>(x.data) + (row < m ? row : m - 1) * x.row_stride + term * x.column_stride;
    for (int64_t k = 0; k < terms; k += lanes<T>)
      store(staged + k, load_widened<T>(source + k * x.column_stride, x.column_stride,
                                        terms - k < lanes<T> ? terms - k : lanes<T>));
  }
}

// The part of W' that a thread mixes at once, as panels in L2, which x or dy then passes. Of many rows as large a part
// as fits: the result is read and written once per block of terms. Of few, mixing is what takes the time: less at once,
// with the next part of W and U fetched meanwhile. A block for dx takes wide parts of W's rows.
struct BlockShape {
  int64_t terms, panels;
  bool fetches_next;
};

template <bool forward, typename T>
constexpr BlockShape block_shape(int64_t rows, int64_t terms) {
  constexpr int64_t wide = sizeof(T) / sizeof(float);
  if (rows <= few_rows) return forward ? BlockShape{384 / wide, 1, true} : BlockShape{128, 8, true};
  const int64_t most = (forward ? 3072 : 768) / wide;
  const int64_t block = terms < most ? terms : most;
  return {most, 4096 / block > 1 ? 4096 / block : 1, false};
}

// x W'^T + bias (forward) or dy W': its columns [begin, end), for x or dy of m rows, of `all_rows` in the whole
// product.
template <bool forward, typename Operand, typename Result>
void multiply(const Mixing& mixing, Matrix x, int64_t m, int64_t all_rows, int64_t begin, int64_t end, const void* bias,
              void* result) {
  using T = Compute<Operand>;
  constexpr bool narrows = !std::is_same_v<Result, T>;
  const int64_t terms = forward ? mixing.columns : mixing.rows;
  const int64_t result_stride = forward ? mixing.rows : mixing.columns;
  const int64_t piece = summed_at_once(all_rows, result_stride);
  const bool in_short_pieces = piece == short_piece;
  const BlockShape shape = block_shape<forward, T>(all_rows, terms);
  const int64_t block_terms = shape.terms < terms ? shape.terms : round_up(terms, lanes<T>);
  const int64_t all_outputs = round_up(end - begin, panel<T>), most_outputs = shape.panels * panel<T>;
  const int64_t block_outputs = all_outputs < most_outputs ? all_outputs : most_outputs;
  // Whole tiles of rows are multiplied where they are, others from a copy off the power of two, whose rows would share
  // one L1 set.
  const bool lies_in_rows = x.column_stride == 1 || terms == 1;
  const int64_t in_place = !narrows && lies_in_rows ? m / tile_rows * tile_rows : 0;
  const Rows staged_rows{block_terms + 16};
  const int64_t staged_size = round_up(m - in_place, tile_rows) * staged_rows.row_stride;
  T* staged =
      scratch<T>(Slot::block, staged_size + (block_terms + 1) * block_outputs + (narrows ? m * (end - begin) : 0));
  T* mixed = staged + staged_size;
  T* offset = mixed + block_terms * block_outputs;
  memset(offset, 0, block_outputs * sizeof(T));
  // Sums go to the result itself where it is of their dtype.
  T* sums;
  int64_t sums_stride;
  if constexpr (narrows) {
    sums_stride = end - begin;
    sums = offset + block_outputs;
  } else {
    sums_stride = result_stride;
    sums = static_cast<Result*>(result) + begin;
  }

  const auto part_at = [=](int64_t output, int64_t term) -> Part {
    const int64_t outputs_left = end - output, terms_left = terms - term;
    return {output, outputs_left < block_outputs ? outputs_left : block_outputs, term,
            terms_left < block_terms ? terms_left : block_terms};
  };
  for (int64_t term = 0; term < terms; term += block_terms)
    for (int64_t first = begin; first < end; first += block_outputs) {
      const Part part = part_at(first, term);
      const Panels<T> panels{mixed, part.terms};
      if (first == begin) stage_rows<T, Result>(x, in_place, m, term, part.terms, staged_rows.row_stride, staged);
      mix_panels<forward, Operand, Result>(mixing, part, panels);
      if (bias && term == 0)
        for (int64_t j = 0; j < part.outputs; ++j) offset[j] = widen(static_cast<const Result*>(bias)[first + j]);
      const bool is_last = first + block_outputs >= end;
      Prefetch next = prefetch_of<forward, Operand>(mixing, is_last ? part_at(begin, term + block_terms)
                                                                    : part_at(first + block_outputs, term));
      const auto multiply_tile_of_rows = [&](int64_t row, int64_t output, auto& prefetch) {
        const bool is_staged = row >= in_place;
        const Rows layout = is_staged ? staged_rows : Rows{x.row_stride};
        const T* left = is_staged ? staged + (row - in_place) * staged_rows.row_stride
                                  : reinterpret_cast<const T*>(address<T>(x, row, term));
        const int64_t width = panels.width(output, part.outputs);
        T* out = sums + row * sums_stride + (first - begin) + output;
        const T* base = term ? out : offset + output;
        const int64_t base_stride = term ? sums_stride : 0;
        if (row + tile_rows <= m && output + width <= part.outputs && !in_short_pieces) {
          multiply_panel(layout, width, piece, part.terms, left, panels.at(output), base, base_stride, out, sums_stride,
                         prefetch);
          return;
        }
        // Beside the result where the tile sticks out of it, in the same order; and where a block's short pieces are
        // added up before they are added to others.
        T edge[tile_rows * panel<T>] = {};
        const int64_t rows_left = m - row < tile_rows ? m - row : tile_rows;
        const int64_t outputs_left = part.outputs - output < width ? part.outputs - output : width;
        for (int64_t i = 0; i < rows_left; ++i)
          for (int64_t j = 0; j < outputs_left && !in_short_pieces; ++j)
            edge[i * panel<T> + j] = base[i * base_stride + j];
        multiply_panel(layout, width, piece, part.terms, left, panels.at(output), edge, panel<T>, edge, panel<T>,
                       prefetch);
        for (int64_t i = 0; i < rows_left; ++i)
          for (int64_t j = 0; j < outputs_left; ++j) {
            const T sum = edge[i * panel<T> + j];
            out[i * sums_stride + j] = in_short_pieces ? base[i * base_stride + j] + sum : sum;
          }
      };
      NoPrefetch nothing;
      if (shape.fetches_next) {
        for (int64_t output = 0; output < part.outputs; output += panel<T>)
          for (int64_t row = 0; row < m; row += tile_rows) multiply_tile_of_rows(row, output, next);
      } else {
        for (int64_t row = 0; row < m; row += tile_rows)
          for (int64_t output = 0; output < part.outputs; output += panel<T>)
            multiply_tile_of_rows(row, output, nothing);
      }
    }
  if constexpr (narrows)
    for (int64_t row = 0; row < m; ++row)
      for (int64_t output = begin; output < end; ++output)
        put<Result>(sums[row * sums_stride + output - begin],
                    static_cast<Result*>(result) + row * result_stride + output);
}

#if defined(MIXOUT_HAS_COMPRESS)
// The weight's gradient is a product over the rows of x and dy. The kept columns of x are its vector operand, staged in
// panels for all threads first; the gradient's own rows are taken as many at a time as keep their sums in L2, so many
// elements, but at least so many rows, which read each panel again. Measured on 2 cores at p = 0.1: blocks of 128
// terms, a panel of which fits L1, 7.7 ms at 2048x768x768, of 256 8.0, of 64 8.0; twice the elements 28.1 -> 29.6 ms at
// 2048x768x3072; without the least of rows 30.3 -> 32.7 ms at 2048x3072x768; without fetching the next panel ahead
// 7.6 -> 8.2 ms at 2048x768x768.
constexpr int64_t block_rows_of_x = 128;
constexpr int64_t block_sums = 256 * 1024;
constexpr int64_t least_block_rows = 192;
constexpr int64_t tile_size = block_rows_of_x * tile_rows + 16; // off the power of two here too
// Sums of so many rows are added up apart. One by one the sums of blocks, or of their pieces, have 3 times the
// library's error at 20000 rows.
constexpr int64_t summed_rows = 16 * block_rows_of_x;

// The kept columns of x: blocks of rows, the last one lower, each in panels.
template <typename T>
Panels<T> kept_panels(T* data, int64_t m, int64_t padded, int64_t term) {
  return {data + term * padded, m - term < block_rows_of_x ? m - term : block_rows_of_x};
}

// Rows [begin, end) of them, filled up with 0 to whole vectors.
template <typename T>
void stage_kept(const KeptX& kept_x, int64_t begin, int64_t end, void* out) {
  const auto [x, m, index, count] = kept_x;
  const int64_t padded = round_up(count, lanes<T>), stride = padded + lanes<T>;
  // Several rows at a time: their parts are stored well before they are loaded again as whole vectors.
  constexpr int64_t height = 8;
  T* rows = scratch<T>(Slot::rows, height * stride);
  const KeptColumns<T> kept(index, index ? count : 0);
  for (int64_t first = begin; first < end; first += height) {
    const int64_t last = first + height < end ? first + height : end;
    for (int64_t k = first; k < last; ++k) {
      const T* source = static_cast<const T*>(x.data) + k * x.row_stride;
      T* row = rows + (k - first) * stride;
      if (index && x.column_stride == 1) kept.take(source, row);
      else
        for (int64_t j = 0; j < count; ++j) row[j] = source[(index ? index[j] : j) * x.column_stride];
      memset(row + count, 0, (padded - count) * sizeof(T));
    }
    for (int64_t k = first; k < last; ++k) {
      const int64_t term = k / block_rows_of_x * block_rows_of_x;
      const Panels<T> panels = kept_panels(static_cast<T*>(out), m, padded, term);
      const T* row = rows + (k - first) * stride;
      for (int64_t column = 0; column < padded; column += panel<T>) {
        const int64_t width = panels.width(column, padded);
        T* to = panels.at(column) + (k - term) * width;
        for (int64_t v = 0; v < width; v += lanes<T>) store(to + v, load(row + column + v));
      }
    }
  }
}

template <typename T, typename Sum>
MIXOUT_INLINE void add_and_clear(T* __restrict from, int64_t count, Sum* __restrict to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += from[i];
    from[i] = T{0};
  }
}

// Columns [first, first + columns) of rows [term, term + terms) of dy as broadcast operands, one per tile of columns:
// [tiles][tile_size], a tile [terms][tile_rows], filled up with 0. Adds the rows to `sums`, which ends with a vector:
// sixteen at once and of these four, for an error like that of the library's sum, and from L1, behind the copies, which
// would wait.
template <typename T>
void stage_tiles(Matrix dy, int64_t term, int64_t terms, int64_t first, int64_t columns, T* staged, T* sums) {
  const T* source = static_cast<const T*>(dy.data) + term * dy.row_stride + first * dy.column_stride;
  for (int64_t start = 0; start < terms; start += 16) {
    const int64_t end = start + 16 < terms ? start + 16 : terms;
    for (int64_t k = start; k < end; ++k) {
      const T* row = source + k * dy.row_stride;
      for (int64_t column = 0; column < columns; column += tile_rows) {
        T* out = staged + column / tile_rows * tile_size + k * tile_rows;
        if (columns - column >= tile_rows && dy.column_stride == 1) memcpy(out, row + column, tile_rows * sizeof(T));
        else
          for (int64_t i = 0; i < tile_rows; ++i)
            out[i] = column + i < columns ? row[(column + i) * dy.column_stride] : T{0};
      }
    }
    for (int64_t column = 0; column < columns; column += lanes<T>) {
      const int64_t width = columns - column < lanes<T> ? columns - column : lanes<T>;
      Vector<T> sum{};
      for (int64_t k = start; k < end; k += 4) {
        Vector<T> part{};
        for (int64_t i = k; i < k + 4 && i < end; ++i)
          part += load_widened<T>(source + i * dy.row_stride + column * dy.column_stride, dy.column_stride, width);
        sum += part;
      }
      store(sums + column, load(sums + column) + sum);
    }
  }
}

// Finished rows of dW on their way to memory, past the caches as by stream_row, a vector a step.
template <typename T>
class FinishedRows {
public:
  FinishedRows(const KeptX& kept_x, const int32_t* index, int64_t columns, double factor, void* dw)
      : kept_(index, kept_x.count), columns_(columns), factor_(broadcast(static_cast<T>(factor))),
        dw_(static_cast<T*>(dw)),
        streams_(columns % lanes<T> == 0 && reinterpret_cast<uintptr_t>(dw) % MIXOUT_VECTOR_BYTES == 0) {}
  ~FinishedRows() { _mm_sfence(); }

  // Rows from `first` on: their kept columns before the factor, so far apart, with room for a vector behind the last.
  void put(const T* sums, int64_t stride, int64_t first, int64_t rows) {
    finish();
    sums_ = kept_columns_ = sums;
    stride_ = stride;
    out_ = dw_ + first * columns_;
    rows_left_ = rows;
  }

  MIXOUT_INLINE void step() {
    if (rows_left_ == 0) return;
    alignas(MIXOUT_VECTOR_BYTES) T values[lanes<T>];
    store(values, kept_.next(column_ / lanes<T>, kept_columns_) * factor_);
    if (streams_) stream_vector(values, out_ + column_);
    else memcpy(out_ + column_, values, (columns_ - column_ < lanes<T> ? columns_ - column_ : lanes<T>)*sizeof(T));
    column_ += lanes<T>;
    if (column_ < columns_) return;
    column_ = 0;
    out_ += columns_;
    kept_columns_ = sums_ += stride_;
    --rows_left_;
  }

  void finish() {
    while (rows_left_) step();
  }

private:
  KeptColumns<T> kept_;
  int64_t columns_;
  Vector<T> factor_;
  T* dw_;
  bool streams_;
  const T *sums_ = nullptr, *kept_columns_ = nullptr;
  T* out_ = nullptr;
  int64_t stride_ = 0, rows_left_ = 0, column_ = 0;
};

// Rows [begin, end) of dW (outputs, columns) = (x^T dy)^T * factor and of db, the sums of dy (m, outputs). The sums of
// a block are panels, [block_rows][panel]. Where x is one block they are rows instead, and are written while the next
// few are multiplied: a step at 128x768x768 takes 3 to 5 % less. Of more blocks dW takes 3 to 5 % more with sums in
// rows.
template <typename T>
void grad_weight(const KeptX& kept_x, const void* staged_x, Matrix dy, int64_t outputs, const int32_t* index,
                 int64_t columns, double factor, int64_t begin, int64_t end, void* dw, void* db) {
  static_assert(lanes<T> % tile_rows == 0 && output_unit % lanes<T> == 0);
  const int64_t m = kept_x.rows, count = kept_x.count, padded = round_up(count, lanes<T>);
  const int64_t piece = summed_at_once(count, outputs);
  const int64_t in_l2 = block_sums / (padded + tile_size / tile_rows);
  const int64_t most_rows = in_l2 > least_block_rows ? in_l2 : least_block_rows;
  const int64_t blocks = (end - begin + most_rows - 1) / most_rows;
  const bool writes_behind = m <= block_rows_of_x;
  const int64_t block_rows = writes_behind ? panel_outputs
                             : blocks      ? round_up((end - begin + blocks - 1) / blocks, output_unit)
                                           : 0;
  const int64_t staged_size = block_rows / tile_rows * tile_size;
  const int64_t row_size = padded + lanes<T>; // off the power of two, and with room for a vector
  const int64_t sums_size = block_rows * row_size;
  const bool has_totals = m > summed_rows;
  // db is summed in blocks, and those in fp64: of fp32 it has 0.3 to 0.4 of the library's error (in fp32 1.1 to 1.3
  // times); of fp64 16 at a time, 16 of these, and all, for one addition up less has 3 times it at 200000 rows.
  constexpr int levels = sizeof(T) < sizeof(double) ? 1 : 3;
  constexpr int64_t dy_sums_size = 1 + levels * sizeof(double) / sizeof(T);
  T* totals = scratch<T>(Slot::block, (1 + (writes_behind || has_totals)) * sums_size + staged_size + panel<T> +
                                          dy_sums_size * block_rows);
  T* other_sums = totals + sums_size; // of the block before, or of the terms since the last totals
  T* staged = totals + (1 + (writes_behind || has_totals)) * sums_size;
  T* zeros = staged + staged_size;
  T* x_panels = const_cast<T*>(static_cast<const T*>(staged_x));
  T* dy_sums = zeros + panel<T>;
  double* dy_totals[levels];
  for (int level = 0; level < levels; ++level)
    dy_totals[level] = reinterpret_cast<double*>(dy_sums + block_rows) + level * block_rows;
  memset(zeros, 0, (panel<T> + dy_sums_size * block_rows) * sizeof(T));
  FinishedRows<T> finished(kept_x, index, columns, factor, dw);
  T* tile = scratch<T>(Slot::rows, tile_rows * row_size);
  for (int64_t first = begin; first < end; first += block_rows) {
    const int64_t rows = end - first < block_rows ? end - first : block_rows;
    if (m == 0 || has_totals) memset(totals, 0, sums_size * sizeof(T));
    T* sums = has_totals ? other_sums : totals;
    for (int64_t term = 0; term < m; term += block_rows_of_x) {
      const Panels<T> panels = kept_panels(x_panels, m, padded, term);
      stage_tiles(dy, term, panels.terms, first, rows, staged, dy_sums);
      const int64_t next_term = term + panels.terms;
      const bool begins = term % summed_rows == 0, ends = next_term % summed_rows == 0 || next_term == m;
      add_and_clear(dy_sums, rows, dy_totals[0]);
      int64_t level_rows = 16 * block_rows_of_x;
      for (int level = 0; level < levels - 1; ++level, level_rows *= 16)
        if (next_term % level_rows == 0 || next_term == m) add_and_clear(dy_totals[level], rows, dy_totals[level + 1]);

      Prefetch prefetch;
      if (dy.column_stride == 1 && (next_term < m || first + rows < end)) {
        prefetch.first = next_term < m ? address<T>(dy, next_term, first) : address<T>(dy, 0, first + rows);
        prefetch.first_stride = dy.row_stride * static_cast<int64_t>(sizeof(T));
        prefetch.rows = m - next_term < block_rows_of_x ? m - next_term : block_rows_of_x;
        if (next_term == m) prefetch.rows = m < block_rows_of_x ? m : block_rows_of_x;
        prefetch.lines = (rows * static_cast<int64_t>(sizeof(T)) + 63) / 64;
      }
      const auto multiply_block = [&](auto& beside) {
        for (int64_t column = 0; column < padded; column += panel<T>) {
          const int64_t width = panels.width(column, padded), size = width * panels.terms;
          const T* right = panels.at(column);
          for (int64_t row = 0; row < rows; row += tile_rows) {
            if (first == begin || !writes_behind) // a tile's share of the next panel, which stays in L2 where all do
              for (int64_t i = size * row / rows; i < size * (row + tile_rows) / rows; i += lanes<T>)
                __builtin_prefetch(right + size + i, 0, 2);
            T* c = writes_behind ? sums + row * row_size + column : sums + column * block_rows + row * width;
            const int64_t c_stride = writes_behind ? row_size : width;
            multiply_panel(TransposedTiles{}, width, piece, panels.terms, staged + row / tile_rows * tile_size, right,
                           begins ? zeros : c, begins ? 0 : c_stride, c, c_stride, beside);
            if (has_totals && ends) add_and_clear(c, tile_rows * width, totals + (c - sums));
          }
        }
      };
      if (writes_behind) multiply_block(finished);
      else multiply_block(prefetch);
    }
    if (writes_behind) {
      finished.put(sums, row_size, first, rows);
      std::swap(totals, other_sums);
    }
    // A tile of rows at once: stored well before they are loaded from between two vectors.
    for (int64_t row = 0; row < rows && !writes_behind; row += tile_rows) {
      const int64_t height = rows - row < tile_rows ? rows - row : tile_rows;
      for (int64_t i = 0; i < height; ++i)
        for (int64_t column = 0; column < padded; column += panel<T>) {
          const int64_t width = Panels<T>::width(column, padded);
          memcpy(tile + i * row_size + column, totals + column * block_rows + (row + i) * width, width * sizeof(T));
        }
      finished.put(tile, row_size, first + row, height);
      finished.finish();
    }
    for (int64_t i = 0; db && i < rows; ++i) static_cast<T*>(db)[first + i] = static_cast<T>(dy_totals[levels - 1][i]);
    memset(dy_totals[levels - 1], 0, rows * sizeof(double));
  }
  finished.finish();
}
#endif

template <typename Operand, typename Result>
constexpr Kernels make_kernels() {
  Kernels kernels = {mix<Operand, Result>,       multiply<true, Operand, Result>, multiply<false, Operand, Result>,
                     mask_grad<Operand, Result>, expand<Operand, Result>,         expand_rows<Operand, Result>};
#if defined(MIXOUT_HAS_COMPRESS)
  if constexpr (std::is_same_v<Operand, Result> && std::is_same_v<Operand, Compute<Operand>>) {
    kernels.stage_kept = stage_kept<Operand>;
    kernels.grad_weight = grad_weight<Operand>;
  }
#endif
  return kernels;
}

template <typename Operand, typename Result>
constexpr Kernels kernels_for = make_kernels<Operand, Result>();

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

extern const InstructionSet instruction_set = {MIXOUT_ISA_NAME, draw, gather, kernels};

} // namespace mixout_fast::cpu::MIXOUT_ISA
