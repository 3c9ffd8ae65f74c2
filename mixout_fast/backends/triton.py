"""The Triton backend for GPUs; under TRITON_INTERPRET=1 it serves CPU tensors too, slowly, for tests.

Launches per call of the layer, the library's product among them and the seed's draw (functional.py) not:

    forward     mixed first: W', kept indices and X[:, kept] in one launch, then the library's product: 2
                in one pass: 1, and 1 to gather
    backward    dX: 2, or 1 in one pass; db: 1; dW: the compact product and its expansion, 2 (3 where forward saved x,
                which is then gathered)

Where mixed first, backward's five could be four only if db shared a launch, and no kernel here reads dY. Sums of its
columns beside W' or the dense gradient would be a few long programs (at 1024 features, 16 blocks of 64) that all others
are done before; a column of ones beside X[:, kept], with db in the compact product, would round dY to TF32 where
products do. A compact product of our own that writes dW at once would stand against the library's. None was measured.

Nothing waits for the device: the kept indices always have their static size C, `static` or not, padded with -1.
"""

import functools
import importlib.util
import os
import struct
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mixout_fast import reference
from mixout_fast.reference import capacity, scale, threshold

# A constant: torch.compile traces `unavailable` and cannot trace a search for a module.
INSTALLED = importlib.util.find_spec("triton") is not None
if INSTALLED:
    import triton
    import triton.language as tl

    from mixout_fast.backends import triton_kernels as kernels

INTERPRETS = INSTALLED and kernels.INTERPRETS.value

# Rows up to which a product in one pass over W and U is chosen before mixing and then multiplying: (y, dX). Not
# measured. Estimated from bytes: for 16-bit weights mixing first moves 8 bytes an entry (W and U read, W' written and
# read) where one pass moves 4, and costs a launch more; but one pass reads W and U again for every further 64 rows.
# In fp32 the product itself weighs more, and the library's is the better one.
ONE_PASS_ROWS = {
    torch.bfloat16: (64, 64),
    torch.float16: (64, 64),
    torch.float32: (16, 16),
    torch.float64: (-1, -1),
}

# The first where it makes enough programs for the device, else the second; MIXOUT_FAST_AUTOTUNE=1 measures both at the
# first call of each size instead and keeps the choice on disk, after which sums may round otherwise than before. Not
# measured; chosen by benchmarks/kernel_report.py: in steps of 64 entries of 16-bit rows some kernels take more than 200
# registers or spill a dozen, in steps of 32 none does (at most 134; with 5 stages of the second, one spills). In fp32
# steps are also the pieces of a sum (one_pass_kernel): at 3 rows and 127 in_features pieces of 64 have 2.5 times the
# error of MKL's sum, pieces of 32 have 1.4 times.
ONE_PASS_CONFIGS = (
    {"BLOCK_F": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 4},
    {"BLOCK_F": 32, "BLOCK_R": 32, "num_warps": 4, "num_stages": 4},
)
AUTOTUNES = os.environ.get("MIXOUT_FAST_AUTOTUNE") == "1" and not INTERPRETS

# Programs, about one a multiprocessor, from which on the first configuration is taken. Not measured.
WIDE_PROGRAMS = 128

# Bytes of a tile of one operand: 4 loads of 16 bytes a thread. Not measured.
TILE_BYTES = 8192
BLOCK_COLUMNS = 1024
# Programs of a streaming kernel: 4 on each of an H100's 132 multiprocessors. Not measured.
PROGRAMS = 528
ELEMENT_BLOCK = 2048
# Of the dense gradient, (BLOCK_N, BLOCK_K). Not measured.
EXPANDED = (32, 64)


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device; None: it can."""
    if not INSTALLED:
        return "triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and INTERPRETS):
        return None
    return "it serves CUDA and ROCm devices (and CPUs through Triton's interpreter, under TRITON_INTERPRET=1)"


def is_one_pass(dtype: torch.dtype, rows: int) -> tuple[bool, bool]:
    """Whether y, and whether dX, of so many rows is computed in one pass."""
    forward, backward = ONE_PASS_ROWS[dtype]
    return rows <= forward, rows <= backward


def mix(weight: Tensor, target: Tensor | None, seed: Tensor, p: float, mask: str, dtype: torch.dtype) -> Tensor:
    return masked(weight, target, seed, p, mask, scale(p), False, dtype)


def mask_grad(grad: Tensor, seed: Tensor, p: float, mask: str, factor: float, dtype: torch.dtype) -> Tensor:
    return masked(grad, None, seed, p, mask, factor, True, dtype)


def gather(rows: Tensor, seed: Tensor, p: float, static: bool) -> tuple[Tensor, Tensor]:
    return gathered(rows, seed, p)


def linear(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    seed: Tensor,
    p: float,
    mask: str,
    gathers: bool,
    static: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows = input.reshape(-1, weight.shape[1])
    one_pass, _ = is_one_pass(input.dtype, rows.shape[0])
    if gathers and not one_pass:
        mixed, index, columns = mixed_and_gathered(weight, target, rows, seed, p)
        return F.linear(input, mixed, bias), index, columns
    if one_pass:
        output = product(rows, weight, target, bias, seed, p, mask, False).view(*input.shape[:-1], weight.shape[0])
    else:
        output = F.linear(input, mix(weight, target, seed, p, mask, input.dtype), bias)
    return output, *(gathered(rows, seed, p) if gathers else (None, None))


def grad_input(grad: Tensor, weight: Tensor, target: Tensor | None, seed: Tensor, p: float, mask: str) -> Tensor:
    _, one_pass = is_one_pass(grad.dtype, grad.shape[0])
    if one_pass:
        return product(grad, weight, target, None, seed, p, mask, True)
    return grad.mm(mix(weight, target, seed, p, mask, grad.dtype))


def grad_weight(
    columns: Tensor, grad: Tensor, index: Tensor, in_features: int, factor: float, dtype: torch.dtype
) -> Tensor:
    if grad.shape[1] < reference.THIN_OUTPUT:
        return reference.grad_weight(columns, grad, index, in_features, factor, dtype)
    return expanded(columns.t().mm(grad), index, in_features, factor, dtype)


def gradients(*arguments) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As reference's, of the functions above: the two products one after another, dW's always the compact one.

    A full one would save a launch and the gather where p · rows is small. Not measured.
    """
    return reference.gradients(*arguments, pieces=sys.modules[__name__])


def launch(kernel, grid: tuple[int, ...] | Callable, device: torch.device, *arguments, **options) -> None:
    """Launch on the tensors' device, which need not be the current one."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, enable_fp_fusion=False, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, enable_fp_fusion=False, **options)


def traced(fake: Callable) -> Callable:
    """Makes a launching function an operator under tracing, where the compiler takes it as a whole.

    Inductor would compile a kernel that it sees with options of its own, fp fusion among them. In eager the function
    is called as it is: an operator costs more host time than the launch.
    """

    def decorate(function: Callable) -> Callable:
        operator = torch.library.custom_op(f"mixout_fast::triton_{function.__name__}", function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments):
            return operator(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        call.operator = operator
        return call

    return decorate


def _fake_masked(weight, target, seed, p, mask, factor, is_gradient, dtype):
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


@traced(_fake_masked)
def masked(
    weight: Tensor,
    target: Tensor | None,
    seed: Tensor,
    p: float,
    mask: str,
    factor: float,
    is_gradient: bool,
    dtype: torch.dtype,
) -> Tensor:
    """W' of (N, K) or (N, K, R) in `dtype`, contiguous; of a gradient m ⊙ weight · factor."""
    mixed = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if mask == "input":
        _prologue(weight, target, mixed, None, None, None, seed, p, factor, is_gradient)
        return mixed
    if weight.dim() == 3:
        weight, target = (None if t is None else t.contiguous().flatten(1) for t in (weight, target))
    launch(
        kernels.element_kernel,
        (_blocks(weight.numel(), ELEMENT_BLOCK),),
        weight.device,
        weight,
        target,
        mixed,
        seed,
        threshold(p),
        _bits(factor),
        weight.numel(),
        weight.shape[1],
        *weight.stride(),
        *_strides(target, 2),
        IS_GRADIENT=is_gradient,
        CONTIGUOUS=weight.is_contiguous() and (target is None or target.is_contiguous()),
        COMPUTE=_compute(weight),
        BLOCK=ELEMENT_BLOCK,
    )
    return mixed


def _fake_gathered(rows, seed, p):
    count = capacity(rows.shape[1], p)
    return torch.empty(count, dtype=torch.int32, device=rows.device), rows.new_empty(rows.shape[0], count)


@traced(_fake_gathered)
def gathered(rows: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Kept indices (C,) int32 and kept columns (M, C) of rows (M, K), padded with -1 and 0."""
    index, columns = _fake_gathered(rows, seed, p)
    _prologue(None, None, None, rows, columns, index, seed, p, 1.0, False)
    return index, columns


def _fake_mixed_and_gathered(weight, target, rows, seed, p):
    return torch.empty(weight.shape, dtype=rows.dtype, device=rows.device), *_fake_gathered(rows, seed, p)


@traced(_fake_mixed_and_gathered)
def mixed_and_gathered(
    weight: Tensor, target: Tensor | None, rows: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """W' (N, K) in the rows' dtype, and `gathered`, in one launch."""
    mixed, index, columns = _fake_mixed_and_gathered(weight, target, rows, seed, p)
    _prologue(weight, target, mixed, rows, columns, index, seed, p, scale(p), False)
    return mixed, index, columns


def _prologue(weight, target, mixed, rows, columns, index, seed, p, factor, is_gradient) -> None:
    matrix = rows if weight is None else weight
    in_features = matrix.shape[1]
    bound = capacity(in_features, p)
    block_k = min(BLOCK_COLUMNS, max(16, _power_of_2(in_features)))
    block_n = max(1, TILE_BYTES // (block_k * matrix.element_size()))
    outputs = 0 if weight is None else weight.shape[0]
    offsets = weight.shape[2] if matrix.dim() == 3 else 1
    column_blocks = _blocks(in_features, block_k)
    weight_rows, row_blocks = _split(outputs * offsets, block_n, column_blocks)
    weight_programs = row_blocks * column_blocks
    # The index is written even where there are no rows.
    gathered_rows, gather_programs = (1, 0) if rows is None else _split(max(rows.shape[0], 1), block_n, 1)
    launch(
        kernels.prologue_kernel,
        (weight_programs + gather_programs,),
        matrix.device,
        weight,
        target,
        mixed,
        rows,
        columns,
        index,
        seed,
        threshold(p),
        _bits(factor),
        outputs,
        in_features,
        offsets,
        0 if rows is None else rows.shape[0],
        bound,
        *_strides(weight, 3),
        *_strides(target, 3),
        *_strides(rows, 2),
        weight_programs,
        weight_rows,
        gathered_rows,
        IS_GRADIENT=is_gradient,
        BOUNDED=bound < in_features,
        COMPUTE=_compute(matrix),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )


def one_pass_config(rows: Tensor, features: int) -> dict:
    """The blocks and launch options of a one-pass product with so many features."""
    block_m = min(64, max(16, _power_of_2(rows.shape[0])))
    wide, narrow = ONE_PASS_CONFIGS
    programs = _blocks(features, wide["BLOCK_F"]) * _blocks(rows.shape[0], block_m)
    return {"BLOCK_M": block_m} | (wide if programs >= WIDE_PROGRAMS else narrow)


@functools.cache
def tuned_kernel():
    """The one-pass kernel that chooses by measurement, for each size, dtype and block of rows."""
    configs = []
    for config in ONE_PASS_CONFIGS:
        blocks = {name: size for name, size in config.items() if name.startswith("BLOCK")}
        configs.append(triton.Config(blocks, config["num_warps"], config["num_stages"]))
    key = ["N", "K", "TRANSPOSED", "ELEMENT", "BLOCK_M"]
    return triton.autotune(configs, key, cache_results=True)(kernels.one_pass_kernel)


def _fake_product(rows, weight, target, bias, seed, p, mask, transposed):
    return rows.new_empty(rows.shape[0], weight.shape[1 if transposed else 0])


@traced(_fake_product)
def product(
    rows: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    seed: Tensor,
    p: float,
    mask: str,
    transposed: bool,
) -> Tensor:
    """rows W'ᵀ + bias, or transposed rows W', in one pass: (M, N), or (M, K), in the rows' dtype."""
    output = _fake_product(rows, weight, target, bias, seed, p, mask, transposed)
    in_features = weight.shape[1]
    bound = capacity(in_features, p) if mask == "input" else in_features
    config = one_pass_config(rows, output.shape[1])
    kernel = kernels.one_pass_kernel
    if AUTOTUNES:
        kernel, config = tuned_kernel(), {"BLOCK_M": config["BLOCK_M"]}

    def grid(options):
        return _blocks(output.shape[1], options["BLOCK_F"]), _blocks(rows.shape[0], options["BLOCK_M"])

    launch(
        kernel,
        grid,
        rows.device,
        rows,
        weight,
        target,
        bias,
        output,
        seed,
        threshold(p),
        _bits(scale(p)),
        rows.shape[0],
        *weight.shape,
        bound,
        *rows.stride(),
        *weight.stride(),
        *_strides(target, 2),
        *_strides(bias, 1),
        TRANSPOSED=transposed,
        ELEMENT=mask == "element",
        BOUNDED=bound < in_features,
        IN_FOURS=in_features % 4 == 0,
        COMPUTE=_compute(rows),
        PRECISION=_precision(),
        **config,
    )
    return output


def _fake_expanded(compact, index, in_features, factor, dtype):
    return torch.empty(compact.shape[1], in_features, dtype=dtype, device=compact.device)


@traced(_fake_expanded)
def expanded(compact: Tensor, index: Tensor, in_features: int, factor: float, dtype: torch.dtype) -> Tensor:
    """The dense gradient (N, K) in `dtype`: compact (C, N) times factor in the kept columns, 0 elsewhere."""
    dense = _fake_expanded(compact, index, in_features, factor, dtype)
    count, outputs = compact.shape
    column_blocks = _blocks(in_features, EXPANDED[1])
    row_count, row_blocks = _split(outputs, EXPANDED[0], column_blocks)
    launch(
        kernels.expand_kernel,
        (column_blocks, row_blocks),
        compact.device,
        compact,
        index,
        dense,
        _bits(factor),
        outputs,
        in_features,
        count,
        *compact.stride(),
        row_count,
        STEPS=count.bit_length(),
        COMPUTE=_compute(compact),
        BLOCK_N=EXPANDED[0],
        BLOCK_K=EXPANDED[1],
    )
    return dense


def _blocks(count: int, size: int) -> int:
    """count / size, rounded up. Triton's cdiv takes 3.5 us on the host, this 0.15, and a launch has several."""
    return -(-count // size)


def _power_of_2(count: int) -> int:
    """The next power of two, count itself included."""
    return 1 << max(count - 1, 0).bit_length()


def _split(rows: int, block: int, column_blocks: int) -> tuple[int, int]:
    """Rows that a program takes, a multiple of `block`, for about PROGRAMS programs, and how many parts that makes."""
    taken = block * max(1, _blocks(rows, block) * column_blocks // PROGRAMS)
    return taken, _blocks(rows, taken)


def _precision() -> str:
    """TF32 for fp32 products where torch's own use it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None else "ieee"


def _compute(tensor: Tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The strides, with 0 for dimensions that it lacks."""
    strides = () if tensor is None else tensor.stride()
    return strides + (0,) * (count - len(strides))


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]
