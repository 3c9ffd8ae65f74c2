"""The Triton backend for GPUs; under TRITON_INTERPRET=1 it serves CPU tensors too, slowly, for tests.

Launches per call of the layer, at most 2 forward and 4 backward, with the library's but without the seed's draw
(functional.py):

                               forward                backward
    input mask, mixed first    prologue, product      prologue, product, product, dense dW
    input mask, in one pass    prologue*, one pass    prologue** or else the sum of dY, one pass, product, dense dW
    element mask, mixed first  prologue, product      prologue, product, product, prologue
    element mask, in one pass  one pass               one pass, product, prologue, the sum of dY

    *   only where forward saves X[:, kept], to gather it
    **  only where forward saved x, to gather X[:, kept]
    With few outputs or a small p, an input mask's dW comes from one full product, as an element mask's does (gpu.py).

A prologue writes what is wanted of: W', or m ⊙ dW' · s; the kept indices and X[:, kept]; partial sums of dY's columns,
which the launch that writes dW adds up to db.

The host never waits for the device: the kept indices are always padded with -1 to the capacity C, `static` or not.

No constant here or in triton_kernels.py has been measured on a GPU.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mixout_fast import reference
from mixout_fast.backends import gpu
from mixout_fast.reference import capacity, is_column_major, scale, threshold

# A constant: torch.compile traces `unavailable` and cannot trace a search for a module.
INSTALLED = importlib.util.find_spec("triton") is not None
if INSTALLED:
    import triton.language as tl

    from mixout_fast.backends import triton_kernels as kernels

INTERPRETS = INSTALLED and kernels.INTERPRETS.value

# Rows up to which (y, dX) are computed in one pass over W and U rather than by mixing first and multiplying then, for
# few outputs and for many (gpu.MANY_OUTPUTS). Not measured. For 16-bit weights, mixing first moves 8 bytes per entry
# (W and U read, W' written and read) where one pass moves 4, and costs one launch more; but one pass reads W and U
# again for every further 64 rows, and is slow where there are few programs with many steps each. A program computes
# 32 or 64 outputs of y, or in_features of dX, and sums over the other dimension in steps of 32, each estimated at
# 0.2 us on an H100. One pass / mixing first, us: y and dX at 768x768 6 / 7; y with 4096 outputs and 1024 in_features
# 8 / 14, with 768 and 3072 22 / 10; dX with 3072 outputs and 768 in_features 22 / 10. In fp32 the product itself
# weighs more, and beyond few rows the library's is faster.
ONE_PASS_ROWS = dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), (16, 16)) | {torch.float64: (-1, -1)}
MANY_OUTPUTS_ROWS = ONE_PASS_ROWS | {torch.bfloat16: (64, -1), torch.float16: (64, -1), torch.float32: (16, -1)}

# Chosen by benchmarks/kernel_report.py: in steps of 64 entries of 16-bit rows some kernels need more than 200 registers
# or spill a dozen, in steps of 32 none does (at most 134; with 5 stages and 32 features one spills). In fp32 each half
# of a step is summed by itself (one_pass_kernel): at 3 rows and 127 in_features the error is 2.5 times that of MKL's
# sum with pieces of 64 entries, 1.4 times with pieces of 32, and 1.1 times with pieces of 16 added up in two sums.
ONE_PASS = {"BLOCK_R": 32, "num_warps": 4, "num_stages": 4}
# Features per program of a one-pass product: the first number where that gives at least WIDE_PROGRAMS programs, about
# one per multiprocessor.
ONE_PASS_FEATURES = (64, 32)
WIDE_PROGRAMS = 128

# Bytes of a tile of one operand: 4 loads of 16 bytes per thread.
TILE_BYTES = 8192
BLOCK_COLUMNS = 1024
# Outputs of a tile of W where an input neuron's weights are neighbours in memory: column-major weights, and (N, K, R)
# with R at least BLOCK_OUTPUTS. A dropped neuron's W is not read there.
BLOCK_OUTPUTS = 256
# Programs of a streaming kernel: 4 on each of an H100's 132 multiprocessors.
PROGRAMS = 528
ELEMENT_BLOCK = 2048
# (BLOCK_N, BLOCK_K) of the dense gradient, for a row-major and for a column-major one.
EXPANDED = (32, 64), (64, 32)
# Columns of dY that a program sums, and over how many tiles: 32 KiB, where a program that mixes moves 24 or more. Parts
# this short keep the error, at 130 to 30000 rows of fp32, at 0.7 to 0.8 of that of PyTorch's sum on a CPU.
SUMMED_COLUMNS, SUMMED_TILES = 64, 4
# Tiles of x per program that gathers, as far as that leaves GATHER_PROGRAMS such programs: 2 per multiprocessor, beside
# those that mix. Compiled for sm_90, a warp draws and scans 1024 columns in 585 instructions and gathers them from one
# tile in 265. So for 4096 rows of 1024 columns in 16 bits an H100 issues the gather's instructions in 3.8 us with one
# tile per program and in 1.8 us with four, where the bytes take 2.8.
GATHERED_TILES, GATHER_PROGRAMS = 4, 256


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device; None: it can."""
    if not INSTALLED:
        return "triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and INTERPRETS):
        return None
    return "it serves CUDA and ROCm devices (and CPUs through Triton's interpreter, under TRITON_INTERPRET=1)"


def one_pass_rows(dtype: torch.dtype, out_features: int) -> tuple[int, int]:
    """The most rows for which y, and those for which dX, is computed in one pass; `ways` has the exceptions."""
    return (ONE_PASS_ROWS if out_features < gpu.MANY_OUTPUTS else MANY_OUTPUTS_ROWS)[dtype]


def ways(dtype: torch.dtype, rows: int, weight: Tensor, target: Tensor | None, mask: str) -> tuple[bool, bool, bool]:
    """(whether W is handled as column-major, whether y is computed in one pass, whether dX is).

    A column-major W is mixed first, and so is W with an element mask where the 4 entries of a Philox call can lie in
    two rows.
    """
    column_major = mask == "input" and is_column_major(weight, target)
    mixed_first = column_major or (mask == "element" and weight.shape[1] % 4 != 0)
    forward, backward = one_pass_rows(dtype, weight.shape[0])
    return column_major, rows <= forward and not mixed_first, rows <= backward and not mixed_first


def mix(weight: Tensor, target: Tensor | None, seed: Tensor, p: float, mask: str, dtype: torch.dtype) -> Tensor:
    return prologue(weight, target, None, None, seed, p, mask, scale(p), False, False, dtype)[0]


def mask_grad(grad: Tensor, seed: Tensor, p: float, mask: str, factor: float, dtype: torch.dtype) -> Tensor:
    return prologue(grad, None, None, None, seed, p, mask, factor, True, False, dtype)[0]


def linear(
    input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, seed: Tensor, p: float, mask: str,
    gathers: bool, static: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    rows = input.reshape(-1, weight.shape[1])
    column_major, one_pass, _ = ways(input.dtype, rows.shape[0], weight, target, mask)
    index = columns = None
    if gathers or not one_pass:
        operands = (None, None) if one_pass else (weight, target)
        x = rows if gathers else None
        mixed, index, columns, _ = prologue(
            *operands, x, None, seed, p, mask, scale(p), False, column_major, input.dtype
        )
    output = product(rows, weight, target, bias, seed, p, mask, False) if one_pass else F.linear(input, mixed, bias)
    return reference.shaped(output, (*input.shape[:-1], weight.shape[0])), index, columns


def gradients(
    grad: Tensor, input: Tensor | None, index: Tensor | None, columns: Tensor | None, weight: Tensor,
    target: Tensor | None, seed: Tensor, p: float, mask: str, factor: float, needs: tuple[bool, bool, bool],
    static: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As reference.gradients. No launch of ours stands between the library's products."""
    needs_input, needs_weight, needs_bias = needs
    out_features, in_features = weight.shape
    rows, draw = grad.reshape(-1, out_features), (seed, p, mask)
    x = input.reshape(-1, in_features) if needs_weight and input is not None else None
    column_major, _, one_pass = ways(grad.dtype, rows.shape[0], weight, target, mask)
    in_full = mask == "element" or gpu.takes_full_product(p, out_features, in_features)
    mixes, gathers = needs_input and not one_pass, x is not None and not in_full
    in_parts = needs_bias and needs_weight and (mixes or gathers)
    dX = dW = db = parts = None
    if mixes or gathers:
        operands = (weight, target) if mixes else (None, None)
        operands += (x if gathers else None, rows if in_parts else None)
        mixed, *gathered, parts = prologue(*operands, *draw, scale(p), False, column_major, grad.dtype)
        index, columns = gathered if gathers else (index, columns)
    if needs_input:
        dX = rows.mm(mixed) if mixes else product(rows, weight, target, None, *draw, True)
        dX = dX.view(*grad.shape[:-1], in_features)
    if x is not None and in_full:
        full = x.t().mm(rows).t() if column_major else rows.t().mm(x)
        dW, _, _, db = prologue(full, None, None, parts, *draw, factor, True, column_major, weight.dtype)
    elif needs_weight:
        dW, db = expanded(columns.t().mm(rows), index, parts, in_features, factor, column_major, weight.dtype)
    if needs_bias and not in_parts:
        db = rows.sum(0)
    return dX, dW, db


def launch(kernel, grid: tuple[int, ...], device: torch.device, *arguments, **options) -> None:
    """Launch on the tensors' `device`, which need not be the current one."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, enable_fp_fusion=False, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, enable_fp_fusion=False, **options)


def launch_and_sum(
    kernel, programs: int, device: torch.device, summed: Tensor | None, sums: Tensor | None, *arguments, **options
) -> None:
    """Launch `programs` programs, and beside them those that sum the columns of `summed` (M, N) into `sums`.

    `sums` is (N,) for sums over all rows, or (P, N) for sums over P parts of the rows.
    """
    rows = columns = parts = part_rows = 0
    if summed is not None:
        rows, columns = summed.shape
        parts, part_rows = (1, rows) if sums.dim() == 1 else (sums.shape[0], _part_rows(summed))
    launch(
        kernel, (programs + parts * _blocks(columns, SUMMED_COLUMNS),), device, *arguments,
        programs, summed, sums, rows, columns, part_rows, *_strides(summed, 2),
        SUM_ROWS=_part_rows(summed) // SUMMED_TILES, SUM_COLUMNS=SUMMED_COLUMNS, **options,
    )  # fmt: skip


def _part_rows(summed: Tensor | None) -> int:
    """Rows per part of a matrix that is summed in parts."""
    size = 4 if summed is None else summed.element_size()
    return SUMMED_TILES * TILE_BYTES // (SUMMED_COLUMNS * size)


def empty_sums(summed: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Memory for the column sums of `summed` (M, N): (N,) in `dtype`, or if that is None (P, N) for P parts of rows."""
    if summed is None:
        return None
    if dtype is not None:
        return summed.new_empty(summed.shape[1], dtype=dtype)
    parts = _blocks(summed.shape[0], _part_rows(summed))
    return summed.new_empty(parts, summed.shape[1], dtype=reference.compute_dtype(summed.dtype))


def traced(fake: Callable, schema: str | None = None) -> Callable:
    """Make a launching function an operator under tracing, into which the compiler does not look.

    Inductor would compile a kernel that it sees with options of its own, fp fusion among them. In eager mode the
    function is called directly: an operator costs more host time than the launch. Without `schema` it is inferred.
    """

    def decorate(function: Callable) -> Callable:
        name = f"mixout_fast::triton_{function.__name__}"
        operator = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments):
            return operator(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        call.operator = operator
        return call

    return decorate


@functools.lru_cache(4096)
def prologue_blocks(
    in_features: int, outputs: int, rows: int, size: int, along_outputs: bool
) -> tuple[dict, int, int, int, int]:
    """The block sizes of the prologue kernel, and how its programs share the work.

    Returns (block sizes, row blocks of W' per program that mixes, number of programs that mix, rows of x per program
    that gathers, number of programs that gather). With 0 `rows` one program still gathers: it writes the index.
    `size`: bytes per entry. The cache saves 1 us of the host's 25 per launch.
    """
    block_x = min(BLOCK_COLUMNS, max(16, _power_of_2(in_features)))
    block_m = max(1, TILE_BYTES // (block_x * size))
    block_n, block_k = (BLOCK_OUTPUTS, TILE_BYTES // (BLOCK_OUTPUTS * size)) if along_outputs else (block_m, block_x)
    column_blocks = _blocks(in_features, block_k)
    weight_rows, row_blocks = _split(outputs, block_n, column_blocks)
    tiles = max(1, min(GATHERED_TILES, _blocks(rows, block_m) // GATHER_PROGRAMS))
    gathered = _split(max(rows, 1), block_m, 1, tiles)
    blocks = {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_M": block_m, "BLOCK_X": block_x}
    return blocks, weight_rows // block_n, row_blocks * column_blocks, *gathered


def _fake_prologue(weight, target, rows, summed, seed, p, mask, factor, is_gradient, column_major, dtype):
    mixed = None
    if weight is not None:
        # Not torch.empty(weight.shape): a torch.Size takes 1 us to read.
        stored = weight.t() if column_major else weight
        mixed = torch.empty_like(stored, dtype=dtype, memory_format=torch.contiguous_format)
        mixed = mixed.t() if column_major else mixed
    index = columns = None
    if rows is not None:
        count = capacity(rows.shape[1], p)
        index = rows.new_empty(count, dtype=torch.int32)
        columns = rows.new_empty(rows.shape[0], count)
    return mixed, index, columns, empty_sums(summed, weight.dtype if is_gradient else None)


@traced(
    _fake_prologue,
    "(Tensor? weight, Tensor? target, Tensor? rows, Tensor? summed, Tensor seed, float p, str mask, float factor, "
    "bool is_gradient, bool column_major, ScalarType dtype) -> (Tensor?, Tensor?, Tensor?, Tensor?)",
)
def prologue(
    weight: Tensor | None, target: Tensor | None, rows: Tensor | None, summed: Tensor | None, seed: Tensor, p: float,
    mask: str, factor: float, is_gradient: bool, column_major: bool, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(W', kept indices, kept columns, column sums) in one launch; None for those whose operand is None.

    From weight (N, K) or (N, K, R): W', or with `is_gradient` m ⊙ weight · factor, in `dtype`, contiguous, or with
    `column_major` a column-major (N, K).
    From rows (M, K): the kept indices (C,) int32, padded with -1, and the kept columns (M, C), padded with 0.
    From summed (M, N): sums over P parts of the rows, (P, N), or with `is_gradient` over all rows, (N,), in the
    weight's dtype.
    """
    mixed, index, columns, sums = _fake_prologue(
        weight, target, rows, summed, seed, p, mask, factor, is_gradient, column_major, dtype
    )
    draw = seed, threshold(p), factor
    if mask == "element":
        if weight.dim() == 3:
            weight, target = (None if t is None else t.contiguous().flatten(1) for t in (weight, target))
        launch_and_sum(
            kernels.element_kernel, _blocks(weight.numel(), ELEMENT_BLOCK), weight.device, summed, sums,
            weight, target, mixed, *draw, weight.numel(), weight.shape[1], *weight.stride(), *_strides(target, 2),
            IS_GRADIENT=is_gradient, COMPUTE=_compute(weight), BLOCK=ELEMENT_BLOCK,
            CONTIGUOUS=weight.is_contiguous() and (target is None or target.is_contiguous()),
        )  # fmt: skip
        return mixed, index, columns, sums
    matrix = rows if weight is None else weight
    in_features = matrix.shape[1]
    bound = capacity(in_features, p)
    outputs = 0 if weight is None else weight.shape[0]
    offsets = weight.shape[2] if weight is not None and weight.dim() == 3 and weight.shape[2] != 1 else None
    row_count = 0 if rows is None else rows.shape[0]
    along_outputs = weight is not None and (column_major or (offsets or 1) >= BLOCK_OUTPUTS)
    blocks, weight_blocks, weight_programs, gathered_rows, gather_programs = prologue_blocks(
        in_features, outputs * (offsets or 1), row_count, matrix.element_size(), along_outputs
    )
    if rows is None:
        gather_programs = 0
    launch_and_sum(
        kernels.prologue_kernel, weight_programs + gather_programs, matrix.device, summed, sums,
        weight, target, mixed, rows, columns, index, *draw, outputs, in_features, offsets, row_count, bound,
        *_strides(weight, 3), *_strides(target, 3), *_strides(mixed, 3), *_strides(rows, 2),
        weight_programs, weight_blocks, gathered_rows,
        IS_GRADIENT=is_gradient, BOUNDED=bound < in_features, KEPT_ALONE=along_outputs, COMPUTE=_compute(matrix),
        **blocks,
    )  # fmt: skip
    return mixed, index, columns, sums


@functools.lru_cache(4096)
def one_pass_config(rows: int, features: int) -> dict:
    """The block sizes and launch options of a one-pass product (rows, features)."""
    block_m = min(64, max(16, _power_of_2(rows)))
    wide, narrow = ONE_PASS_FEATURES
    programs = _blocks(features, wide) * _blocks(rows, block_m)
    return {"BLOCK_M": block_m, "BLOCK_F": wide if programs >= WIDE_PROGRAMS else narrow} | ONE_PASS


def _fake_product(rows, weight, target, bias, seed, p, mask, transposed):
    return rows.new_empty(rows.shape[0], weight.shape[1 if transposed else 0])


@traced(_fake_product)
def product(
    rows: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, seed: Tensor, p: float, mask: str,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """rows W'ᵀ + bias (M, N), or with `transposed` rows W' (M, K), in one pass, in the dtype of `rows`."""
    output = _fake_product(rows, weight, target, bias, seed, p, mask, transposed)
    in_features = weight.shape[1]
    bound = capacity(in_features, p) if mask == "input" else in_features
    row_count, features = output.shape
    config = one_pass_config(row_count, features)
    grid = _blocks(features, config["BLOCK_F"]), _blocks(row_count, config["BLOCK_M"])
    launch(
        kernels.one_pass_kernel, grid, rows.device, rows, weight, target, bias, output, seed, threshold(p), scale(p),
        row_count, *weight.shape, bound, *rows.stride(), *weight.stride(), *_strides(target, 2), *_strides(bias, 1),
        TRANSPOSED=transposed, ELEMENT=mask == "element", BOUNDED=bound < in_features, COMPUTE=_compute(rows),
        PRECISION=_precision(rows.dtype), **config,
    )  # fmt: skip
    return output


def _fake_expanded(compact, index, parts, in_features, factor, column_major, dtype):
    outputs = compact.shape[1]
    dense = compact.new_empty((in_features, outputs) if column_major else (outputs, in_features), dtype=dtype)
    return dense.t() if column_major else dense, empty_sums(parts, compact.dtype)


@traced(
    _fake_expanded,
    "(Tensor compact, Tensor index, Tensor? parts, SymInt in_features, float factor, bool column_major, "
    "ScalarType dtype) -> (Tensor, Tensor?)",
)
def expanded(
    compact: Tensor, index: Tensor, parts: Tensor | None, in_features: int, factor: float, column_major: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The dense gradient (N, K) in `dtype`: compact (C, N), transposed, times factor in the kept columns, 0 elsewhere.

    Also the column sums of parts (P, N), where given: (N,) in compact's dtype.
    """
    dense, sums = _fake_expanded(compact, index, parts, in_features, factor, column_major, dtype)
    count, outputs = compact.shape
    block_n, block_k = EXPANDED[column_major]
    column_blocks = _blocks(in_features, block_k)
    row_count, row_blocks = _split(outputs, block_n, column_blocks)
    launch_and_sum(
        kernels.expand_kernel, column_blocks * row_blocks, compact.device, parts, sums,
        compact, index, dense, factor, outputs, in_features, count, *compact.stride(), *dense.stride(), row_count,
        STEPS=in_features.bit_length(), COMPUTE=_compute(compact), BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return dense, sums


def _blocks(count: int, size: int) -> int:
    """count / size, rounded up. Triton's cdiv costs 3.5 us on the host, this 0.15, and a launch needs several."""
    return -(-count // size)


def _power_of_2(count: int) -> int:
    """The next power of two, count itself included."""
    return 1 << max(count - 1, 0).bit_length()


def _split(rows: int, block: int, column_blocks: int, least: int = 1) -> tuple[int, int]:
    """(rows per program, number of parts of `rows`) for about PROGRAMS programs of `least` blocks or more."""
    taken = block * max(least, _blocks(rows, block) * column_blocks // PROGRAMS)
    return taken, _blocks(rows, taken)


def _precision(dtype: torch.dtype) -> str:
    """TF32 for fp32 products where torch's own use it."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _compute(tensor: Tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The tensor's strides, followed by zeros up to `count` of them."""
    strides = () if tensor is None else tensor.stride()
    return strides + (0,) * (count - len(strides))
