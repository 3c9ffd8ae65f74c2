// An instruction set's vectors, how they are loaded from rows and stored, and the memory that a thread keeps.
#pragma once

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
// What GCC's vector extensions compile badly or cannot express: broadcasts, fused multiply-add (in products only;
// mixing rounds each step), products of the lanes' low halves, streaming stores, compressing and spreading lanes.
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
#endif

// A vector of `count` widened elements, the rest 0. The full, contiguous case has a constant trip count and vectorises.
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

// A thread's memory per type and slot, which only grows: blocks of a product, or whole operands of few rows.
enum class Slot { mask, weight, target, rows, block, totals, tiles, bias_block, bias_totals, count };
template <typename T>
T* scratch(Slot slot, int64_t count) {
  struct Buffer {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { free(data); }
  };
  static thread_local Buffer buffers[static_cast<int>(Slot::count)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)) + 1, 64); // + 1: memset takes no null
  if (buffer.bytes < bytes) {
    free(buffer.data);
    buffer.bytes = 0;
    buffer.data = aligned_alloc(64, bytes);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return static_cast<T*>(buffer.data);
}

// The address of an element of a matrix whose columns are adjacent.
template <typename T>
const char* address(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * static_cast<int64_t>(sizeof(T));
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

} // namespace
} // namespace mixout_fast::cpu::MIXOUT_ISA
