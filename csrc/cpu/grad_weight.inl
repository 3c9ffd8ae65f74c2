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
constexpr int64_t tile_stride = block_rows_of_x * tile_rows + 16; // off the power of two, as in products.inl
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

// Stages columns [first, first + columns) of rows [term, term + terms) of dy as broadcast operands, one per tile of
// columns: [tiles][tile_stride], each tile [terms][tile_rows], padded with zeros. Adds the rows to `sums`, which is
// padded to whole vectors: in groups of four within groups of sixteen, for an error like that of the library's sum, and
// after the copies, when the rows are in L1.
template <typename T>
void stage_tiles(Matrix dy, int64_t term, int64_t terms, int64_t first, int64_t columns, T* tiles, T* sums) {
  const T* source = static_cast<const T*>(dy.data) + term * dy.row_stride + first * dy.column_stride;
  for (int64_t start = 0; start < terms; start += 16) {
    const int64_t end = start + 16 < terms ? start + 16 : terms;
    for (int64_t k = start; k < end; ++k) {
      const T* row = source + k * dy.row_stride;
      for (int64_t column = 0; column < columns; column += tile_rows) {
        T* out = tiles + column / tile_rows * tile_stride + k * tile_rows;
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

// Prefetches what stage_tiles reads of the block of dy that begins with row `term`.
template <typename T>
Prefetch prefetch_of_dy(Matrix dy, int64_t m, int64_t term, int64_t first, int64_t columns) {
  if (dy.column_stride != 1) return {};
  constexpr int64_t size = sizeof(T);
  const int64_t terms = m - term < block_rows_of_x ? m - term : block_rows_of_x;
  return {address<T>(dy, term, first), nullptr, dy.row_stride * size, 0, terms, (columns * size + 63) / 64};
}

// The sums of columns of dy, for db. dy is summed in blocks of block_rows_of_x rows, and the blocks' sums are added up
// in fp64. In fp32 db has 0.3 to 0.4 of the library's error (1.1 to 1.3 times it with the blocks' sums added up in
// fp32). In fp64 they are added up in three levels: 16 blocks, 16 of those, and the rest; with two levels the error is
// 3 times the library's at 200000 rows.
template <typename T>
class BiasSums {
public:
  explicit BiasSums(int64_t columns)
      : columns_(columns), block_(scratch<T>(Slot::bias_block, round_up(columns, lanes<T>))),
        totals_(scratch<double>(Slot::bias_totals, levels * columns)), last_(totals_ + (levels - 1) * columns) {
    memset(block_, 0, columns * sizeof(T));
    memset(totals_, 0, levels * columns * sizeof(double));
  }

  // The present block's sums, to which its rows are added. Padded to whole vectors.
  T* block() { return block_; }

  void end_block() {
    add_and_clear(block_, totals_);
    int64_t ended = ++blocks_;
    for (double* level = totals_; level < last_ && ended % 16 == 0; level += columns_, ended /= 16)
      add_and_clear(level, level + columns_);
  }

  void put(T* db) {
    for (double* level = totals_; level < last_; level += columns_) add_and_clear(level, level + columns_);
    for (int64_t i = 0; i < columns_; ++i) db[i] = static_cast<T>(last_[i]);
  }

private:
  template <typename Sum>
  MIXOUT_INLINE void add_and_clear(Sum* __restrict from, double* __restrict to) const {
    for (int64_t i = 0; i < columns_; ++i) {
      to[i] += from[i];
      from[i] = 0;
    }
  }

  static constexpr int levels = sizeof(T) < sizeof(double) ? 1 : 3;
  int64_t columns_, blocks_ = 0;
  T* block_;
  double *totals_, *last_; // [levels][columns], and the last level
};

// The operands of dW: x's staged kept columns, padded to whole vectors, and dy. `piece` of their m rows are summed one
// by one.
template <typename T>
struct Operands {
  const T* x;
  Matrix dy;
  int64_t m, padded, piece;
};

// dW (outputs, columns), in which the `count` columns numbered `index` are sums times factor, and db, which may be
// null.
template <typename T>
struct Gradients {
  T *dw, *db;
  const int32_t* index;
  int64_t count, columns, outputs;
  T factor;
  bool column_major;
};

// Writes finished rows of a row-major dW to memory, a vector a step, past the caches as stream_row does.
template <typename T>
class FinishedRows {
public:
  explicit FinishedRows(const Gradients<T>& out)
      : kept_(out.index, out.count), columns_(out.columns), factor_(broadcast(out.factor)), dw_(out.dw),
        streams_(columns_ % lanes<T> == 0 && reinterpret_cast<uintptr_t>(dw_) % MIXOUT_VECTOR_BYTES == 0) {}
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

// Writes rows [first, first + rows) of a row-major dW, a tile of rows at once, so that each row is loaded, across the
// stored vectors, well after it was stored.
template <typename T>
void put_row_major(Panels<T> sums, int64_t padded, int64_t first, int64_t rows, FinishedRows<T>& finished) {
  const int64_t stride = padded + lanes<T>;
  T* tile = scratch<T>(Slot::rows, tile_rows * stride);
  for (int64_t row = 0; row < rows; row += tile_rows) {
    const int64_t height = rows - row < tile_rows ? rows - row : tile_rows;
    for (int64_t i = 0; i < height; ++i)
      for (int64_t column = 0; column < padded; column += panel<T>) {
        const int64_t width = sums.width(column, padded);
        memcpy(tile + i * stride + column, sums.at(column) + (row + i) * width, width * sizeof(T));
      }
    finished.put(tile, stride, first + row, height);
    finished.finish();
  }
}

// Writes rows [first, first + rows) of a column-major dW.
template <typename T>
void put_column_major(Panels<T> sums, int64_t padded, int64_t first, int64_t rows, const Gradients<T>& out) {
  const int64_t width = round_up(rows, lanes<T>);
  const Vector<T> factor = broadcast(out.factor);
  T* block = scratch<T>(Slot::rows, lanes<T> * width);
  put_between_zeros(out.index, out.count, 0, out.columns, rows, out.outputs, out.dw + first, [=](int64_t j) {
    const int64_t lane = j % lanes<T>, panel_start = j / panel<T> * panel<T>;
    if (lane == 0) {
      const T* sum = sums.at(panel_start) + (j - panel_start);
      for (int64_t row = 0; row < width; row += lanes<T>) {
        Vector<T> tile[lanes<T>];
        for (int64_t i = 0; i < lanes<T>; ++i) tile[i] = load(sum + (row + i) * sums.width(panel_start, padded));
        transpose<T>(tile);
        for (int64_t i = 0; i < lanes<T>; ++i) store(block + i * width + row, tile[i] * factor);
      }
    }
    return block + lane * width;
  });
}

// Calls multiply(row, column, width) for each tile of a block of dW's rows and a panel of a block of x. With `fetches`,
// a tile's share of the next panel is prefetched before it.
template <typename T, typename Function>
MIXOUT_INLINE void for_each_tile(Panels<const T> x, int64_t padded, int64_t rows, bool fetches,
                                 const Function& multiply) {
  for (int64_t column = 0; column < padded; column += panel<T>) {
    const int64_t width = x.width(column, padded), size = width * x.terms;
    for (int64_t row = 0; row < rows; row += tile_rows) {
      for (int64_t i = size * row / rows; fetches && i < size * (row + tile_rows) / rows; i += lanes<T>)
        __builtin_prefetch(x.at(column) + size + i, 0, 2);
      multiply(row, column, width);
    }
  }
}

// Rows [begin, end) of a row-major dW, and of db, where x is one block. The sums lie in rows, and are written while the
// next block of dW's rows is multiplied: a step at 128x768x768 takes 3 to 5 % less. With more blocks of x, sums in rows
// make dW 3 to 5 % slower. Flattened, as grad_weight_in_panels is: with a call per tile, dW of 16 rows takes 10 %
// longer.
template <typename T>
__attribute__((flatten)) void grad_weight_in_rows(const Operands<T>& in, const Gradients<T>& out, int64_t begin,
                                                  int64_t end) {
  constexpr int64_t block_rows = panel_outputs;
  const Panels<const T> x{in.x, in.m};
  const int64_t stride = in.padded + lanes<T>; // off the power of two, and with room for a vector
  T* sums_in_turn = scratch<T>(Slot::block, 2 * block_rows * stride);
  T* tiles = scratch<T>(Slot::tiles, block_rows / tile_rows * tile_stride);
  static constexpr T zeros[panel<T>] = {};
  FinishedRows<T> finished(out);
  int turn = 0;
  for (int64_t first = begin; first < end; first += block_rows) {
    const int64_t rows = end - first < block_rows ? end - first : block_rows;
    T* sums = sums_in_turn + turn * block_rows * stride;
    turn ^= 1;
    BiasSums<T> bias_sums(rows);
    stage_tiles(in.dy, 0, in.m, first, rows, tiles, bias_sums.block());
    bias_sums.end_block();
    if (out.db) bias_sums.put(out.db + first);
    const bool fetches = first == begin; // x stays in L2
    for_each_tile(x, in.padded, rows, fetches, [&](int64_t row, int64_t column, int64_t width) {
      multiply_panel(TransposedTiles{}, width, in.piece, in.m, tiles + row / tile_rows * tile_stride, x.at(column),
                     zeros, 0, sums + row * stride + column, stride, finished);
    });
    finished.put(sums, stride, first, rows);
  }
  finished.finish();
}

// Rows [begin, end) of dW and of db, with any number of rows of x. The sums of a block of dW's rows lie in panels,
// [block_rows][panel].
template <typename T>
__attribute__((flatten)) void grad_weight_in_panels(const Operands<T>& in, const Gradients<T>& out, int64_t begin,
                                                    int64_t end) {
  const int64_t m = in.m, padded = in.padded;
  const int64_t in_l2 = block_sums / (padded + tile_stride / tile_rows);
  const int64_t most_rows = in_l2 > least_block_rows ? in_l2 : least_block_rows;
  const int64_t blocks = (end - begin + most_rows - 1) / most_rows;
  const int64_t block_rows = round_up((end - begin + blocks - 1) / blocks, output_unit);
  const int64_t sums_size = block_rows * padded;
  const bool has_totals = m > summed_rows;
  const Panels<T> sums{scratch<T>(Slot::block, sums_size), block_rows};
  const Panels<T> totals{has_totals ? scratch<T>(Slot::totals, sums_size) : sums.data, block_rows};
  T* tiles = scratch<T>(Slot::tiles, block_rows / tile_rows * tile_stride);
  static constexpr T zeros[panel<T>] = {};
  FinishedRows<T> finished(out);
  for (int64_t first = begin; first < end; first += block_rows) {
    const int64_t rows = end - first < block_rows ? end - first : block_rows;
    if (m == 0 || has_totals) memset(totals.data, 0, sums_size * sizeof(T));
    BiasSums<T> bias_sums(rows);
    for (int64_t term = 0; term < m; term += block_rows_of_x) {
      const Panels<const T> x = kept_panels(in.x, m, padded, term);
      const int64_t next_term = term + x.terms;
      stage_tiles(in.dy, term, x.terms, first, rows, tiles, bias_sums.block());
      bias_sums.end_block();
      Prefetch next;
      if (next_term < m) next = prefetch_of_dy<T>(in.dy, m, next_term, first, rows);
      else if (first + rows < end) next = prefetch_of_dy<T>(in.dy, m, 0, first + rows, rows);
      const bool begins = term % summed_rows == 0;
      const bool adds_to_totals = has_totals && (next_term % summed_rows == 0 || next_term == m);
      for_each_tile(x, padded, rows, true, [&](int64_t row, int64_t column, int64_t width) {
        T* c = sums.at(column) + row * width;
        multiply_panel(TransposedTiles{}, width, in.piece, x.terms, tiles + row / tile_rows * tile_stride, x.at(column),
                       begins ? zeros : c, begins ? 0 : width, c, width, next);
        T* total = totals.at(column) + row * width;
        for (int64_t i = 0; adds_to_totals && i < tile_rows * width; i += lanes<T>)
          store(total + i, load(total + i) + load(c + i));
      });
    }
    if (out.db) bias_sums.put(out.db + first);
    if (out.column_major) put_column_major(totals, padded, first, rows, out);
    else put_row_major(totals, padded, first, rows, finished);
  }
}

// Rows [begin, end) of dW (outputs, columns) = (x^T dy)^T * factor and of db, the sums of dy (m, outputs).
template <typename T>
void grad_weight(const KeptX& kept_x, const void* staged_x, Matrix dy, int64_t outputs, const int32_t* index,
                 int64_t columns, double factor, int64_t begin, int64_t end, bool column_major, void* dw, void* db) {
  static_assert(lanes<T> % tile_rows == 0 && output_unit % lanes<T> == 0);
  if (begin == end) return;
  const int64_t m = kept_x.rows, count = kept_x.count, piece = summed_at_once(count, outputs, m);
  const Operands<T> in{static_cast<const T*>(staged_x), dy, m, round_up(count, lanes<T>), piece};
  const Gradients<T> out{static_cast<T*>(dw),    static_cast<T*>(db), index, count, columns, outputs,
                         static_cast<T>(factor), column_major};
  if (m > 0 && m <= block_rows_of_x && !column_major) grad_weight_in_rows(in, out, begin, end);
  else grad_weight_in_panels(in, out, begin, end);
}
#endif

} // namespace
} // namespace mixout_fast::cpu::MIXOUT_ISA
