"""What the C++ operators of csrc/cpu and csrc/cuda have in common as Python sees them."""

import torch
from torch import Tensor

LIBRARIES: list[torch.library.Library] = []
"""What they register lives as long as they do."""


def register(namespace: str) -> None:
    """For tracing, the results of the operators whose shapes are the same on every device; and nothing to do for any of
    them under autograd's key: autograd functions call them, and its fallback takes 6 us from cold caches."""
    library = torch.library.Library(namespace, "IMPL")
    for name in ("mix", "mask_grad", "linear", "linear_backward"):
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    LIBRARIES.append(library)
    fake = torch.library.register_fake

    @fake(f"{namespace}::mix")
    def _(weight, target, seed, p, per_column, dtype):
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)

    @fake(f"{namespace}::mask_grad")
    def _(grad, seed, p, per_column, factor, dtype):
        return torch.empty(grad.shape, dtype=dtype, device=grad.device)

    @fake(f"{namespace}::linear_backward")
    def _(grad, input, index, columns, weight, target, seed, needs_input, needs_weight, needs_bias, *options):
        out_features, in_features = weight.shape
        return (
            grad.new_empty(*grad.shape[:-1], in_features) if needs_input else None,
            weight.new_empty(out_features, in_features) if needs_weight else None,
            grad.new_empty(out_features) if needs_bias else None,
        )


def fake_gathered(input: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """For tracing, the kept indices and columns beside y."""
    rows = input.numel() // input.shape[-1]
    return torch.empty(width, dtype=torch.int32, device=input.device), input.new_empty(rows, width)
