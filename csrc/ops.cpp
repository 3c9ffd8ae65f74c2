// The operators of the CPU's library; csrc/cpu implements them. mixout_fast/reference.py says what each computes.
#include "library.h"

STABLE_TORCH_LIBRARY(mixout_fast, m) {
  m.def(mixout_fast::mix_schema);
  m.def(mixout_fast::mask_grad_schema);
  m.def(mixout_fast::linear_schema);
  m.def(mixout_fast::linear_backward_schema);
  m.def("cpu_instruction_set() -> str");
  m.def("cpu_multiplies_in_fp32(ScalarType dtype) -> bool");
}
