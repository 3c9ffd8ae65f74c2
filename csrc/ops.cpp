// The operators' schemas; csrc/cpu and csrc/cuda implement them. mixout_fast/reference.py says what each computes.
//
// A mask is given by a 0-d int64 seed, p, and whether it has one entry per column (an input mask) or per element.
//
// linear_backward gives dX, dW and db, where needed, of grad (..., N). dW is made of the kept index and columns, or
// where there is an input, of that: in one full product, or gathered first (where a kernel multiplies: as it is
// staged). one_pass is of dX.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mixout_fast, m) {
  m.def("mix(Tensor weight, Tensor? target, Tensor seed, float p, bool per_column, ScalarType dtype) -> Tensor");
  m.def("mask_grad(Tensor grad, Tensor seed, float p, bool per_column, float factor, ScalarType dtype) -> Tensor");
  m.def("linear(Tensor input, Tensor weight, Tensor? target, Tensor? bias, Tensor seed, float p, bool per_column,"
        " bool one_pass, bool gathers, bool fixed_size) -> (Tensor, Tensor?, Tensor?)");
  m.def("linear_backward(Tensor grad, Tensor? input, Tensor? index, Tensor? columns, Tensor weight, Tensor? target,"
        " Tensor seed, bool needs_input, bool needs_weight, bool needs_bias, float p, bool per_column,"
        " float factor, bool one_pass, bool full_product) -> (Tensor?, Tensor?, Tensor?)");
  m.def("cpu_instruction_set() -> str");
  m.def("cpu_multiplies_in_fp32(ScalarType dtype) -> bool");
}
