"""The C++ operators of csrc/cpu and csrc/cuda as Python sees them: alike on both devices, in a namespace for each."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mixout_fast.reference import capacity, is_column_major

PACKAGE = Path(__file__).parent.parent

REGISTRATIONS: list[torch.library.Library] = []
"""Kept alive, for registrations end with their Library."""


class Functions:
    """A backend's functions, which call the operators in a namespace of torch.ops.

    `ways(dtype, weight's shape, p, mask)` chooses how they compute: the most rows for which y is computed in one pass,
    the most for which dX is, whether fp32 products may round to TF32, and whether dW from a saved x is one full
    product.
    """

    def __init__(self, namespace: str, ways: Callable[..., tuple[int, int, bool, bool]]) -> None:
        self.operators = getattr(torch.ops, namespace)
        self.ways = ways

    def mix(
        self, weight: Tensor, target: Tensor | None, seed: Tensor, p: float, mask: str, dtype: torch.dtype
    ) -> Tensor:
        if weight.dim() == 3:
            weight, target = weight.contiguous(), None if target is None else target.contiguous()
        return self.operators.mix.default(weight, target, seed, p, mask == "input", dtype)

    def mask_grad(self, grad: Tensor, seed: Tensor, p: float, mask: str, factor: float, dtype: torch.dtype) -> Tensor:
        grad = grad.contiguous() if grad.dim() == 3 else grad
        return self.operators.mask_grad.default(grad, seed, p, mask == "input", factor, dtype)

    def linear(
        self, input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, seed: Tensor, p: float,
        mask: str, gathers: bool, static: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        shape = weight.shape
        one_pass_rows, _, tf32, _ = self.ways(input.dtype, shape, p, mask)
        one_pass = input.numel() // shape[1] <= one_pass_rows
        bias = None if bias is None else bias.contiguous()
        return self.operators.linear.default(
            input, weight, target, bias, seed, p, mask == "input", one_pass, tf32, gathers, static
        )

    def gradients(
        self, grad: Tensor, input: Tensor | None, index: Tensor | None, columns: Tensor | None, weight: Tensor,
        target: Tensor | None, seed: Tensor, p: float, mask: str, factor: float, needs: tuple[bool, bool, bool],
        static: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        shape = weight.shape
        _, one_pass_rows, tf32, in_full = self.ways(grad.dtype, shape, p, mask)
        one_pass = grad.numel() // shape[0] <= one_pass_rows
        return self.operators.linear_backward.default(
            grad, input, index, columns, weight, target, seed, *needs,
            p, mask == "input", factor, one_pass, tf32, in_full,
        )  # fmt: skip

    def checked_mix_linear(
        self, input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, seed: Tensor | None, p: float,
        mask: str, factor: float, gathers: bool, autocast: torch.dtype | None,
    ) -> Tensor | None:  # fmt: skip
        """functional.mix_linear in C++ (csrc/autograd): the checks of the operands and what follows them.

        None where the operands are not the usual ones. The operator exists where AUTOGRAD_ERROR is None.
        """
        ways = self.ways(autocast or weight.dtype, weight.shape, p, mask)
        return self.operators.checked_mix_linear.default(
            input, weight, target, bias, seed, autocast, p, mask == "input", factor, gathers, *ways
        )


def load(library: Path, likely_cause: str) -> str | None:
    """Load a library of operators; None, or why it does not load. `likely_cause` is that of a missing library."""
    if not library.exists():
        return f"{library} was not built ({likely_cause})"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


def _load_autograd() -> str | None:
    version = re.sub(r"\W", "_", torch.__version__)  # as in setup.py
    return load(PACKAGE / f"_autograd_{version}.so", "another torch at installation?")


AUTOGRAD_ERROR = _load_autograd()
"""Why eager calls have no autograd function in C++ (csrc/autograd); None: they have."""


def register(namespace: str, on_gpu: bool) -> None:
    """Register fakes for tracing, flop counts for FlopCounterMode, and a fallthrough under the Autograd key.

    Autograd functions call the operators, so these need no autograd, and torch's own fallback takes 6 us from cold
    caches. On GPUs a gather always has the capacity as its width.
    """
    library = torch.library.Library(namespace, "IMPL")
    for name in ("mix", "mask_grad", "linear", "linear_backward"):
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    REGISTRATIONS.append(library)
    fake = torch.library.register_fake

    @fake(f"{namespace}::mix")
    def _(weight, target, seed, p, per_column, dtype):
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)

    @fake(f"{namespace}::mask_grad")
    def _(grad, seed, p, per_column, factor, dtype):
        return torch.empty(grad.shape, dtype=dtype, device=grad.device)

    @fake(f"{namespace}::linear")
    def _(input, weight, target, bias, seed, p, per_column, one_pass, tf32, gathers, fixed_size):
        output = input.new_empty(*input.shape[:-1], weight.shape[0])
        if not gathers:
            return output, None, None
        in_features = weight.shape[1]
        width = capacity(in_features, p) if fixed_size or on_gpu else torch.library.get_ctx().new_dynamic_size()
        index = torch.empty(width, dtype=torch.int32, device=input.device)
        return output, index, input.new_empty(input.numel() // in_features, width)

    @fake(f"{namespace}::linear_backward")
    def _(grad, input, index, columns, weight, target, seed, needs_input, needs_weight, needs_bias, p, *options):
        out_features, in_features = weight.shape
        column_major = options[0] and is_column_major(weight, target)
        shape = (in_features, out_features) if column_major else (out_features, in_features)
        grad_weight = weight.new_empty(shape) if needs_weight else None
        return (
            grad.new_empty(*grad.shape[:-1], in_features) if needs_input else None,
            grad_weight.t() if needs_weight and column_major else grad_weight,
            grad.new_empty(out_features) if needs_bias else None,
        )

    operators = getattr(torch.ops, namespace)

    @register_flop_formula(operators.linear)
    def _(input, weight, *_, **__):
        return 2 * math.prod(input) * weight[0]

    @register_flop_formula(operators.linear_backward)
    def _(grad, input, index, columns, weight, target, seed, needs_input, needs_weight, needs_bias, p, *options, **__):
        in_features, full_product = weight[1], options[-1]
        if columns is not None:
            width = columns[1]
        else:  # on a CPU only the mask tells how many are kept: take the mean
            width = in_features if full_product else capacity(in_features, p) if on_gpu else (1 - p) * in_features
        return 2 * math.prod(grad) * round(needs_input * in_features + needs_weight * width)
