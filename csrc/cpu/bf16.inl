// bf16 products of our own with AMX or AVX512_BF16, included after kernels.inl in the region and namespace of AVX-512.
// On processors without bf16 instructions, AVX2 and AVX-512 multiply bf16 in fp32 in one pass too, with the general
// kernels of products.inl. Otherwise W' is mixed first and multiplied by the library, beyond 16 rows
// (mixout_fast/backends/cpu.py).
//
// A step adds 32 terms of a product to a tile of 32 x 32 sums in fp32. Its left operand is 32 rows of 32 terms. The
// right operand, W' or dy, is arranged for it in panels of 32 outputs, each with all its steps:
//
//   [panel][step][half][pair][16 outputs][2 terms]
//                      `-- 64 bytes: a vector or a row of an AMX tile
//                `-- 16 pairs, 1 KB: an AMX tile
//
// A unit multiplies: AMX tiles (Tiles), or vectors with AVX512_BF16 (Vectors). Like the library's products with these
// instructions, and unlike its sum for db, both units treat subnormals as 0. A unit's
//
//   multiply(rows, height, right, steps, adds, sums, stride, beside)
//
// computes a tile of sums, whose rows are `stride` floats apart, from the left operand's `rows` and `steps` steps of a
// panel of the right operand; with `adds` it adds to the sums there. It computes at least the first `height` rows, and
// calls beside.step() at least once a step.

namespace mixout_fast::cpu::avx512 {
namespace {

// Sizes and strides are in elements, except those named bytes.
constexpr int64_t step_terms = 32;
constexpr int64_t step_outputs = 32;
constexpr int64_t step_rows = 32;
constexpr int64_t step_size = step_terms * step_outputs, half_size = step_size / 2;
constexpr int64_t step_sums = step_rows * step_outputs;

// The right operand, or room for it: panels of `steps` steps each.
struct Steps {
  bfloat16* data;
  int64_t steps;

  // The pairs of `term` and the next for 16 outputs from `output` on; those of the other 16 are half_size further on.
  // Unsigned, because dividing a signed number by a power of two takes several instructions.
  MIXOUT_INLINE bfloat16* at(uint64_t output, uint64_t term) const {
    const uint64_t panel = output / step_outputs, step = term / step_terms;
    const uint64_t half = output % step_outputs / 16, pair = term % step_terms / 2;
    return data + (panel * steps + step) * step_size + half * half_size + pair * 32;
  }
};

struct TileLayout {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not on the stack: GCC 12's _tile_loadconfig does not declare that it reads more than 8 bytes.
alignas(64) constexpr TileLayout tile_layout;

// A left operand: two halves of 16 rows.
struct LeftRows {
  const bfloat16* data;
  int64_t row_stride, half_stride, step_stride;
};

// A tile has 16 rows of 64 bytes: a step needs two left and two right tiles.
struct Tiles {
  Tiles() { _tile_loadconfig(&tile_layout); }
  ~Tiles() { _tile_release(); }

  template <typename Beside>
  MIXOUT_INLINE void multiply(LeftRows rows, int64_t /*height*/, const bfloat16* right, int64_t steps, bool adds,
                              float* sums, int64_t stride, Beside& beside) const {
    __asm__ volatile("" ::: "memory"); // GCC 12's _tile_loadd does not declare that it reads memory
    const bfloat16* left = rows.data;
    const int64_t row_bytes = rows.row_stride * sizeof(bfloat16), sums_bytes = stride * sizeof(float);
    float* lower = sums + 16 * stride;
    if (adds) {
      _tile_loadd(0, sums, sums_bytes);
      _tile_loadd(1, sums + 16, sums_bytes);
      _tile_loadd(2, lower, sums_bytes);
      _tile_loadd(3, lower + 16, sums_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, left += rows.step_stride, right += step_size) {
      beside.step();
      _tile_loadd(6, right, 64);
      _tile_loadd(4, left, row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right + half_size, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, left + rows.half_stride, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, sums_bytes);
    _tile_stored(1, sums + 16, sums_bytes);
    _tile_stored(2, lower, sums_bytes);
    _tile_stored(3, lower + 16, sums_bytes);
  }
};

// 8 x 2 sums, two vectors of the right operand, and pairs of terms of the left operand broadcast to all lanes. multiply
// calls beside.step() once a step for every 8 rows.
struct Vectors {
  template <typename Beside>
  MIXOUT_INLINE void multiply(LeftRows rows, int64_t height, const bfloat16* right, int64_t steps, bool adds,
                              float* sums, int64_t stride, Beside& beside) const {
    for (int64_t row = 0; row < step_rows && row < height; row += 8)
      multiply_rows(reinterpret_cast<const char*>(rows.data + row / 16 * rows.half_stride + row % 16 * rows.row_stride),
                    rows.row_stride * sizeof(bfloat16), rows.step_stride * sizeof(bfloat16), right, steps, adds,
                    sums + row * stride, stride, beside);
  }

private:
  template <typename Beside>
  static void multiply_rows(const char* left, int64_t row_bytes, int64_t step_bytes, const bfloat16* right,
                            int64_t steps, bool adds, float* sums, int64_t stride, Beside& beside) {
    __m512 sum[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[i][v] = adds ? _mm512_loadu_ps(sums + i * stride + 16 * v) : _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; ++step, left += step_bytes, right += step_size) {
      beside.step();
// On Zen 4, two pairs at once take 1 to 2 % more time than four, sixteen 2 to 3 % more.
#pragma GCC unroll 4
      for (int pair = 0; pair < 16; ++pair) {
        const auto first = (__m512bh)_mm512_loadu_si512(right + 32 * pair);
        const auto second = (__m512bh)_mm512_loadu_si512(right + half_size + 32 * pair);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          int32_t terms;
          memcpy(&terms, left + i * row_bytes + 4 * pair, sizeof(terms));
          const auto both = (__m512bh)_mm512_set1_epi32(terms);
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, first);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, second);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(sums + i * stride + 16 * v, sum[i][v]);
  }
};

// 32 numbers in two vectors: for bf16 those at even and those at odd places, for fp32 the first and the last 16.
struct Wide {
  Vector<float> first, second;
};
template <typename Operand>
constexpr bool in_turn = std::is_same_v<Operand, bfloat16>;

MIXOUT_INLINE Wide load_wide(const float* source) { return {load(source), load(source + 16)}; }
MIXOUT_INLINE Wide load_wide(const bfloat16* source) {
  const __m512i both = _mm512_loadu_si512(source);
  return {(Vector<float>)_mm512_slli_epi32(both, 16),
          (Vector<float>)_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)))};
}

// Both vectors rounded to bf16, the second behind the first; `paired` interleaves the two halves.
MIXOUT_INLINE __m512i rounded(Vector<float> first, Vector<float> second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
MIXOUT_INLINE __m512i paired(__m512i values) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), values);
}
template <typename Operand>
MIXOUT_INLINE __m512i rounded_in_order(Wide wide) {
  const __m512i values = rounded(wide.first, wide.second);
  return in_turn<Operand> ? paired(values) : values;
}

// Which entries of a Wide are kept.
struct Kept {
  uint16_t first, second;
};

// The mask of columns [begin, end), where it is drawn already. A row that Mask::keep_row drops keeps no column.
template <typename Operand>
class KeptBits {
public:
  KeptBits(const Mixing& mixing, int64_t begin, int64_t end)
      : keep_row_(mixing.mask.keep_row), begin_(begin), count_((end - begin) / 32) {
    kept_ = scratch<Kept>(Slot::target, 2 * count_);
    for (int64_t i = 0; i < count_ && mixing.mask.keep; ++i) kept_[i] = kept_of(mixing.mask.keep + begin + 32 * i);
    if (keep_row_) memset(kept_ + count_, 0, count_ * sizeof(Kept));
  }

  // A row's, from `column` on, which is begin plus a multiple of 32.
  const Kept* row(int64_t row, int64_t column) const {
    return kept_ + (keep_row_ && !keep_row_[row] ? count_ : 0) + (column - begin_) / 32;
  }

private:
  static Kept kept_of(const uint32_t* keep) {
    uint32_t bits[2] = {};
    for (int i = 0; i < 32; ++i) {
      const int half = in_turn<Operand> ? i % 2 : i / 16, place = in_turn<Operand> ? i / 2 : i % 16;
      bits[half] |= (keep[i] & 1) << place;
    }
    return {static_cast<uint16_t>(bits[0]), static_cast<uint16_t>(bits[1])};
  }

  const uint32_t* keep_row_;
  int64_t begin_, count_;
  Kept* kept_; // count_ for kept rows, then as many for dropped ones
};

MIXOUT_INLINE Vector<float> mix_kept(Vector<float> w, Vector<float> u, Vector<float> scale, __mmask16 keep) {
  const Vector<float> difference = w - u, scaled = difference * scale;
  return (Vector<float>)_mm512_mask_add_ps((__m512)u, keep, (__m512)u, (__m512)scaled);
}

// How far ahead W and U are prefetched, rounded up to whole rows. They are read row by row, because memory is fastest
// with few streams.
constexpr int64_t bytes_ahead = 4096;

// Columns [column, column + count) of a row of W', as mix_entry computes them, followed by zeros up to a multiple of
// 32. `kept` is these columns' mask where it is drawn already.
template <typename Operand>
void mix_row(const Mixing& mixing, const Kept* kept, int64_t row, int64_t column, int64_t count, bfloat16* out) {
  const Vector<float> scale = broadcast(static_cast<float>(mixing.scale));
  const int64_t by_vectors = takes_vectors(mixing) ? count / 32 * 32 : 0;
  constexpr int64_t size = sizeof(Operand);
  const int64_t rows_ahead = (bytes_ahead - 1) / (count * size) + 1;
  const int64_t row_ahead = row + rows_ahead < mixing.rows ? row + rows_ahead : row;
  const Matrix &weight = weight_of_row(mixing, row), &weight_ahead = weight_of_row(mixing, row_ahead);
  const auto read = [=](const Matrix& matrix, const Matrix& next, int64_t k) __attribute__((always_inline)) {
    const char* ahead = address<Operand>(next, row + rows_ahead, column + k);
    for (int64_t byte = 0; byte < 32 * size; byte += 64) __builtin_prefetch(ahead + byte);
    return load_wide(reinterpret_cast<const Operand*>(address<Operand>(matrix, row, column + k)));
  };
  const auto mix_vectors = [&](auto target_at) __attribute__((always_inline)) {
    for (int64_t k = 0; k < by_vectors; k += 32) {
      const Wide w = read(weight, weight_ahead, k), u = target_at(k);
      const Wide mixed{mix_kept(w.first, u.first, scale, kept[k / 32].first),
                       mix_kept(w.second, u.second, scale, kept[k / 32].second)};
      _mm512_store_si512(out + k, rounded_in_order<Operand>(mixed));
    }
  };
  if (mixing.target.data)
    mix_vectors([&](int64_t k) __attribute__((always_inline)) { return read(mixing.target, mixing.target, k); });
  else mix_vectors([](int64_t) __attribute__((always_inline)) { return Wide{}; });
  if (by_vectors < count)
    mix_segment<Operand, bfloat16>(mixing, row, column + by_vectors, count - by_vectors, out + by_vectors);
  memset(out + count, 0, (round_up(count, 32) - count) * sizeof(bfloat16));
}

// Stores two terms of 32 outputs as pairs, at Steps::at of the first output.
MIXOUT_INLINE void store_pairs(__m512i even, __m512i odd, bfloat16* pairs) {
  _mm512_store_si512(pairs, paired(_mm512_inserti64x4(even, _mm512_castsi512_si256(odd), 1)));
  _mm512_store_si512(pairs + half_size, paired(_mm512_inserti64x4(odd, _mm512_extracti64x4_epi64(even, 1), 0)));
}

// Stores 16 vectors, each with the pairs of a step's terms for one output, as a half of the step.
MIXOUT_INLINE void store_half(Vector<float>* vectors, bfloat16* half) {
  transpose<float>(vectors);
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) store(reinterpret_cast<float*>(half + 32 * i), vectors[i]);
}

// How many rows of W' are mixed before they are arranged in steps. Forward, a row holds the terms of one output, so
// that pairs are adjacent, and 16 rows are transposed. For dX, two rows hold a pair of terms for every output.
template <bool forward>
constexpr int64_t arranged_rows = forward ? 16 : 2;
constexpr int64_t arranged_stride(int64_t columns) { return round_up(columns, 64) + 32; } // rows share no L1 set

// Mixes a part of W' into steps; `rows` has room for arranged_rows rows.
template <bool forward, typename Operand>
void mix_steps(const Mixing& mixing, const KeptBits<Operand>& kept, Part part, bfloat16* rows, Steps out) {
  const int64_t first_row = forward ? part.output : part.term, height = forward ? part.outputs : part.terms;
  const int64_t first_column = forward ? part.term : part.output, columns = forward ? part.terms : part.outputs;
  const int64_t stride = arranged_stride(columns);
  for (int64_t row = 0; row < round_up(height, 32); row += arranged_rows<forward>) {
    for (int64_t i = 0; i < arranged_rows<forward>; ++i)
      if (row + i < height)
        mix_row<Operand>(mixing, kept.row(first_row + row + i, first_column), first_row + row + i, first_column,
                         columns, rows + i * stride);
      else memset(rows + i * stride, 0, round_up(columns, 32) * sizeof(bfloat16));
    for (int64_t column = 0; column < columns; column += 32) {
      if constexpr (forward) {
        Vector<float> outputs[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) outputs[i] = (Vector<float>)_mm512_load_si512(rows + i * stride + column);
        store_half(outputs, out.at(row, column));
      } else {
        store_pairs(_mm512_load_si512(rows + column), _mm512_load_si512(rows + stride + column), out.at(column, row));
      }
    }
  }
}

// The left operand for a part's terms and rows [row, row + step_rows) of x or dy: where they lie, or, where these are
// not whole steps of adjacent terms, copied and padded with zeros.
LeftRows left_rows(Matrix x, int64_t row, int64_t m, Part part, bfloat16* copied) {
  const int64_t padded = round_up(part.terms, step_terms);
  const bfloat16* first = static_cast<const bfloat16*>(x.data) + row * x.row_stride + part.term * x.column_stride;
  if (row + step_rows <= m && padded == part.terms && x.column_stride == 1)
    return {first, x.row_stride, 16 * x.row_stride, step_terms};
  for (int64_t i = 0; i < step_rows; ++i) {
    const int64_t there = row + i < m ? part.terms : 0;
    const bfloat16* source = first + i * x.row_stride;
    bfloat16* out = copied + i * padded;
    if (x.column_stride == 1) memcpy(out, source, there * sizeof(bfloat16));
    else
      for (int64_t k = 0; k < there; ++k) out[k] = source[k * x.column_stride];
    memset(out + there, 0, (padded - there) * sizeof(bfloat16));
  }
  return {copied, padded, 16 * padded, step_terms};
}

// A product's tiles of sums. A finished tile is rounded and written to y or dx, up to two rows a step, while the next
// one is multiplied. That one is never the tile being written: either_of_two returns the other, and numbered, for sums
// that all have a tile of their own, first finishes writing it.
class SumTiles {
public:
  explicit SumTiles(int64_t count) : tiles_(scratch<float>(Slot::rows, count * step_sums)) {}

  float* either_of_two() const { return written_ == tiles_ ? tiles_ + step_sums : tiles_; }
  float* numbered(int64_t number) {
    float* tile = tiles_ + number * step_sums;
    if (tile == written_) finish();
    return tile;
  }

  // Begins to write a tile, plus `bias` unless it is null, to `out`, which has `rows` rows and `outputs` columns there.
  void write(const float* tile, int64_t rows, int64_t outputs, const bfloat16* bias, bfloat16* out, int64_t stride) {
    finish();
    written_ = sums_ = tile;
    rows_ = rows;
    inside_ = outputs < step_outputs ? (1u << outputs) - 1 : ~0u;
    out_ = out;
    stride_ = stride;
    alignas(64) float values[step_outputs] = {};
    for (int64_t j = 0; j < outputs && j < step_outputs && bias; ++j) values[j] = widen(bias[j]);
    bias_ = load_wide(values);
  }

  MIXOUT_INLINE void step() {
    for (int i = 0; i < 2 && rows_; ++i) write_row();
  }
  void finish() {
    while (rows_) write_row();
  }

private:
  MIXOUT_INLINE void write_row() {
    const __m512i values = rounded(load(sums_) + bias_.first, load(sums_ + 16) + bias_.second);
    _mm512_mask_storeu_epi16(out_, inside_, values);
    sums_ += step_outputs;
    out_ += stride_;
    --rows_;
  }

  const float* sums_ = nullptr; // of the next row
  bfloat16* out_ = nullptr;
  int64_t stride_ = 0, rows_ = 0; // rows left to write
  __mmask32 inside_ = 0;
  Wide bias_{};
  float* tiles_;
  const float* written_ = nullptr;
};

// How many elements of W' are mixed at once. With few rows, y uses smaller parts, so that x stays in L2 beside them,
// and dx is summed in parts of few_rows_terms terms, so that W and U are read in long parts of their rows.
constexpr int64_t few_rows_block = 64 * 1024, block_size = 256 * 1024;
constexpr int64_t few_rows_terms = 256;

// The product of `multiply` in products.inl, with W' mixed in parts that stay in L2 while x or dy streams past.
template <typename Unit, bool forward, typename Operand>
void multiply_in_steps(const Mixing& mixing, Matrix x, int64_t m, int64_t all_rows, int64_t begin, int64_t end,
                       const void* bias, void* result) {
  const int64_t terms = forward ? mixing.columns : mixing.rows;
  const int64_t result_stride = forward ? mixing.rows : mixing.columns;
  const bool has_few_rows = all_rows <= few_rows;
  const int64_t all_terms = round_up(terms, step_terms), all_outputs = round_up(end - begin, step_outputs);
  const bool is_split = !forward && has_few_rows && all_terms > few_rows_terms;
  const int64_t block_terms = is_split ? few_rows_terms : all_terms;
  const int64_t in_l2 = (forward && has_few_rows ? few_rows_block : block_size) / block_terms;
  const int64_t most_outputs = in_l2 > step_outputs ? in_l2 / step_outputs * step_outputs : step_outputs;
  const int64_t block_outputs = all_outputs < most_outputs ? all_outputs : most_outputs;

  const int64_t rows_size = arranged_rows<forward> * arranged_stride(forward ? block_terms : block_outputs);
  bfloat16* mixed = scratch<bfloat16>(Slot::block, block_terms * block_outputs + step_rows * block_terms + rows_size);
  bfloat16* copied = mixed + block_terms * block_outputs;
  bfloat16* mixed_rows = copied + step_rows * block_terms;
  const KeptBits<Operand> kept(mixing, forward ? 0 : begin, forward ? terms : end);
  // A split sum keeps all tiles of a block; otherwise two tiles alternate.
  const int64_t block_panels = block_outputs / step_outputs;
  SumTiles tiles(is_split ? round_up(m, step_rows) / step_rows * block_panels : 2);

  const Unit unit;
  for (int64_t first = begin; first < end; first += block_outputs)
    for (int64_t term = 0; term < terms; term += block_terms) {
      const int64_t outputs_left = end - first, terms_left = terms - term;
      const Part part = {first, outputs_left < block_outputs ? outputs_left : block_outputs, term,
                         terms_left < block_terms ? terms_left : block_terms};
      const Steps right{mixed, round_up(part.terms, step_terms) / step_terms};
      mix_steps<forward, Operand>(mixing, kept, part, mixed_rows, right);
      for (int64_t row = 0; row < m; row += step_rows) {
        const LeftRows left = left_rows(x, row, m, part, copied);
        const int64_t height = m - row < step_rows ? m - row : step_rows;
        for (int64_t output = 0; output < part.outputs; output += step_outputs) {
          float* sums =
              is_split ? tiles.numbered(row / step_rows * block_panels + output / step_outputs) : tiles.either_of_two();
          unit.multiply(left, height, right.at(output, 0), right.steps, term > 0, sums, step_outputs, tiles);
          if (term + block_terms < terms) continue;
          const int64_t column = first + output;
          tiles.write(sums, height, end - column, bias ? static_cast<const bfloat16*>(bias) + column : nullptr,
                      static_cast<bfloat16*>(result) + row * result_stride + column, result_stride);
        }
      }
    }
  tiles.finish();
}

// `columns` and `out` have room for one vector more than the kept columns; `take` reads nothing of a row past the last
// kept column.
template <>
class KeptColumns<bfloat16> {
public:
  KeptColumns(const int32_t* index, int64_t count) : vectors_(count ? index[count - 1] / 32 + 1 : 0) {
    kept_ = scratch<uint32_t>(Slot::mask, vectors_);
    memset(kept_, 0, vectors_ * sizeof(uint32_t));
    for (int64_t j = 0; j < count; ++j) kept_[index[j] / 32] |= 1u << index[j] % 32;
    read_ = count ? ~0u >> (31 - index[count - 1] % 32) : 0;
  }

  MIXOUT_INLINE void take(const bfloat16* row, bfloat16* out) const {
    for (int64_t v = 0; v < vectors_; ++v) {
      const __m512i values = _mm512_maskz_loadu_epi16(v + 1 < vectors_ ? ~0u : read_, row + 32 * v);
      _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(kept_[v], values));
      out += __builtin_popcount(kept_[v]);
    }
  }
  // Not MIXOUT_INLINE: its caller, DenseRows, is compiled for plain AVX-512.
  void put(const bfloat16* columns, bfloat16* row) const {
    for (int64_t v = 0; v < vectors_; ++v) {
      _mm512_storeu_si512(row + 32 * v, _mm512_maskz_expand_epi16(kept_[v], _mm512_loadu_si512(columns)));
      columns += __builtin_popcount(kept_[v]);
    }
  }

private:
  int64_t vectors_;
  uint32_t* kept_; // a bit per column, a word per vector
  uint32_t read_;  // which columns of the last vector to read
};

void gather_or_halves(Matrix x, int64_t element_size, const int32_t* index, int64_t count, int64_t begin, int64_t end,
                      void* out) {
  if (count == 0) return;
  if (element_size != 2 || x.column_stride != 1) return gather(x, element_size, index, count, begin, end, out);
  const KeptColumns<bfloat16> kept(index, kept_count(index, count));
  bfloat16* taken = scratch<bfloat16>(Slot::weight, count + 32);
  memset(taken, 0, count * sizeof(bfloat16));
  for (int64_t row = begin; row < end; ++row) {
    kept.take(static_cast<const bfloat16*>(x.data) + row * x.row_stride, taken);
    memcpy(static_cast<bfloat16*>(out) + row * count, taken, count * sizeof(bfloat16));
  }
}

// The weight's gradient is a product whose terms are the rows of x and dy. Its left operand is the kept columns of x
// and behind them a column of ones, whose sums are db: panels of 32 columns, each of [rows / 32] steps.
int64_t staged_columns(int64_t count) { return round_up(count + 1, step_outputs); }

void stage_kept_steps(const KeptX& kept_x, int64_t begin, int64_t end, void* out) {
  const auto [x, m, index, count] = kept_x;
  const int64_t width = staged_columns(count);
  const Steps steps{static_cast<bfloat16*>(out), round_up(m, step_terms) / step_terms};
  const KeptColumns<bfloat16> kept(index, index ? count : 0);
  const bfloat16 one{0x3F80};
  bfloat16* rows = scratch<bfloat16>(Slot::rows, step_terms * (width + 32));
  for (int64_t first = begin; first < end; first += step_terms) {
    for (int64_t i = 0; i < step_terms; ++i) {
      bfloat16* row = rows + i * (width + 32);
      const int64_t there = first + i < m ? count : 0;
      const bfloat16* source = static_cast<const bfloat16*>(x.data) + (first + i) * x.row_stride;
      if (there && index && x.column_stride == 1) {
        kept.take(source, row);
      } else {
        for (int64_t j = 0; j < there; ++j) row[j] = source[(index ? index[j] : j) * x.column_stride];
      }
      memset(row + there, 0, (width - there) * sizeof(bfloat16));
      if (first + i < m) row[count] = one;
    }
    for (int64_t column = 0; column < width; column += 16) {
      Vector<float> tile[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        const bfloat16* row = rows + 2 * i * (width + 32) + column;
        const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
        const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + width + 32));
        tile[i] = (Vector<float>)paired(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
      }
      store_half(tile, steps.at(column, first));
    }
  }
}

// Columns [first, first + columns) of dy as `out`, whose terms are the rows from `row` on.
void stage_pairs(Matrix dy, int64_t m, int64_t row, int64_t first, int64_t columns, Steps out) {
  const auto load_part = [&](int64_t k, int64_t column) __attribute__((always_inline)) {
    const int64_t width = k < m ? columns - column : 0;
    const bfloat16* source =
        static_cast<const bfloat16*>(dy.data) + k * dy.row_stride + (first + column) * dy.column_stride;
    if (width >= 32 && dy.column_stride == 1) return _mm512_loadu_si512(source);
    alignas(64) bfloat16 values[32] = {};
    for (int64_t j = 0; j < width && j < 32; ++j) values[j] = source[j * dy.column_stride];
    return _mm512_load_si512(values);
  };
  for (int64_t k = 0; k < step_terms * out.steps; k += 2)
    for (int64_t column = 0; column < columns; column += step_outputs) {
      const __m512i even = load_part(row + k, column), odd = load_part(row + k + 1, column);
      store_pairs(even, odd, out.at(column, k));
    }
}

// Stores 16 numbers, as fp32 or rounded to bf16.
MIXOUT_INLINE void store_as(bfloat16* out, Vector<float> values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh((__m512)values));
}
MIXOUT_INLINE void store_as(float* out, Vector<float> values) { store(out, values); }

// 16 elements of dW from their sums: rounded to bf16, as the library's product is, multiplied by the factor and rounded
// to dW's dtype.
template <typename Result>
MIXOUT_INLINE void store_scaled(Result* out, Vector<float> sums, float factor) {
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)sums);
  store_as(out, (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16) * factor);
}

// Writes rows of dW: their kept columns from the sums, [columns][stride], between zeros.
template <typename Result>
void put_rows(const float* sums, int64_t stride, const int32_t* index, int64_t count, int64_t columns, int64_t rows,
              float factor, Result* dw) {
  const int64_t padded = round_up(count, 16) + 32;
  DenseRows<Result, Result> dense(index, count, columns);
  Result* kept_rows = scratch<Result>(Slot::block, 16 * padded);
  for (int64_t first = 0; first < rows; first += 16) {
    for (int64_t column = 0; column < count; column += 16) {
      Vector<float> tile[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) tile[i] = load(sums + (column + i) * stride + first);
      transpose<float>(tile);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) store_scaled(kept_rows + i * padded + column, tile[i], factor);
    }
    for (int64_t i = 0; i < 16 && first + i < rows; ++i) dense.put(kept_rows + i * padded, dw + (first + i) * columns);
  }
}

// put_rows for a column-major dW.
template <typename Result>
void put_columns(const float* sums, int64_t stride, const int32_t* index, int64_t count, int64_t columns, int64_t rows,
                 float factor, int64_t outputs, Result* dw) {
  Result* kept = scratch<Result>(Slot::block, stride);
  put_between_zeros(index, count, 0, columns, rows, outputs, dw, [=](int64_t j) {
    for (int64_t i = 0; i < rows; i += 16) store_scaled(kept + i, load(sums + j * stride + i), factor);
    return kept;
  });
}

MIXOUT_INLINE void add_tile(const float* tile, int64_t rows, float* sums, int64_t stride) {
  for (int64_t i = 0; i < rows && i < 32; ++i)
    for (int64_t j = 0; j < step_outputs; j += 16)
      store(sums + i * stride + j, load(sums + i * stride + j) + load(tile + i * step_outputs + j));
}

// The product of grad_weight in grad_weight.inl: for a block of dW's rows at a time, the sums over all rows of x and dy
// are computed in fp32 and then spread. The sums over every most_steps steps are computed on their own and then added
// up: in one chain, those of equal numbers were off by 1.5 % at a million rows.
template <typename Unit, typename Result>
void grad_weight_in_steps(const KeptX& kept_x, const void* staged_x, Matrix dy, int64_t outputs, const int32_t* index,
                          int64_t columns, double factor, int64_t begin, int64_t end, bool column_major, void* dw,
                          void* db) {
  constexpr int64_t block = 128, most_steps = 64;
  const int64_t steps = round_up(kept_x.rows, step_terms) / step_terms, width = staged_columns(kept_x.count);
  const int64_t block_steps = steps < most_steps ? steps : most_steps;
  const Steps left{const_cast<bfloat16*>(static_cast<const bfloat16*>(staged_x)), steps};
  bfloat16* pairs = scratch<bfloat16>(Slot::rows, block * block_steps * step_terms + 2 * (width * block + step_sums));
  float* sums = reinterpret_cast<float*>(pairs + block * block_steps * step_terms);
  float* tile = sums + width * block;
  NoPrefetch nothing;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = end - first < block ? end - first : block;
    if (steps == 0) memset(sums, 0, width * block * sizeof(float));
    {
      const Unit unit;
      for (int64_t step = 0; step < steps; step += block_steps) {
        const Steps right{pairs, steps - step < block_steps ? steps - step : block_steps};
        stage_pairs(dy, kept_x.rows, step * step_terms, first, rows, right);
        for (int64_t column = 0; column < width; column += step_outputs) {
          const LeftRows columns_of_x{left.at(column, step * step_terms), step_terms, half_size, step_size};
          const int64_t height = kept_x.count + 1 - column;
          for (int64_t row = 0; row < rows; row += step_outputs) {
            float* out = sums + column * block + row;
            unit.multiply(columns_of_x, height, right.at(row, 0), right.steps, false, step ? tile : out,
                          step ? step_outputs : block, nothing);
            if (step) add_tile(tile, height, out, block);
          }
        }
      }
    }
    if (column_major)
      put_columns(sums, block, index, kept_x.count, columns, rows, static_cast<float>(factor), outputs,
                  static_cast<Result*>(dw) + first);
    else
      put_rows(sums, block, index, kept_x.count, columns, rows, static_cast<float>(factor),
               static_cast<Result*>(dw) + first * columns);
    for (int64_t j = 0; j < rows && db; ++j)
      static_cast<bfloat16*>(db)[first + j] = narrow<bfloat16>(sums[kept_x.count * block + j]);
  }
}

template <typename Unit, typename Operand, typename Result>
constexpr Kernels with_unit() {
  Kernels kernels = kernels_for<Operand, Result>;
  if constexpr (std::is_same_v<Result, bfloat16>) {
    kernels.times_transposed = multiply_in_steps<Unit, true, Operand>;
    kernels.times = multiply_in_steps<Unit, false, Operand>;
  }
  if constexpr (std::is_same_v<Operand, bfloat16>) {
    kernels.stage_kept = stage_kept_steps;
    kernels.grad_weight = grad_weight_in_steps<Unit, Result>;
  }
  return kernels;
}

template <typename Unit, typename Operand, typename Result>
constexpr Kernels kernels_with_unit = with_unit<Unit, Operand, Result>();

template <typename Unit>
const Kernels* kernels_with(Dtype operand, Dtype result) {
  if (operand == Dtype::bf16 && result == Dtype::bf16) return &kernels_with_unit<Unit, bfloat16, bfloat16>;
  if (operand == Dtype::bf16 && result == Dtype::f32) return &kernels_with_unit<Unit, bfloat16, float>;
  if (operand == Dtype::f32 && result == Dtype::bf16) return &kernels_with_unit<Unit, float, bfloat16>;
  return kernels(operand, result);
}

} // namespace

extern const InstructionSet with_bf16 = {"avx512_bf16", draw, gather_or_halves, kernels_with<Vectors>};
extern const InstructionSet with_amx = {"amx", draw, gather_or_halves, kernels_with<Tiles>};

} // namespace mixout_fast::cpu::avx512
