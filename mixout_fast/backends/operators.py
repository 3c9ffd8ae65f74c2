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

    @fake(f"{namespace}::grad_input")
    def _(grad, weight, *options):
        return grad.new_empty(grad.shape[0], weight.shape[1])

    @fake(f"{namespace}::grad_weight")
    def _(columns, grad, index, in_features, factor, dtype):
        return torch.empty(grad.shape[1], in_features, dtype=dtype, device=grad.device)
