"""What the C++ operators of csrc/cpu and csrc/cuda have in common as Python sees them."""

import torch
from torch import Tensor

from mixout_fast import reference


def capacity(weight: Tensor, p: float, mask: str) -> int | None:
    """The operators' argument: the most columns that an input mask keeps, None for an element mask."""
    return reference.capacity(weight.shape[1], p) if mask == "input" else None


def register_fakes(namespace: str) -> None:
    """For tracing, the results of the operators whose shapes are the same on every device."""
    fake = torch.library.register_fake

    @fake(f"{namespace}::mix")
    def _(weight, target, seed, threshold, scale, capacity, dtype):
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)

    @fake(f"{namespace}::mask_grad")
    def _(grad, seed, threshold, capacity, factor, dtype):
        return torch.empty(grad.shape, dtype=dtype, device=grad.device)

    @fake(f"{namespace}::linear_backward")
    def _(grad, input, index, columns, weight, target, seed, needs_input, needs_weight, needs_bias, *options):
        out_features, in_features = weight.shape
        return (
            grad.new_empty(*grad.shape[:-1], in_features) if needs_input else None,
            weight.new_empty(out_features, in_features) if needs_weight else None,
            grad.new_empty(out_features) if needs_bias else None,
        )


def fake_gathered(input: Tensor, gathers: bool, width: int) -> tuple[Tensor, Tensor]:
    """For tracing, the kept indices and columns beside y."""
    rows = input.numel() // input.shape[-1] if gathers else 0
    return torch.empty(width, dtype=torch.int32, device=input.device), input.new_empty(rows, width)
