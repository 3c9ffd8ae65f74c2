"""What the C++ operators of csrc/cpu and csrc/cuda have in common as Python sees them."""

import torch
from torch import Tensor

LIBRARIES: list[torch.library.Library] = []
"""What they register lives as long as they do."""


def register(namespace: str, takes_columns: bool) -> None:
    """For tracing, the results of the operators whose shapes are the same on every device; and nothing to do for any of
    them under autograd's key: autograd functions call them, and its fallback takes 6 us from cold caches.

    `takes_columns`: of a weight that lies by columns, the gradient does too."""
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
    def _(grad, input, index, columns, weight, target, seed, needs_input, needs_weight, needs_bias, p, *options):
        out_features, in_features = weight.shape
        by_columns = takes_columns and options[0] and all(map(_lies_by_columns, (weight, target)))
        shape = (in_features, out_features) if by_columns else (out_features, in_features)
        grad_weight = weight.new_empty(shape) if needs_weight else None
        return (
            grad.new_empty(*grad.shape[:-1], in_features) if needs_input else None,
            grad_weight.t() if needs_weight and by_columns else grad_weight,
            grad.new_empty(out_features) if needs_bias else None,
        )


def _lies_by_columns(matrix: Tensor | None) -> bool:
    return matrix is None or (matrix.stride(0) == 1 and matrix.stride(1) != 1)


def fake_gathered(input: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """For tracing, the kept indices and columns beside y."""
    rows = input.numel() // input.shape[-1]
    return torch.empty(width, dtype=torch.int32, device=input.device), input.new_empty(rows, width)
