"""The layers under comparison, each set up on the same x, dy, W, U and b.

A contender is a function (Operands, p) -> nn.Module. Every one holds its own copy of the weight (and target), as layers
of a network do, so none finds its weight in the cache because another has just read it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mixout_fast


@dataclass(frozen=True)
class Shape:
    rows: int
    in_features: int
    out_features: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.rows}x{self.in_features}x{self.out_features}"


@dataclass(frozen=True)
class Operands:
    """x (rows, K), dy (rows, N), weight and target (N, K), bias (N,). x requires grad, as inside a network."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, seed: int = 0) -> "Operands":
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(dtype)

        target = normal(shape.out_features, shape.in_features, scale=shape.in_features**-0.5)
        return cls(
            x=normal(shape.rows, shape.in_features).requires_grad_(),
            dy=normal(shape.rows, shape.out_features),
            weight=target + normal(*target.shape, scale=0.01),
            target=target,
            bias=normal(shape.out_features),
        )


class PublishedMixout(torch.autograd.Function):
    """(weight, target) -> W', as the code published with the paper computes it.

    One Bernoulli draw per input neuron is repeated into a full-size mask, every term of the expression is a full-size
    tensor, and backward multiplies by the mask without 1/(1-p). That code keeps the mask as an attribute of ctx; it is
    saved here, at no cost in time, so that the count of saved bytes sees it.
    """

    @staticmethod
    def forward(ctx, weight, target, p):
        mixed = weight.clone()
        draws = torch.empty_like(weight[0]).bernoulli_(1 - p)
        mask = draws.repeat(weight.shape[0], 1)
        ctx.save_for_backward(mask)
        return ((1 - mask) * target + mask * mixed - p * target) / (1 - p)

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return grad * mask, None, None


class PublishedMixLinear(nn.Linear):
    target: Tensor
    p: float

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, PublishedMixout.apply(self.weight, self.target, self.p), self.bias)


def three_line_mixout(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor, p: Tensor) -> Tensor:
    """What one would write for torch.compile to fuse. p is a tensor, so that one compilation serves every p."""
    mask = (torch.rand(weight.shape[1]) >= p).to(weight.dtype)
    mixed = target + mask * (weight - target) / (1 - p)
    return F.linear(x, mixed, bias)


compiled_mixout = torch.compile(three_line_mixout, dynamic=False)


class CompiledMixLinear(nn.Linear):
    target: Tensor
    p: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return compiled_mixout(input, self.weight, self.target, self.bias, self.p)


def linear_of(operands: Operands, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    layer = kind(operands.weight.shape[1], operands.weight.shape[0], device="meta")
    layer.weight = nn.Parameter(operands.weight.clone())
    layer.bias = nn.Parameter(operands.bias.clone())
    return layer


def linear(operands: Operands, p: float) -> nn.Module:
    return linear_of(operands)


def dropout(operands: Operands, p: float) -> nn.Module:
    return nn.Sequential(nn.Dropout(p), linear_of(operands))


def published(operands: Operands, p: float) -> nn.Module:
    layer = linear_of(operands, PublishedMixLinear)
    layer.register_buffer("target", operands.target.clone())
    layer.p = p
    return layer


def compiled(operands: Operands, p: float) -> nn.Module:
    layer = linear_of(operands, CompiledMixLinear)
    layer.register_buffer("target", operands.target.clone())
    layer.register_buffer("p", torch.tensor(p, dtype=operands.weight.dtype))
    return layer


def ours(operands: Operands, p: float) -> nn.Module:
    return mixout_fast.MixLinear.from_linear(linear_of(operands), p, operands.target.clone())


CONTENDERS = {
    "ours": ours,
    "linear": linear,
    "dropout": dropout,
    "published": published,
    "compiled": compiled,
}


def why_not_compiled() -> str | None:
    """Why torch.compile cannot run here, in one line; None: it can."""
    tiny = Operands.random(Shape(4, 4, 4), torch.float32)
    try:
        compiled(tiny, 0.5)(tiny.x).backward(tiny.dy)
    except Exception as error:  # Inductor reports a missing or broken C++ compiler through several exception types.
        return str(error).strip().splitlines()[0] or type(error).__name__
    return None
