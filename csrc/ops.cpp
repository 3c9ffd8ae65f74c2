// The operators' schemas; csrc/cpu and csrc/cuda implement them. mixout_fast/reference.py says what each computes.
//
// A mask is given by a 0-d int64 seed, threshold = round(p * 2^32), and capacity: the most columns that an input mask
// keeps, or None for one entry per element. scale is 1 / (1 - p).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mixout_fast, m) {
  m.def("mix(Tensor weight, Tensor? target, Tensor seed, int threshold, float scale, int? capacity, ScalarType dtype)"
        " -> Tensor");
  m.def("mask_grad(Tensor grad, Tensor seed, int threshold, int? capacity, float factor, ScalarType dtype) -> Tensor");
  m.def("gather(Tensor input, Tensor seed, int threshold, int capacity, bool fixed_size) -> (Tensor, Tensor)");
  m.def("mix_gather(Tensor input, Tensor weight, Tensor? target, Tensor seed, int threshold, float scale, int capacity,"
        " bool fixed_size) -> (Tensor, Tensor, Tensor)");
  m.def("expand(Tensor compact, Tensor index, int in_features, float factor, ScalarType dtype) -> Tensor");
  m.def("fused_linear(Tensor input, Tensor weight, Tensor? target, Tensor? bias, Tensor seed, int threshold,"
        " float scale, int? capacity) -> Tensor");
  m.def("fused_grad_input(Tensor grad, Tensor weight, Tensor? target, Tensor seed, int threshold, float scale,"
        " int? capacity) -> Tensor");
  m.def("cpu_instruction_set() -> str");
}
