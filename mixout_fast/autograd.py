"""The autograd functions.

With W' = U + m ⊙ (W - U) · s, s = 1/(1-p), and y = x W'ᵀ + b, for a gradient dY of y:

    dX = dY W'          db = Σ_rows dY          dW' = dYᵀ X          dW = m ⊙ dW' · s          dU is not computed

With an input mask m, dW is zero outside the kept columns, so only X[:, kept] enters:

    dW[:, kept] = (X[:, kept]ᵀ dY)ᵀ · s

which is 1-p of the full product, and X[:, kept] is all of x that backward has to hold. W' is mixed again in backward
from W, U and the seed rather than saved. `factor` below is s for grad_scale="exact" and 1 for "paper".
"""

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from mixout_fast import reference


def keeps_compact_copy(in_features: int, p: float) -> bool:
    """Whether forward saves X[:, kept] (a copy) rather than x (a reference).

    A reference is free wherever x is alive for another reason and shared by siblings that read the same x; a copy of
    at most half of x is smaller even when two siblings hold one each. Time is the same: the gather only moves.
    """
    return 2 * reference.capacity(in_features, p) <= in_features


class Mix(torch.autograd.Function):
    """(weight, target) -> W'. Twice differentiable: its backward is linear and made of MaskGrad."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight, target, seed, p, mask, factor, backend):
        ctx.save_for_backward(seed)
        ctx.arguments = p, mask, factor, backend
        return backend.mix(weight, target, seed, p, mask, weight.dtype)

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


class MixLinear(torch.autograd.Function):
    """(input (…, K), weight (N, K), target, bias) -> x W'ᵀ + b, in the input's dtype."""

    @staticmethod
    def forward(ctx, input, weight, target, bias, seed, p, mask, factor, backend):
        dtype, in_features = input.dtype, weight.shape[1]
        rows = input.reshape(-1, in_features)
        fused = hasattr(backend, "fused_linear") and backend.prefers_fused(rows, weight)
        compact = mask == "input" and ctx.needs_input_grad[1]
        copies = compact and keeps_compact_copy(in_features, p)
        static = torch.compiler.is_compiling()

        index = columns = mixed = None
        if fused:
            if copies:
                index, columns = backend.gather(rows, seed, p, static)
            output = backend.fused_linear(rows, weight, target, bias, seed, p, mask)
            output = output.view(*input.shape[:-1], weight.shape[0])
        else:
            if copies:
                mixed, index, columns = backend.mix_gather(rows, weight, target, seed, p, dtype, static)
            else:
                mixed = backend.mix(weight, target, seed, p, mask, dtype)
            output = torch.nn.functional.linear(input, mixed, bias)

        kept_input = input if ctx.needs_input_grad[1] and not copies else None
        ctx.save_for_backward(weight, target, seed, index, columns, kept_input)
        ctx.arguments = p, mask, factor, backend, fused, compact, static
        ctx.input_shape = input.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        weight, target, seed, index, columns, input = ctx.saved_tensors
        p, mask, factor, backend, fused, compact, static = ctx.arguments
        grad = grad_output.reshape(-1, weight.shape[0])
        grad_input = grad_weight = grad_bias = None

        if ctx.needs_input_grad[0]:
            if fused:
                grad_input = backend.fused_grad_input(grad, weight, target, seed, p, mask)
            else:
                grad_input = grad.mm(backend.mix(weight, target, seed, p, mask, grad.dtype))
            grad_input = grad_input.view(ctx.input_shape)
        if ctx.needs_input_grad[1]:
            if columns is None:
                rows = input.reshape(-1, weight.shape[1])
                if compact:
                    index, columns = backend.gather(rows, seed, p, static)
            if compact:
                # (C, N) and not (N, C): MKL runs this form at the dense product's rate, the other at half of it for
                # C = 77 (2048x768x768, p = 0.9: 0.12 of the dense product's time against 0.21).
                grad_weight = backend.expand(columns.t().mm(grad), index, weight.shape[1], factor, weight.dtype)
            else:
                grad_weight = backend.mask_grad(grad.t().mm(rows), seed, p, mask, factor, weight.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(0)
        return grad_input, grad_weight, None, grad_bias, None, None, None, None, None
