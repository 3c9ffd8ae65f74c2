"""The autograd functions.

With W' = U + m ⊙ (W - U) · s, s = 1/(1-p), and y = x W'ᵀ + b, for a gradient dY of y:

    dX = dY W'          db = Σ_rows dY          dW' = dYᵀ X          dW = m ⊙ dW' · s          dU is not computed

With an input mask m, dW is zero outside the kept columns, so only X[:, kept] enters:

    dW[:, kept] = (X[:, kept]ᵀ dY)ᵀ · s

which is 1-p of the full product, and X[:, kept] is all that backward needs of x. W' is not saved: backward mixes it
again from W, U and the seed. `factor` below is s for grad_scale="exact" and 1 for "paper".
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from mixout_fast import reference
from mixout_fast.backends import operators

DIFFERENTIATES_ONCE = (
    "mix_linear differentiates once, and its gradients are to be differentiated (create_graph=True): "
    "compute F.linear(input, mixout(weight, ...), bias), which differentiates twice"
)


def keeps_compact_copy(weight: Tensor, p: float, mask: str) -> bool:
    """Whether forward saves X[:, kept] (a copy) for dW, rather than x (a reference).

    A reference costs nothing where x is alive for another reason, and siblings that read the same x share it; a copy of
    at most half of x is smaller even when two siblings hold one each. The time is the same: the gather moves from
    backward to forward. With few outputs (reference.THIN_OUTPUT) dW is computed from all of x.
    """
    out_features, in_features = weight.shape
    if mask != "input" or out_features < reference.THIN_OUTPUT:
        return False
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    # At p <= 0.5 the capacity is more than half of x; computing it takes 14 us from cold caches.
    return p > 0.5 and 2 * reference.capacity(in_features, p) <= in_features


def widened(target: Tensor | None, weight: Tensor) -> Tensor | None:
    """The target in the weight's dtype. For backward it is saved as held, perhaps in a smaller dtype."""
    return target if target is None or target.dtype == weight.dtype else target.to(weight.dtype)


class Mix(torch.autograd.Function):
    """(weight, target) -> W'. Twice differentiable: its backward is MaskGrad, which is linear."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight, target, seed, p, mask, factor, backend):
        ctx.save_for_backward(seed)
        ctx.arguments = p, mask, factor, backend
        return backend.mix(weight, widened(target, weight), seed, p, mask, weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        return MaskGrad.apply(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None, None, None, None


class MaskGrad(torch.autograd.Function):
    """grad -> m ⊙ grad · factor: linear, so its backward is itself."""

    @staticmethod
    def forward(ctx, grad, seed, p, mask, factor, backend):
        ctx.save_for_backward(seed)
        ctx.arguments = p, mask, factor, backend
        return backend.mask_grad(grad, seed, p, mask, factor, grad.dtype)

    @staticmethod
    def backward(ctx, grad):
        return MaskGrad.apply(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None, None, None


def is_in_cpp(backend: ModuleType) -> bool:
    """Whether eager calls of the backend's layer go through csrc/autograd."""
    return operators.AUTOGRAD_ERROR is None and hasattr(backend, "checked_mix_linear")


def mix_linear(
    input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, seed: Tensor, p: float, mask: str,
    factor: float, backend: ModuleType,
) -> Tensor:  # fmt: skip
    """(input (…, K), weight (N, K), target, bias) -> x W'ᵀ + b, in the input's dtype. Once differentiable."""
    gathers = keeps_compact_copy(weight, p, mask)
    return MixLinear.apply(input, weight, target, bias, seed, p, mask, factor, gathers, backend)


class MixLinear(torch.autograd.Function):
    """`mix_linear` of any backend, traced or where csrc/autograd does not serve."""

    @staticmethod
    def forward(ctx, input, weight, target, bias, seed, p, mask, factor, gathers, backend):
        static = torch.compiler.is_compiling() or input.is_meta
        wide = widened(target, weight)
        output, index, columns = backend.linear(input, weight, wide, bias, seed, p, mask, gathers, static)
        kept_input = input if ctx.needs_input_grad[1] and not gathers else None
        ctx.save_for_backward(weight, target, seed, index, columns, kept_input)
        ctx.arguments = p, mask, factor, backend, static
        return output

    @staticmethod
    def backward(ctx, grad_output):
        # Not by torch's once_differentiable: it raises only when the gradients are differentiated, and its node has no
        # path to the operands, so torch.autograd.grad skips it and silently returns zeros.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(DIFFERENTIATES_ONCE)
        weight, target, seed, index, columns, input = ctx.saved_tensors
        p, mask, factor, backend, static = ctx.arguments
        needs_input, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        wide = widened(target, weight) if needs_input else None  # dW and db do not need it
        grad_input, grad_weight, grad_bias = backend.gradients(
            grad_output, input, index, columns, weight, wide, seed, p, mask, factor,
            (needs_input, needs_weight, needs_bias), static,
        )  # fmt: skip
        return grad_input, grad_weight, None, grad_bias, None, None, None, None, None, None
