// The kept columns of a matrix: gathered, taken out of its rows, and put back between zeros.
#pragma once

#include "vectors.inl"

namespace mixout_fast::cpu::MIXOUT_ISA {
namespace {

template <typename T>
void gather_elements(Matrix x, const int32_t* __restrict index, int64_t count, int64_t begin, int64_t end, void* out) {
  const int64_t kept = kept_count(index, count);
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict source = row_segment<T>(x, row, 0, kept ? index[kept - 1] + 1 : 0, Slot::weight);
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
  // Reads nothing of `row` past the last kept column; `out` has room for one vector more than the kept columns.
  MIXOUT_INLINE void take(const T* row, T* out) const {
    if (count_ == 0) return;
    const int64_t last = vectors_ - 1;
    for (int64_t v = 0; v < last; ++v) {
      store(out, compress(load(row + v * lanes<T>), kept_[v]));
      out += __builtin_popcount(kept_[v]);
    }
    for (uint32_t kept = kept_[last]; kept; kept &= kept - 1) *out++ = row[last * lanes<T> + __builtin_ctz(kept)];
  }

  // Vector v of a row. `columns` points to the row's kept columns from this vector on, and moves past the vector's own.
  MIXOUT_INLINE Vector<T> next(int64_t v, const T*& columns) const {
    if (v >= vectors_) return Vector<T>{};
    const Vector<T> row = spread(columns, kept_[v]);
    columns += __builtin_popcount(kept_[v]);
    return row;
  }
#endif

  // `row` has room for whole vectors; its dropped columns are 0 already.
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

// Rows [begin, end) of a column-major dense gradient's transpose (K, N): `width` elements of each, the rows `stride`
// apart. The j-th kept row is row(j), called with ascending j, which returns memory padded to whole vectors; the other
// rows are 0.
template <typename T, typename Row>
void put_between_zeros(const int32_t* index, int64_t count, int64_t begin, int64_t end, int64_t width, int64_t stride,
                       T* out, const Row& row) {
  T* zeros = scratch<T>(Slot::weight, width);
  memset(zeros, 0, width * sizeof(T));
  int64_t j = 0;
  while (j < count && index[j] < begin) ++j;
  for (int64_t k = begin; k < end; ++k) {
    const bool is_kept = j < count && index[j] == k;
    stream_row(is_kept ? row(j++) : zeros, width, out + k * stride);
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename Operand, typename Result>
void expand_rows(Matrix compact, const int32_t* index, int64_t count, int64_t columns, double factor, int64_t begin,
                 int64_t end, void* out) {
  using T = Compute<Operand>;
  Result* kept = scratch<Result>(Slot::block, columns);
  const auto kept_row = [=](int64_t j) {
    const Operand* __restrict source = static_cast<const Operand*>(compact.data) + j * compact.row_stride;
    for (int64_t k = 0; k < columns; ++k)
      kept[k] = narrow<Result>(multiply(widen(source[k * compact.column_stride]), static_cast<T>(factor)));
    return kept;
  };
  put_between_zeros(index, kept_count(index, count), begin, end, columns, columns, static_cast<Result*>(out), kept_row);
}

} // namespace
} // namespace mixout_fast::cpu::MIXOUT_ISA
