// dW and db by a product of our own, with AVX-512 only.
#pragma once

#include "kept_columns.inl"
#include "tiles.inl"

namespace mixout_fast::cpu::MIXOUT_ISA {
namespace {

#if defined(MIXOUT_HAS_COMPRESS)
// The weight's gradient is a product whose terms are the rows of x and dy. Its vector operand is the kept columns of x,
// first staged in panels for all threads. dW's rows are computed in blocks whose sums, block_sums elements, stay in L2;
// but a block has at least least_block_rows rows, because each block reads every panel again. Measured on 2 cores at
// p = 0.1: blocks of 128 terms, whose panels fit L1, 7.7 ms at 2048x768x768, of 256 terms 8.0, of 64 terms 8.0; with
// twice the block_sums 28.1 -> 29.6 ms at 2048x768x3072; without least_block_rows 30.3 -> 32.7 ms at 2048x3072x768;
// without prefetching the next panel 7.6 -> 8.2 ms at 2048x768x768.
constexpr int64_t block_rows_of_x = 128;
constexpr int64_t block_sums = 256 * 1024;
constexpr int64_t least_block_rows = 192;
constexpr int64_t tile_size = block_rows_of_x * tile_rows + 16; // off the power of two, as in products.inl
// The sums over every summed_rows rows of x are added up on their own, and then added to the totals. Adding the sums of
// blocks, or of their pieces, one by one gives 3 times the library's error at 20000 rows.
constexpr int64_t summed_rows = 16 * block_rows_of_x;

// The staged kept columns of x lie in blocks of block_rows_of_x rows (the last may have fewer), each in panels. This is
// the block that begins with row `term`.
template <typename T>
Panels<T> kept_panels(T* data, int64_t m, int64_t padded, int64_t term) {
  return {data + term * padded, m - term < block_rows_of_x ? m - term : block_rows_of_x};
}

// Stages rows [begin, end) of the kept columns, padded with zeros to whole vectors.
template <typename T>
void stage_kept(const KeptX& kept_x, int64_t begin, int64_t end, void* out) {
  const auto [x, m, index, count] = kept_x;
  const int64_t padded = round_up(count, lanes<T>), stride = padded + lanes<T>;
  // Several rows at a time, so that whole vectors are loaded well after the overlapping stores that wrote them.
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

// Stages columns [first, first + columns) of rows [term, term + terms) of dy as broadcast operands, one per tile of
// columns: [tiles][tile_size], each tile [terms][tile_rows], padded with zeros. Adds the rows to `sums`, which is
// padded to whole vectors: in groups of four within groups of sixteen, for an error like that of the library's sum, and
// after the copies, when the rows are in L1.
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

// Writes finished rows of dW to memory, a vector a step, past the caches as stream_row does.
template <typename T>
class FinishedRows {
public:
  FinishedRows(const KeptX& kept_x, const int32_t* index, int64_t columns, double factor, void* dw)
      : kept_(index, kept_x.count), columns_(columns), factor_(broadcast(static_cast<T>(factor))),
        dw_(static_cast<T*>(dw)),
        streams_(columns % lanes<T> == 0 && reinterpret_cast<uintptr_t>(dw) % MIXOUT_VECTOR_BYTES == 0) {}
  ~FinishedRows() { _mm_sfence(); }

  // Takes rows [first, first + rows): `sums` holds their kept columns before the factor, rows `stride` apart, with room
  // for a vector behind the last.
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

// Writes a block's outputs of a column-major dW from their sums, which are in panels; dw points to the first output.
template <typename T>
void put_transposed(Panels<const T> sums, int64_t rows, const int32_t* index, int64_t count, int64_t columns,
                    double factor, int64_t outputs, T* dw) {
  const int64_t padded = round_up(count, lanes<T>), width = round_up(rows, lanes<T>);
  T* block = scratch<T>(Slot::rows, lanes<T> * width);
  put_between_zeros(index, count, 0, columns, rows, outputs, dw, [=](int64_t j) {
    const int64_t lane = j % lanes<T>, panel_start = j / panel<T> * panel<T>;
    if (lane == 0) {
      const T* first = sums.at(panel_start) + (j - panel_start);
      for (int64_t row = 0; row < width; row += lanes<T>) {
        Vector<T> tile[lanes<T>];
        for (int64_t i = 0; i < lanes<T>; ++i) tile[i] = load(first + (row + i) * sums.width(panel_start, padded));
        transpose<T>(tile);
        for (int64_t i = 0; i < lanes<T>; ++i)
          store(block + i * width + row, tile[i] * broadcast(static_cast<T>(factor)));
      }
    }
    return block + lane * width;
  });
}

// Rows [begin, end) of dW (outputs, columns) = (x^T dy)^T * factor and of db, the sums of dy (m, outputs). A block's
// sums are panels, [block_rows][panel]. Where x is one block and dW is row-major, the sums are rows instead, and are
// written while the next block of dW's rows is multiplied: a step at 128x768x768 takes 3 to 5 % less. With more blocks
// of x, sums in rows make dW 3 to 5 % slower.
template <typename T>
void grad_weight(const KeptX& kept_x, const void* staged_x, Matrix dy, int64_t outputs, const int32_t* index,
                 int64_t columns, double factor, int64_t begin, int64_t end, bool column_major, void* dw, void* db) {
  static_assert(lanes<T> % tile_rows == 0 && output_unit % lanes<T> == 0);
  const int64_t m = kept_x.rows, count = kept_x.count, padded = round_up(count, lanes<T>);
  const int64_t piece = summed_at_once(count, outputs);
  const int64_t in_l2 = block_sums / (padded + tile_size / tile_rows);
  const int64_t most_rows = in_l2 > least_block_rows ? in_l2 : least_block_rows;
  const int64_t blocks = (end - begin + most_rows - 1) / most_rows;
  const bool writes_behind = m <= block_rows_of_x && !column_major;
  const int64_t block_rows = writes_behind ? panel_outputs
                             : blocks      ? round_up((end - begin + blocks - 1) / blocks, output_unit)
                                           : 0;
  const int64_t staged_size = block_rows / tile_rows * tile_size;
  const int64_t row_size = padded + lanes<T>; // off the power of two, and with room for a vector
  const int64_t sums_size = block_rows * row_size;
  const bool has_totals = m > summed_rows;
  // dy is summed in blocks for db, and the blocks' sums are added up in fp64. In fp32 db has 0.3 to 0.4 of the
  // library's error (1.1 to 1.3 times it with the blocks' sums added up in fp32). In fp64 they are added up in three
  // levels: 16 blocks, 16 of those, and the rest; with two levels the error is 3 times the library's at 200000 rows.
  constexpr int levels = sizeof(T) < sizeof(double) ? 1 : 3;
  constexpr int64_t dy_sums_size = 1 + levels * sizeof(double) / sizeof(T);
  T* totals = scratch<T>(Slot::block, (1 + (writes_behind || has_totals)) * sums_size + staged_size + panel<T> +
                                          dy_sums_size * block_rows);
  T* other_sums = totals + sums_size; // those of the previous block, or since the last addition to totals
  T* staged = totals + (1 + (writes_behind || has_totals)) * sums_size;
  T* zeros = staged + staged_size;
  T* x_panels = const_cast<T*>(static_cast<const T*>(staged_x));
  T* dy_sums = zeros + panel<T>;
  double* dy_totals[levels];
  for (int level = 0; level < levels; ++level)
    dy_totals[level] = reinterpret_cast<double*>(dy_sums + block_rows) + level * block_rows;
  memset(zeros, 0, (panel<T> + dy_sums_size * block_rows) * sizeof(T));
  FinishedRows<T> finished(kept_x, index, columns, factor, dw);
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
            if (first == begin || !writes_behind) // a tile's share of the next panel; x of one block stays in L2
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
      T* const written_next = totals;
      totals = other_sums;
      other_sums = written_next;
    }
    if (column_major) {
      put_transposed<T>({totals, block_rows}, rows, index, count, columns, factor, outputs,
                        static_cast<T*>(dw) + first);
    } else if (!writes_behind) {
      // A tile of rows at once, so that each row is loaded, across the stored vectors, well after it was stored.
      T* tile = scratch<T>(Slot::rows, tile_rows * row_size);
      for (int64_t row = 0; row < rows; row += tile_rows) {
        const int64_t height = rows - row < tile_rows ? rows - row : tile_rows;
        for (int64_t i = 0; i < height; ++i)
          for (int64_t column = 0; column < padded; column += panel<T>) {
            const int64_t width = Panels<T>::width(column, padded);
            memcpy(tile + i * row_size + column, totals + column * block_rows + (row + i) * width, width * sizeof(T));
          }
        finished.put(tile, row_size, first + row, height);
        finished.finish();
      }
    }
    for (int64_t i = 0; db && i < rows; ++i) static_cast<T*>(db)[first + i] = static_cast<T>(dy_totals[levels - 1][i]);
    memset(dy_totals[levels - 1], 0, rows * sizeof(double));
  }
  finished.finish();
}
#endif

} // namespace
} // namespace mixout_fast::cpu::MIXOUT_ISA
