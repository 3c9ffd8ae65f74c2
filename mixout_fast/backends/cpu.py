"""The C++ backend for CPU tensors: mixout_fast::* operators of csrc/, on LibTorch's stable ABI."""

from pathlib import Path

import torch
from torch import Tensor

from mixout_fast.reference import capacity, scale, threshold


def _load_error() -> str | None:
    libraries = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if not libraries:
        return "its C++ library was not built (no compiler at installation?)"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"its C++ library does not load: {error}"
    _register_fakes()
    return None


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device; None: it can."""
    return "it serves CPU tensors only" if device_type != "cpu" else LOAD_ERROR


def instruction_set() -> str:
    """The instruction set that the kernels run with: avx512, avx2 or baseline."""
    return torch.ops.mixout_fast.cpu_instruction_set()


def mix(weight: Tensor, target: Tensor | None, seed: Tensor, p: float, mask: str, dtype: torch.dtype) -> Tensor:
    if weight.dim() == 3:
        weight, target = weight.contiguous(), None if target is None else target.contiguous()
    return torch.ops.mixout_fast.mix(weight, target, seed, threshold(p), scale(p), _capacity(weight, p, mask), dtype)


def mask_grad(grad: Tensor, seed: Tensor, p: float, mask: str, factor: float, dtype: torch.dtype) -> Tensor:
    grad = grad.contiguous() if grad.dim() == 3 else grad
    return torch.ops.mixout_fast.mask_grad(grad, seed, threshold(p), _capacity(grad, p, mask), factor, dtype)


def gather(input: Tensor, seed: Tensor, p: float, static: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.mixout_fast.gather(input, seed, threshold(p), capacity(input.shape[1], p), static)


def mix_gather(
    input: Tensor, weight: Tensor, target: Tensor | None, seed: Tensor, p: float, dtype: torch.dtype, static: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.mixout_fast.mix_gather(
        input, weight, target, seed, threshold(p), scale(p), capacity(input.shape[1], p), static
    )


def expand(compact: Tensor, index: Tensor, in_features: int, factor: float, dtype: torch.dtype) -> Tensor:
    return torch.ops.mixout_fast.expand(compact, index, in_features, factor, dtype)


def prefers_fused(rows: Tensor, weight: Tensor) -> bool:
    """Whether the one-pass product beats mixing and then multiplying with the library."""
    return rows.shape[0] <= 128


def fused_linear(
    input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, seed: Tensor, p: float, mask: str
) -> Tensor:
    """y = x W'ᵀ + b for input (M, K), reading weight and target once and writing no W'."""
    return torch.ops.mixout_fast.fused_linear(
        input, weight, target, bias, seed, threshold(p), scale(p), _capacity(weight, p, mask)
    )


def fused_grad_input(
    grad: Tensor, weight: Tensor, target: Tensor | None, seed: Tensor, p: float, mask: str
) -> Tensor:
    """dx = dy W' for grad (M, N), reading weight and target once and writing no W'."""
    return torch.ops.mixout_fast.fused_grad_input(
        grad, weight, target, seed, threshold(p), scale(p), _capacity(weight, p, mask)
    )


def _capacity(weight: Tensor, p: float, mask: str) -> int | None:
    return capacity(weight.shape[1], p) if mask == "input" else None


def _register_fakes() -> None:
    fake = torch.library.register_fake

    @fake("mixout_fast::mix")
    def _(weight, target, seed, threshold, scale, capacity, dtype):
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)

    @fake("mixout_fast::mask_grad")
    def _(grad, seed, threshold, capacity, factor, dtype):
        return torch.empty(grad.shape, dtype=dtype, device=grad.device)

    @fake("mixout_fast::gather")
    def gather(input, seed, threshold, capacity, fixed_size):
        width = capacity if fixed_size else torch.library.get_ctx().new_dynamic_size()
        index = torch.empty(width, dtype=torch.int32, device=input.device)
        return index, input.new_empty(input.shape[0], width)

    @fake("mixout_fast::mix_gather")
    def _(input, weight, target, seed, threshold, scale, capacity, fixed_size):
        mixed = torch.empty(weight.shape, dtype=input.dtype, device=weight.device)
        return mixed, *gather(input, seed, threshold, capacity, fixed_size)

    @fake("mixout_fast::expand")
    def _(compact, index, in_features, factor, dtype):
        return torch.empty(compact.shape[1], in_features, dtype=dtype, device=compact.device)

    @fake("mixout_fast::fused_linear")
    def _(input, weight, target, bias, seed, threshold, scale, capacity):
        return input.new_empty(input.shape[0], weight.shape[0])

    @fake("mixout_fast::fused_grad_input")
    def _(grad, weight, target, seed, threshold, scale, capacity):
        return grad.new_empty(grad.shape[0], weight.shape[1])


# At import and not at first use: torch.compile traces `unavailable`, and cannot trace a search of the file system.
LOAD_ERROR = _load_error()
