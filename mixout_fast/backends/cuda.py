"""The C++ backend for CUDA tensors: mixout_fast_cuda::* operators of csrc/cuda/, on LibTorch's stable ABI.

Nothing in it waits for the device: kept columns have always the static size, capacity(in_features, p), padded with -1,
so that every call can be captured in a CUDA graph.
"""

import functools
from pathlib import Path

import torch

from mixout_fast.backends import gpu, operators

# Rows up to which a product in one pass over W and U is taken: (y, dX), of few outputs and of many. Not measured: no
# GPU. Estimated for an H100 from bytes and from what a block waits for memory, 0.6 us a step with 16 rows, 0.9 with
# 64. For y a block has 16 outputs and 64 rows (16 where no tensor core serves), and a step for 256 in_features; for
# dX it has 32 in_features, and a step for 128 outputs. One pass / mixing first, us, in 16 bits: y of 64 rows and 4096
# outputs from 1024 in_features 8 / 14, but of 768 from 3072, on 48 of 132 multiprocessors, 11 / 10, with 16 rows 8 /
# 10; dX of 16 rows at 768x768 4 / 7, and a launch more where there is a bias, of 4096 outputs at 1024 in_features 20
# / 13.
ONE_PASS_ROWS = dict.fromkeys((torch.float32, torch.float64, torch.bfloat16, torch.float16), (16, 16))
MANY_OUTPUTS_ROWS = {
    torch.float32: (16, -1),
    torch.float64: (16, -1),
    torch.bfloat16: (64, -1),
    torch.float16: (64, -1),
}


def _load_error() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    return load(operators.PACKAGE / "_CUDA.so")


def load(library: Path) -> str | None:
    """Load the operators; None, or why they do not load."""
    not_built = "its CUDA library was not built (no nvcc at installation, or MIXOUT_FAST_BUILD without cuda?)"
    error = operators.load(library, not_built)
    if error is None:
        operators.register("mixout_fast_cuda", on_gpu=True)
        # Not as decorators: they import torch's compiler, 1.3 s that a machine without CUDA has no need of.
        torch.compiler.assume_constant_result(_why_no_kernels)
        torch.compiler.assume_constant_result(_allows_tf32)
    return error


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device; None: it can."""
    if device_type != "cuda":
        return "it serves CUDA tensors only"
    return LOAD_ERROR or _why_no_kernels()


def _why_no_kernels() -> str | None:
    # Asking would initialise CUDA, after which a process cannot fork; where there is a CUDA tensor it is.
    return _asked_of_the_gpu() if torch.cuda.is_initialized() else None


@functools.cache
def _asked_of_the_gpu() -> str | None:
    """Of the GPU that is current at the first question; others are taken to be like it."""
    reason = torch.ops.mixout_fast_cuda.why_no_kernels()
    return f"this GPU and driver do not run its CUDA library: {reason}" if reason else None


def is_one_pass(dtype: torch.dtype, rows: int, out_features: int) -> tuple[bool, bool]:
    """Whether y, and whether dX, of so many rows and outputs is computed in one pass.

    The operators mix first all the same where an operand's columns are not neighbours in memory or are more than 2^18.
    """
    return gpu.is_one_pass(ONE_PASS_ROWS, MANY_OUTPUTS_ROWS, dtype, rows, out_features)


def _ways(dtype: torch.dtype, rows: int, shape: torch.Size, p: float, mask: str) -> tuple[bool, bool, bool, bool]:
    one_pass = is_one_pass(dtype, rows, shape[0])
    tf32 = dtype == torch.float32 and any(one_pass) and _allows_tf32()
    return *one_pass, tf32, mask == "element" or gpu.takes_full_product(p, *shape)


def _allows_tf32() -> bool:
    """Whether PyTorch lets fp32 products round operands to TF32; a compiled graph keeps the answer of its tracing."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


_functions = operators.Functions("mixout_fast_cuda", _ways)
mix, mask_grad, linear, gradients = _functions.mix, _functions.mask_grad, _functions.linear, _functions.gradients
mix_linear = _functions.mix_linear

# At import and not at first use: torch.compile traces `unavailable`, and cannot trace a search of the file system.
LOAD_ERROR = _load_error()
