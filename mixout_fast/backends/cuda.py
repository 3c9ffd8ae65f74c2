"""The C++ backend for CUDA tensors: mixout_fast_cuda::* operators of csrc/cuda/, on LibTorch's stable ABI.

The host never waits for the device: the kept columns always number capacity(in_features, p), their index padded with
-1, so that every call can be captured in a CUDA graph.
"""

import functools
from pathlib import Path

import torch

from mixout_fast.backends import gpu, operators

# Rows up to which (y, dX) are computed in one pass over W and U, for few outputs and for many (gpu.MANY_OUTPUTS). Not
# measured: no GPU. Estimated for an H100 from bytes and from how long a block waits for memory, 0.6 us a step with 16
# rows, 0.9 with 64. For y a block has 16 outputs and 64 rows (16 without tensor cores), and a step for every 256
# in_features; for dX it has 32 in_features, and a step for every 128 outputs. One pass / mixing first, us, in 16 bits:
# y of 64 rows with 4096 outputs and 1024 in_features 8 / 14, but with 768 and 3072, on 48 of 132 multiprocessors,
# 11 / 10, and there with 16 rows 8 / 10; dX of 16 rows at 768x768 4 / 7, but one launch more where there is a bias,
# with 4096 outputs and 1024 in_features 20 / 13.
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
    error = operators.load(library, "no nvcc at installation, or MIXOUT_FAST_BUILD without cuda?")
    if error is None:
        operators.register("mixout_fast_cuda", on_gpu=True)
        # Not as decorators: those would import torch's compiler, in 1.3 s, on machines without CUDA too.
        torch.compiler.assume_constant_result(_why_no_kernels)
        torch.compiler.assume_constant_result(_allows_tf32)
    return error


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device; None: it can."""
    if device_type != "cuda":
        return "it serves CUDA tensors only"
    return LOAD_ERROR or _why_no_kernels()


def _why_no_kernels() -> str | None:
    # Asking would initialise CUDA, after which a process cannot fork; where there is a CUDA tensor, it is initialised.
    return _asked_of_the_gpu() if torch.cuda.is_initialized() else None


@functools.cache
def _asked_of_the_gpu() -> str | None:
    """Why the GPU cannot run the library; None: it can. Asked once, of the current GPU, and assumed of the others."""
    reason = torch.ops.mixout_fast_cuda.why_no_kernels()
    return f"this GPU and driver do not run its CUDA library: {reason}" if reason else None


def one_pass_rows(dtype: torch.dtype, out_features: int) -> tuple[int, int]:
    """The most rows for which y, and those for which dX, is computed in one pass.

    The operators mix first all the same where an operand's columns are not neighbours in memory, or in_features is more
    than 2^18.
    """
    return (ONE_PASS_ROWS if out_features < gpu.MANY_OUTPUTS else MANY_OUTPUTS_ROWS)[dtype]


def _ways(dtype: torch.dtype, shape: torch.Size, p: float, mask: str) -> tuple[int, int, bool, bool]:
    tf32 = dtype == torch.float32 and _allows_tf32()
    in_full = mask == "element" or gpu.takes_full_product(p, *shape)
    return *one_pass_rows(dtype, shape[0]), tf32, in_full


def _allows_tf32() -> bool:
    """Whether PyTorch lets fp32 products round operands to TF32; a compiled graph keeps the answer at its tracing."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


_functions = operators.Functions("mixout_fast_cuda", _ways)
mix, mask_grad, linear, gradients = _functions.mix, _functions.mask_grad, _functions.linear, _functions.gradients
checked_mix_linear = _functions.checked_mix_linear

# At import and not at first use: torch.compile traces `unavailable`, and cannot trace a search of the file system.
LOAD_ERROR = _load_error()
