// The tiles in which y, dx and dW are computed, and the prefetching of the next ones' operands meanwhile.
#pragma once

#include "vectors.inl"

namespace mixout_fast::cpu::MIXOUT_ISA {
namespace {

#if MIXOUT_VECTOR_BYTES == 64
constexpr int tile_rows = 8, panel_vectors = 3; // 8 x 3 sums, 3 operands and a broadcast in 32 registers
#elif MIXOUT_VECTOR_BYTES == 32
// 6 x 2 sums, 2 operands and a broadcast in 16 registers. With 4 x 3, which fill all 16, the compiler loads an operand
// again for every product: y at 2048x768x768 takes 13.4 instead of 11.2 ms on AMD's Zen 4, where MKL's product alone
// takes 12.1.
constexpr int tile_rows = 6, panel_vectors = 2;
#else
constexpr int tile_rows = 4, panel_vectors = 3;
#endif

// A product is computed in tiles of tile_rows x one panel of outputs.
template <typename T>
constexpr int64_t panel = panel_vectors * lanes<T>;
// The layout of a tile's broadcast operand: rows of x, dy or a copy of them, or tiles of dy's transpose.
struct Rows {
  int64_t row_stride;
  static constexpr int64_t term_stride = 1;
};
struct TransposedTiles {
  static constexpr int64_t row_stride = 1, term_stride = tile_rows;
};
// How many terms are summed one by one, for an error near the library's. MKL sums blocks of 192 terms in fp64; in fp32
// of 384 on Intel's processors, and of 192 on AMD's, where ours had 1.4 times its error with 384. There it halves sums
// of 193 to 383 terms: with pieces of 192 and the rest, one product of 194 terms in seven had a largest error of more
// than twice its. Up to 16 rows or outputs, MKL sums in as many parts as its vectors have lanes: with pieces of 32,
// sums of 32 terms have up to 1.8 times its error. (A block has 64 terms or more, so none adds pieces of 16 to
// another's.) Chosen by the whole product's size, because the sums must not depend on the number of threads.
constexpr int64_t piece_terms = 192, short_piece = 32;
constexpr int64_t summed_at_once(int64_t rows, int64_t outputs, int64_t terms) {
  if (rows <= 16 || outputs <= 16) return terms <= 64 ? 16 : short_piece;
  return terms > piece_terms && terms < 2 * piece_terms ? round_up((terms + 1) / 2, 2) : piece_terms;
}

// The vector operand of a product, W' or (for dW) the kept columns of x: panels of outputs, each [terms][panel]. The
// last panel is narrower where the outputs end, and padded with zeros to a whole vector.
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

// Prefetches the next part of one or two operands into L2 while the present part is multiplied, a line of each a step:
// mixing and staging wait for memory, and multiplying leaves it idle.
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

// c[tile_rows][vectors] = base + left[tile_rows][terms] * right[terms][vectors]. The products are summed from zero and
// then added to base: summing on from c doubles the error at 1023 terms, to twice the library's. A step of a Prefetch
// takes 4 % of the multiplications' issue slots.
template <typename Left, typename T, int vectors, typename Fetch>
MIXOUT_INLINE void multiply_tile(Left layout, int64_t terms, const T* __restrict left, const T* __restrict right,
                                 const T* base, int64_t base_stride, T* c, int64_t c_stride, Fetch& prefetch) {
  Vector<T> sum[tile_rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) sum[i][v] = Vector<T>{};
  // A large result's tiles come from memory: with this prefetch, y of 1024 rows takes 2.5 % less time and dx 1 %. The
  // sums of dW's block are in L2, and dW would take 3 % more.
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
  // Two terms an iteration: with one, the loop's own instructions take the multiplications' slots; with four it is 6 %
  // slower, for no reason that we found.
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

// multiply_tile in pieces of `piece` terms, each summed from zero and added to c.
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

} // namespace
} // namespace mixout_fast::cpu::MIXOUT_ISA
