"""The C++ backend for CPU tensors: mixout_fast::* operators of csrc/, on LibTorch's stable ABI."""

import sys

import torch

from mixout_fast import reference
from mixout_fast.backends import operators


def _load_error() -> str | None:
    error = operators.load(operators.PACKAGE / "_C.so", "no compiler at installation, or no --no-build-isolation?")
    if error is None:
        operators.register("mixout_fast", on_gpu=False)
    return error


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device; None: it can."""
    return "it serves CPU tensors only" if device_type != "cpu" else LOAD_ERROR


def instruction_set() -> str:
    """The kernels' instruction set: amx, avx512_bf16, avx512, avx2 or baseline.

    The first two are AVX-512 with bf16 products by AMX or by AVX512_BF16.
    """
    return torch.ops.mixout_fast.cpu_instruction_set()


def multiplies_in_fp32(dtype: torch.dtype) -> bool:
    """Whether operands of this 16-bit dtype are widened to fp32 for y, dX and dW.

    They are where the processor has no instructions for products of that dtype: PyTorch's then take 2.5 to 30 times as
    long as in fp32, and large ones longer.
    """
    return torch.ops.mixout_fast.cpu_multiplies_in_fp32(dtype)


def own_products() -> tuple[torch.dtype, ...]:
    """The dtypes in which the kernels compute y and dX themselves for any number of rows, except with few outputs."""
    name = instruction_set()
    own = {"baseline": (), "avx2": (torch.float32,)}.get(name, (torch.float32, torch.float64))
    multiplies_bf16 = name in ("avx512_bf16", "amx") or (own and multiplies_in_fp32(torch.bfloat16))
    return (*own, torch.bfloat16) if multiplies_bf16 else own


def _one_pass_rows() -> dict[torch.dtype, tuple[int, int]]:
    """Rows up to which a product in one pass over W and U beats mixing and then multiplying with the library: (y, dX).

    Measured: docs/experiments.md, "One pass or two".
    """
    own = own_products()
    rows = {
        torch.float32: (64, 32),
        torch.float64: (16, 16) if instruction_set() == "baseline" else (512, 512),
        torch.bfloat16: (16, 16),
        torch.float16: (128, 64),
    }
    if multiplies_in_fp32(torch.float16):
        rows[torch.float16] = (256, 256) if torch.float64 in own else (0, 0)
    return rows | dict.fromkeys(own, (sys.maxsize, sys.maxsize))


def _thin_rows() -> dict[torch.dtype, tuple[int, int]]:
    """Rows up to which few outputs (y: below 16, dX: below 32), bound by memory, are computed in one pass: (y, dX).

    Zen 4, one pass / mixing first, with 2, 15 and 24 outputs and 768 in_features: dX of 256 rows in fp32 0.30, 0.49,
    0.51, in bf16 1.26, 1.04, 0.89; of 1024 rows in fp32 1.6, 1.1, 1.3, in bf16 2.8, 1.8, 1.25; y in bf16 of 256 rows
    0.84, 0.78, 0.62, of 1024 rows 1.23, 1.03, 0.78. bf16 that is multiplied in fp32 has no limit: with 4096 rows, 2 and
    15 outputs, y takes 1.7 and 0.33, dX 0.60 and 0.81.
    """
    rows = dict.fromkeys((torch.float32, torch.float64, torch.float16), (sys.maxsize, 256))
    return rows | {torch.bfloat16: (sys.maxsize, sys.maxsize) if multiplies_in_fp32(torch.bfloat16) else (256, 256)}


def one_pass_rows(dtype: torch.dtype, out_features: int) -> tuple[int, int]:
    """The most rows for which y, and those for which dX, is computed in one pass."""
    forward, backward = ONE_PASS_ROWS[dtype]
    if out_features < 16:
        forward = min(forward, THIN_ROWS[dtype][0])
    if out_features < 32:
        backward = min(backward, THIN_ROWS[dtype][1])
    return forward, backward


def takes_full_product(p: float, out_features: int) -> bool:
    """Whether one full product, m ⊙ (dYᵀ X) · s, beats the compact one for an input mask's dW.

    With few outputs (reference.THIN_OUTPUT) it does. With more the answer matters only where the library computes dW:
    with AVX-512 the kernels do in fp32 and fp64, and with AVX512_BF16 or AMX in bf16. The compact product saves p of
    the operations, but x is gathered first.

    Measured on 2 cores, fp32, dW from x, full / compact, at p = 0.1 and 0.3: 128x768x768 1.0 and 1.3; 2048x768x768 0.94
    and 1.3; 1024x1024x4096 0.90 and 1.2.
    """
    return out_features < reference.THIN_OUTPUT or p <= 0.15


def _ways(dtype: torch.dtype, shape: torch.Size, p: float, mask: str) -> tuple[int, int, bool, bool]:
    return *one_pass_rows(dtype, shape[0]), False, mask == "element" or takes_full_product(p, shape[0])


_functions = operators.Functions("mixout_fast", _ways)
mix, mask_grad, linear, gradients = _functions.mix, _functions.mask_grad, _functions.linear, _functions.gradients
checked_mix_linear = _functions.checked_mix_linear

# At import and not at first use: torch.compile traces `unavailable`, and cannot trace a search of the file system.
LOAD_ERROR = _load_error()
if LOAD_ERROR is None:
    ONE_PASS_ROWS, THIN_ROWS = _one_pass_rows(), _thin_rows()
