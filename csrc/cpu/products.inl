// y = x W'^T + bias and dx = dy W' in one pass over W and U.
#pragma once

#include "elementwise.inl"
#include "tiles.inl"

namespace mixout_fast::cpu::MIXOUT_ISA {
namespace {

// A part of W' (N, K) that is mixed at once, for y = x W'^T (forward) or dx = dy W'. A product sums over its terms: it
// has K terms and N outputs forward, N terms and K outputs for dx.
struct Part {
  int64_t output, outputs, term, terms;
};

// Whether a vector of entries can be mixed at once: all is fp32 (mixes_vectors), the mask is drawn already and columns
// are adjacent (takes_vectors).
template <typename Operand, typename Result>
constexpr bool mixes_vectors = std::is_same_v<Operand, float> && std::is_same_v<Result, float>;

MIXOUT_INLINE bool takes_vectors(const Mixing& mixing) {
  return mixing.mask.keep && mixing.weight.column_stride == 1 &&
         (!mixing.target.data || mixing.target.column_stride == 1);
}

// A row of W and its mask, as takes_vectors admits them.
template <typename T>
struct WeightRow {
  const uint32_t* keep;
  const T* weight;
};
template <typename T>
MIXOUT_INLINE WeightRow<T> weight_row(const Mixing& mixing, int64_t row) {
  return {mask_row(mixing.mask, mixing.columns, row),
          reinterpret_cast<const T*>(address<T>(weight_of_row(mixing, row), row, 0))};
}

// mix_entry for entries [column, column + lanes) of a row.
template <typename T>
MIXOUT_INLINE Vector<T> mix_vector(const Mixing& mixing, const WeightRow<T>& weights, int64_t row, int64_t column) {
  typedef uint32_t Keep __attribute__((vector_size(lanes<T> * sizeof(uint32_t))));
  Keep keep;
  memcpy(&keep, weights.keep + column, sizeof(keep));
  const Vector<T> weight = load(weights.weight + column);
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
    // Rows of W' are outputs: `width` of them at a time are mixed and transposed, in registers where possible.
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
      WeightRow<T> weights[width];
      for (int64_t i = 0; i < width && in_registers; ++i) weights[i] = weight_row<T>(mixing, part.output + output + i);
      for (int64_t k = 0; k < part.terms; k += width) {
        Vector<T> block[width];
        if constexpr (mixes_vectors<Operand, Result>)
          if (in_registers) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < width; ++i)
              block[i] = mix_vector<T>(mixing, weights[i], part.output + output + i, part.term + k);
          }
        if (!in_registers)
          for (int64_t i = 0; i < width; ++i) block[i] = load(mixed + i * stride + k);
        transpose<T>(block);
        for (int64_t l = 0; l < width && k + l < part.terms; ++l) store(out + (k + l) * step, block[l]);
      }
    }
  } else {
    // Rows of W' are terms: they are mixed on the way into the panels, vector by vector where possible.
    const int64_t padded = round_up(part.outputs, width);
    T* mixed = scratch<T>(Slot::rows, padded);
    memset(mixed, 0, padded * sizeof(T));
    const Mixing own = mixing; // a copy, which no store can change
    const bool by_vectors = mixes_vectors<Operand, Result> && takes_vectors(own) && part.outputs % width == 0;
    for (int64_t k = 0; k < part.terms; ++k) {
      const WeightRow<T> weights = weight_row<T>(own, part.term + k);
      if (!by_vectors) mix_segment<Operand, Result>(own, part.term + k, part.output, part.outputs, mixed);
      for (int64_t output = 0; output < padded; output += panel<T>) {
        const int64_t step = panels.width(output, part.outputs);
        T* out = panels.at(output) + k * step;
        for (int64_t v = 0; v < step; v += width)
          if constexpr (mixes_vectors<Operand, Result>)
            store(out + v, by_vectors ? mix_vector<T>(own, weights, part.term + k, part.output + output + v)
                                      : load(mixed + output + v));
          else store(out + v, load(mixed + output + v));
      }
    }
  }
}

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

// Copies terms [term, term + terms) of the rows of x or dy from `first` on, repeating the last row to fill a tile.
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

// The part of W' that a thread mixes at once, as panels that stay in L2 while x or dy streams past. With many rows it
// is as large as fits: multiply_pieces adds each piece of terms to a tile of the result in L1, and the tile comes back
// from memory once per block of terms. With few rows, mixing takes a larger share of the time: the part is smaller, and
// the next part of W and U is prefetched meanwhile. A block for dx has long parts of W's rows.
struct BlockShape {
  int64_t terms, outputs;
  bool fetches_next;
};

template <bool forward, typename T>
constexpr BlockShape block_shape(int64_t rows, int64_t terms) {
  constexpr int64_t wide = sizeof(T) / sizeof(float);
  if (rows <= few_rows) return forward ? BlockShape{384 / wide, panel<T>, true} : BlockShape{128, 8 * panel<T>, true};
  const int64_t most = (forward ? 3072 : 768) / wide;
  const int64_t block = terms < most ? terms : most;
  return {most, (4096 / block > 1 ? 4096 / block : 1) * panel<T>, false};
}

// A block of terms of the left operand: rows before in_place lie in x or dy, from `term` on; the others are staged.
template <typename T>
struct LeftBlock {
  Matrix x;
  int64_t term, in_place;
  const T* staged;
  Rows staged_layout;

  MIXOUT_INLINE Rows layout(int64_t row) const { return row < in_place ? Rows{x.row_stride} : staged_layout; }
  MIXOUT_INLINE const T* tile(int64_t row) const {
    return row < in_place ? reinterpret_cast<const T*>(address<T>(x, row, term))
                          : staged + (row - in_place) * staged_layout.row_stride;
  }
};

// Sums of the result or of a tile, in rows that are `stride` apart.
template <typename T>
struct Sums {
  T* data;
  int64_t stride;
};

// The product of a tile of the left operand with a panel, `width` outputs wide.
template <typename T>
struct TileProduct {
  Rows layout;
  const T *left, *right;
  int64_t width, terms, piece;

  // sums = base + product.
  template <typename Fetch>
  MIXOUT_INLINE void add(Sums<const T> base, Sums<T> sums, Fetch& prefetch) const {
    multiply_panel(layout, width, piece, terms, left, right, base.data, base.stride, sums.data, sums.stride, prefetch);
  }
};

// sums = base + product + bias (null: none), for a tile that lies wholly in the result.
template <typename T, typename Fetch>
MIXOUT_INLINE void sum_in_place(const TileProduct<T>& product, Sums<const T> base, const T* bias, Sums<T> sums,
                                Fetch& prefetch) {
  product.add(base, sums, prefetch);
  for (int64_t i = 0; i < tile_rows && bias; ++i)
    for (int64_t v = 0; v < product.width; v += lanes<T>) {
      T* sum = sums.data + i * sums.stride + v;
      store(sum, load(sum) + load(bias + v));
    }
}

// The same in a tile of its own, from which `rows` x `outputs` sums are copied: where a tile extends past the result,
// in the same order of additions; and with short pieces, where a block's pieces are added up before they are added to
// those of other blocks.
template <typename T, typename Fetch>
MIXOUT_INLINE void sum_aside(const TileProduct<T>& product, Sums<const T> base, const T* bias, Sums<T> sums,
                             int64_t rows, int64_t outputs, Fetch& prefetch) {
  const bool adds_base_last = product.piece == short_piece;
  T tile[tile_rows * panel<T>] = {};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < outputs && !adds_base_last; ++j) tile[i * panel<T> + j] = base.data[i * base.stride + j];
  product.add({tile, panel<T>}, {tile, panel<T>}, prefetch);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < outputs; ++j) {
      T sum = tile[i * panel<T> + j];
      if (adds_base_last) sum += base.data[i * base.stride + j];
      if (bias) sum += bias[j];
      sums.data[i * sums.stride + j] = sum;
    }
}

// Columns [begin, end) of x W'^T + bias (forward) or dy W', for m of the `all_rows` rows of the whole product.
//
// Blocks of terms are outermost, and each is added to all outputs. So x or dy is staged once, a block at a time, but
// the sums pass through memory once per block.
template <bool forward, typename Operand, typename Result>
void multiply(const Mixing& mixing, Matrix x, int64_t m, int64_t all_rows, int64_t begin, int64_t end, const void* bias,
              void* result) {
  using T = Compute<Operand>;
  constexpr bool narrows = !std::is_same_v<Result, T>;
  const int64_t terms = forward ? mixing.columns : mixing.rows;
  const int64_t result_stride = forward ? mixing.rows : mixing.columns;
  const int64_t piece = summed_at_once(all_rows, result_stride, terms);
  const BlockShape shape = block_shape<forward, T>(all_rows, terms);
  const int64_t block_terms = shape.terms < terms ? shape.terms : round_up(terms, lanes<T>);
  const int64_t all_outputs = round_up(end - begin, panel<T>);
  const int64_t block_outputs = all_outputs < shape.outputs ? all_outputs : shape.outputs;

  // Whole tiles of rows are multiplied in place; other rows are staged first, with a stride that is no power of two, so
  // that they do not share one L1 set.
  const bool lies_in_rows = x.column_stride == 1 || terms == 1;
  const int64_t in_place = !narrows && lies_in_rows ? m / tile_rows * tile_rows : 0;
  const Rows staged_layout{block_terms + 16};
  const int64_t staged_size = round_up(m - in_place, tile_rows) * staged_layout.row_stride;
  T* staged =
      scratch<T>(Slot::block, staged_size + (block_terms + 1) * block_outputs + (narrows ? m * (end - begin) : 0));
  T* mixed = staged + staged_size;
  T* widened_bias = mixed + block_terms * block_outputs;
  // The sums are kept in the result itself where it has their dtype.
  Sums<T> sums{widened_bias + block_outputs, end - begin};
  if constexpr (!narrows) sums = {static_cast<Result*>(result) + begin, result_stride};
  static constexpr T zeros[panel<T>] = {};

  const auto part_at = [=](int64_t output, int64_t term) -> Part {
    const int64_t outputs_left = end - output, terms_left = terms - term;
    return {output, outputs_left < block_outputs ? outputs_left : block_outputs, term,
            terms_left < block_terms ? terms_left : block_terms};
  };
  for (int64_t term = 0; term < terms; term += block_terms) {
    const LeftBlock<T> left{x, term, in_place, staged, staged_layout};
    for (int64_t first = begin; first < end; first += block_outputs) {
      const Part part = part_at(first, term);
      const Panels<T> panels{mixed, part.terms};
      // Staged in the loop over terms, GCC 12 compiles mix_panels' loop worse: y of 8 and 16 rows takes 2 % more time.
      if (first == begin) stage_rows<T, Result>(x, in_place, m, term, part.terms, staged_layout.row_stride, staged);
      mix_panels<forward, Operand, Result>(mixing, part, panels);
      // The bias is added last. Added first, it made each of several sums round at its size: a large bias gave y of one
      // row and 8192 terms 10 times the error of the library, which adds it once.
      const T* added_bias = bias && term + block_terms >= terms ? widened_bias : nullptr;
      for (int64_t j = 0; j < part.outputs && added_bias; ++j)
        widened_bias[j] = widen(static_cast<const Result*>(bias)[first + j]);

      const auto multiply_tile_at = [&](int64_t row, int64_t output, auto& prefetch) {
        const int64_t width = panels.width(output, part.outputs);
        const int64_t rows = m - row < tile_rows ? m - row : tile_rows;
        const int64_t outputs = part.outputs - output < width ? part.outputs - output : width;
        const TileProduct<T> product{left.layout(row), left.tile(row), panels.at(output), width, part.terms, piece};
        const Sums<T> tile{sums.data + row * sums.stride + (first - begin) + output, sums.stride};
        const Sums<const T> base = term ? Sums<const T>{tile.data, tile.stride} : Sums<const T>{zeros, 0};
        const T* tile_bias = added_bias ? added_bias + output : nullptr;
        if (rows == tile_rows && outputs == width && piece != short_piece)
          sum_in_place(product, base, tile_bias, tile, prefetch);
        else sum_aside(product, base, tile_bias, tile, rows, outputs, prefetch);
      };
      if (shape.fetches_next) {
        const bool is_last = first + block_outputs >= end;
        Prefetch next = prefetch_of<forward, Operand>(mixing, is_last ? part_at(begin, term + block_terms)
                                                                      : part_at(first + block_outputs, term));
        for (int64_t output = 0; output < part.outputs; output += panel<T>)
          for (int64_t row = 0; row < m; row += tile_rows) multiply_tile_at(row, output, next);
      } else {
        NoPrefetch nothing;
        for (int64_t row = 0; row < m; row += tile_rows)
          for (int64_t output = 0; output < part.outputs; output += panel<T>) multiply_tile_at(row, output, nothing);
      }
    }
  }
  if constexpr (narrows)
    for (int64_t row = 0; row < m; ++row)
      for (int64_t output = begin; output < end; ++output)
        static_cast<Result*>(result)[row * result_stride + output] =
            narrow<Result>(sums.data[row * sums.stride + output - begin]);
}

} // namespace
} // namespace mixout_fast::cpu::MIXOUT_ISA
