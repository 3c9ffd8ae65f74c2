"""The C++ backend for CPU tensors: mixout_fast::* operators of csrc/, on LibTorch's stable ABI."""

import sys

import torch

from mixout_fast import reference
from mixout_fast.backends import operators

# Rows up to which a product in one pass over W and U beats mixing and then multiplying with the library: (y, dX).
# own_products have none. Measured on 2 cores, one pass / two, y and dX, L2 swept before. With AVX-512 (Intel) fp32 at
# 768x768 takes 0.77 and 0.93 with 128 rows, 0.87 and 0.92 with 512, 0.91 and 0.93 with 2048; at 1024x4096 0.67 and
# 0.85, 0.84 and 0.94, 0.95 and 0.98; fp64 0.78 and 0.83, 0.92 and 0.92, 0.99 and 0.98. With AVX2, of which MKL makes
# use too (Zen 4), fp32 at 768x768 takes 0.50 and 0.52 with 128, 0.82 and 0.86 with 512, 0.95 and 0.99 with 2048; at
# 1024x4096 0.66 and 0.69 with 128, 0.80 and 0.94 with 1024; fp64 at 768x768 0.96 and 0.88, 0.89 and 0.99, 1.06 and
# 1.10; no processor of Intel's with AVX2 alone was at hand. Without AVX2 (vectors of 16 bytes, on x86 without fused
# multiply-add) a step at 768x768, p = 0.9, takes of nn.Linear's time in one pass / mixed first, with 16, 32, 64 and 128
# rows, fp32 0.95 / 1.7, 0.89 / 1.3, 0.87 / 1.1, 0.78 / 0.85, fp64 0.74 / 1.2 to 0.51 / 0.77, where MKL's vectors are
# as narrow (MKL_CBWR=COMPATIBLE); where they are not (ATEN_CPU_CAPABILITY alone), fp32 1.5 / 2.7, 1.1 / 1.5, 1.3 / 1.2,
# 1.5 / 1.3 (dX mixed first), fp64 1.3 / 1.7, 1.4 / 1.0, 1.6 / 1.0, 1.9 / 1.1; no ARM was at hand. Where 16 bits are
# multiplied in fp32 (Zen 4), at 768x768 with 16, 256 and 2048 rows and at 1024x4096: bf16 with AVX-512 0.55 and 0.54,
# 0.87 and 0.87, 0.85 and 0.86, 0.53 and 0.61, 0.77 and 0.81, 0.75 and 0.89; with AVX2 0.41 and 0.41, 0.71 and 0.72,
# 0.96 and 1.02, 0.50 and 0.56, 0.80 and 0.86, 0.84 and 0.94; fp16 with AVX-512 0.81 and 0.82, 0.98 and 0.97, 1.01 and
# 1.07, 0.74 and 0.79, 0.83 and 0.92, 0.82 and 1.05; with AVX2, whose conversions of fp16 the kernels do not use, 1.15
# and 1.20 with 16. Where only the library's products use instructions for them (Intel), bf16 takes 1.01 and 0.86 with
# 16, 1.19 and 1.03 with 32, fp16 0.85 and 0.96 with 64, 0.97 and 1.04 with 128.
ONE_PASS_ROWS = {
    torch.float32: (64, 32),
    torch.float64: (512, 512),
    torch.bfloat16: (16, 16),
    torch.float16: (128, 64),
}

# The most rows for few outputs: for y of fewer than 16, for dX of fewer than 32. They wait for memory. Zen 4, one pass
# / two, of 2, 15 and 24 outputs from 768 features: dX of 256 rows in fp32 0.30, 0.49, 0.51, in bf16 1.26, 1.04, 0.89;
# of 1024 rows in fp32 1.6, 1.1, 1.3, in bf16 2.8, 1.8, 1.25; y in bf16 of 256 rows 0.84, 0.78, 0.62, of 1024 rows
# 1.23, 1.03, 0.78. bf16 that is multiplied in fp32 has no such limit: with 4096 rows, 2 and 15 outputs, y takes 1.7
# and 0.33, dX 0.60 and 0.81.
THIN_ROWS = {
    torch.float32: (sys.maxsize, 256),
    torch.float64: (sys.maxsize, 256),
    torch.bfloat16: (256, 256),
    torch.float16: (sys.maxsize, 256),
}


def _load_error() -> str | None:
    not_built = "its C++ library was not built (no compiler at installation?)"
    error = operators.load(operators.PACKAGE / "_C.so", not_built)
    if error is None:
        operators.register("mixout_fast", on_gpu=False)
    return error


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device; None: it can."""
    return "it serves CPU tensors only" if device_type != "cpu" else LOAD_ERROR


def instruction_set() -> str:
    """What the kernels run with: amx or avx512_bf16 (AVX-512, bf16 products by AMX or AVX512_BF16), avx512, avx2 or
    baseline."""
    return torch.ops.mixout_fast.cpu_instruction_set()


def multiplies_in_fp32(dtype: torch.dtype) -> bool:
    """Whether operands of this 16-bit dtype are widened to fp32 for y, dX and dW: where the processor has no
    instructions for such products, PyTorch's take 2.5 to 30 times as long as in fp32, large ones longer."""
    return torch.ops.mixout_fast.cpu_multiplies_in_fp32(dtype)


def own_products() -> tuple[torch.dtype, ...]:
    """The dtypes of which y and dX are the kernels' own products, whatever the rows but for few outputs."""
    name = instruction_set()
    own = {"baseline": (), "avx2": (torch.float32,)}.get(name, (torch.float32, torch.float64))
    multiplies_bf16 = name in ("avx512_bf16", "amx") or (own and multiplies_in_fp32(torch.bfloat16))
    return (*own, torch.bfloat16) if multiplies_bf16 else own


def is_one_pass(dtype: torch.dtype, rows: int, out_features: int) -> tuple[bool, bool]:
    """Whether y, and whether dX, of so many rows and outputs is computed in one pass."""
    forward, backward = ONE_PASS_ROWS[dtype]
    if out_features < 16:
        forward = min(forward, THIN_ROWS[dtype][0])
    if out_features < 32:
        backward = min(backward, THIN_ROWS[dtype][1])
    return rows <= forward, rows <= backward


def takes_full_product(p: float, out_features: int) -> bool:
    """Whether dW of an input mask from one full product, m ⊙ (dYᵀ X) · s, beats the compact one.

    Of few outputs it does (reference.THIN_OUTPUT); of more it matters where the library computes dW, which with AVX-512
    it does not in fp32 and fp64. The compact product saves p of the operations, and x is gathered first.

    Measured on 2 cores, fp32, dW from x, full / compact: 128x768x768 at p = 0.1 and 0.3: 1.0, 1.3; 2048x768x768: 0.94
    and 1.3; 1024x1024x4096: 0.90 and 1.2.
    """
    return out_features < reference.THIN_OUTPUT or p <= 0.15


def _ways(dtype: torch.dtype, rows: int, shape: torch.Size, p: float, mask: str) -> tuple[bool, bool, bool, bool]:
    return *is_one_pass(dtype, rows, shape[0]), False, mask == "element" or takes_full_product(p, shape[0])


_functions = operators.Functions("mixout_fast", _ways)
mix, mask_grad, linear, gradients = _functions.mix, _functions.mask_grad, _functions.linear, _functions.gradients
mix_linear = _functions.mix_linear

# At import and not at first use: torch.compile traces `unavailable`, and cannot trace a search of the file system.
LOAD_ERROR = _load_error()
if LOAD_ERROR is None:
    if instruction_set() == "baseline":
        ONE_PASS_ROWS[torch.float64] = (16, 16)
    ONE_PASS_ROWS |= dict.fromkeys(own_products(), (sys.maxsize, sys.maxsize))
    if multiplies_in_fp32(torch.float16):
        ONE_PASS_ROWS[torch.float16] = (256, 256) if torch.float64 in own_products() else (0, 0)
    if multiplies_in_fp32(torch.bfloat16):
        THIN_ROWS[torch.bfloat16] = (sys.maxsize, sys.maxsize)
