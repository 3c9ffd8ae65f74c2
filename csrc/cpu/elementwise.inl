// Drawing masks, mixing W', and mask * grad, row by row.
#pragma once

#include "vectors.inl"

namespace mixout_fast::cpu::MIXOUT_ISA {
namespace {

struct MultiplyVectors {
  MIXOUT_INLINE Product<Vector<uint64_t>> operator()(uint32_t multiplier, Vector<uint64_t> word) const {
    const Vector<uint64_t> product = multiply_low_halves(word, multiplier);
    return {product >> 32, product};
  }
};

// Interleaves the lanes of a and b: the lower halves into `out`, the upper halves behind them.
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

// A row's mask, whose entries are drawn already.
MIXOUT_INLINE const uint32_t* mask_row(const Mask& mask, int64_t columns, int64_t row) {
  return mask.keep_row && !mask.keep_row[row] ? mask.keep + columns : mask.keep;
}

// What a row's weights are read from: of a row that Mask::keep_row drops, U alone is needed, so W is not touched.
MIXOUT_INLINE const Matrix& weight_of_row(const Mixing& mixing, int64_t row) {
  const bool is_dropped = mixing.mask.keep_row && !mixing.mask.keep_row[row];
  return is_dropped && mixing.target.data ? mixing.target : mixing.weight;
}

// Entries [column, column + count) of a row's mask.
MIXOUT_INLINE const uint32_t* mask_segment(const Mask& mask, int64_t columns, int64_t row, int64_t column,
                                           int64_t count) {
  if (mask.keep) return mask_row(mask, columns, row) + column;
  uint32_t* keep = scratch<uint32_t>(Slot::mask, count);
  draw(mask.seed, mask.threshold, row * columns + column, count, keep);
  return keep;
}

// Stores entries of W' rounded to Result, which a product reads widened again.
template <typename Operand, typename Result, typename Stored>
MIXOUT_INLINE void mix_segment(const Mixing& mixing, int64_t row, int64_t column, int64_t count,
                               Stored* __restrict out) {
  using C = Compute<Operand>;
  const uint32_t* __restrict keep = mask_segment(mixing.mask, mixing.columns, row, column, count);
  const Operand* __restrict weight = row_segment<Operand>(weight_of_row(mixing, row), row, column, count, Slot::weight);
  const C scale = static_cast<C>(mixing.scale);
  auto mix_all = [&](auto target_at) {
    for (int64_t i = 0; i < count; ++i) {
      const C mixed = mix_entry<C>(widen(weight[i]), target_at(i), scale, keep[i] != 0);
      // With the rounded entry in a variable, GCC 12 does not vectorise the loop that stores 16 bits.
      if constexpr (std::is_same_v<Stored, Result>) out[i] = narrow<Result>(mixed);
      else out[i] = widen(narrow<Result>(mixed));
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
      destination[i] = narrow<Result>(keep[i] ? scaled : C{0});
    }
  }
}

} // namespace
} // namespace mixout_fast::cpu::MIXOUT_ISA
