// The CPU kernels, compiled once per instruction set and chosen at run time. They are serial and work on a range of
// rows or columns; ops.cpp checks tensors, allocates, and spreads the ranges over PyTorch's threads.
#pragma once

// What kernels.inl needs of the standard library. It must not be included in a region for an instruction set: its
// inline functions would be compiled for that set, and the linker could keep these for all.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

namespace mixout_fast::cpu {

struct Matrix {
  const void* data;
  int64_t row_stride; // in elements
  int64_t column_stride;
};

// One entry per column, shared by all rows; or one per row; or one per element, drawn where it is used.
struct Mask {
  // (columns,): all bits set where kept, 0 where dropped. With `keep_row` (2, columns): the mask of kept rows, then
  // that of dropped rows. Null: one entry per element.
  const uint32_t* keep;
  const uint32_t* keep_row; // (rows,); null: all rows have the same mask
  uint64_t seed;
  uint64_t threshold;
};

// W' = U + m (W - U) scale.
struct Mixing {
  Matrix weight;
  Matrix target; // data null: zero
  int64_t rows;
  int64_t columns;
  double scale;
  Mask mask;
};

// The kept columns of x: those numbered index[0 ... count), ascending, or without an index all `count` columns.
struct KeptX {
  Matrix x;
  int64_t rows;
  const int32_t* index;
  int64_t count;
};

// Kernels for a pair of dtypes, the operands' and the result's. A product's left operand has the result's.
struct Kernels {
  // Rows [begin, end) of W' into out (rows, columns).
  void (*mix)(const Mixing& mixing, int64_t begin, int64_t end, void* out);

  // Columns [begin, end) of out (m, rows) = left W'^T + bias, or of out (m, columns) = left W' + bias, from the rows or
  // columns [begin, end) of W and U, read once. bias may be null. The whole product has all_rows rows, this call m.
  void (*times_transposed)(const Mixing& mixing, Matrix left, int64_t m, int64_t all_rows, int64_t begin, int64_t end,
                           const void* bias, void* out);
  void (*times)(const Mixing& mixing, Matrix left, int64_t m, int64_t all_rows, int64_t begin, int64_t end,
                const void* bias, void* out);

  // Rows [begin, end) of mask * grad * factor into out (rows, columns).
  void (*mask_grad)(Matrix grad, int64_t columns, const Mask& mask, double factor, int64_t begin, int64_t end,
                    void* out);

  // Rows [begin, end) of out (rows, columns): column index[j] is compact's row j times factor, the others are 0.
  void (*expand)(Matrix compact, const int32_t* index, int64_t count, int64_t columns, double factor, int64_t begin,
                 int64_t end, void* out);

  // The same, but row index[j] of out is compact's row j times factor.
  void (*expand_rows)(Matrix compact, const int32_t* index, int64_t count, int64_t columns, double factor,
                      int64_t begin, int64_t end, void* out);

  // Our own product for dW (stage_kept, then grad_weight), null where the library's is faster: set with AVX-512 where
  // all is fp32 or all fp64, with AVX512_BF16 or AMX where x and dy are bf16. stage_kept writes rows [begin, end) of
  // the kept columns of x into `staged`, which has room for round_up(rows, staged_unit) rows of round_up(count + 1,
  // staged_unit) elements; staged_unit divides begin.
  void (*stage_kept)(const KeptX& kept_x, int64_t begin, int64_t end, void* staged) = nullptr;
  // Rows [begin, end) of dW (outputs, columns), from all staged rows and dy (m, outputs): the columns numbered `index`,
  // times factor; the others are 0. Also of db, the sums of dy, unless it is null. dW is row-major or column-major.
  void (*grad_weight)(const KeptX& kept_x, const void* staged, Matrix dy, int64_t outputs, const int32_t* index,
                      int64_t columns, double factor, int64_t begin, int64_t end, bool column_major, void* dw,
                      void* db) = nullptr;
};

enum class Dtype { f64, f32, bf16, f16 };

struct InstructionSet {
  const char* name;
  // Entries [first, first + count) of a mask.
  void (*draw)(uint64_t seed, uint64_t threshold, int64_t first, int64_t count, uint32_t* keep);
  // Columns index[0 ... count) of rows [begin, end) of x into out (rows, count); index -1 gives 0. Elements have 2, 4
  // or 8 bytes.
  void (*gather)(Matrix x, int64_t element_size, const int32_t* index, int64_t count, int64_t begin, int64_t end,
                 void* out);
  // Null for a pair of dtypes that no operation has.
  const Kernels* (*kernels)(Dtype operand, Dtype result);
};

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Threads split the outputs of a product at multiples of this, which is a multiple of every vector's lanes.
constexpr int64_t output_unit = 16;
// Threads split the rows of x that they stage for dW at multiples of this.
constexpr int64_t staged_unit = 32;
// The outputs of a product's widest panel.
constexpr int64_t panel_outputs = 48;
// Up to this number of rows, a product uses small blocks, and copies by blocks an x or dy not laid out in rows.
constexpr int64_t few_rows = 256;

// The number of kept columns: -1 pads their indices to `count`.
constexpr int64_t kept_count(const int32_t* index, int64_t count) {
  while (count > 0 && index[count - 1] < 0) --count;
  return count;
}

namespace baseline {
extern const InstructionSet instruction_set;
}
#if defined(__x86_64__)
namespace avx2 {
extern const InstructionSet instruction_set;
}
namespace avx512 {
extern const InstructionSet instruction_set;
extern const InstructionSet with_bf16; // bf16 products by AVX512_BF16
extern const InstructionSet with_amx;  // bf16 products on AMX tiles
} // namespace avx512
#endif

} // namespace mixout_fast::cpu
