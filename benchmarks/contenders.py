"""The layers under comparison, each set up on the same x, dy, W, U, b and p.

A contender is a function Case -> nn.Module; x and dy are the case's. Every layer holds its own copy of the weight (and
target), as layers of a network do, so none finds its weight in the cache because another has just read it.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixout_fast import MixLinear
from mixout_fast.testing import Case, random_case


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


def problem(shape: Shape, p: float, dtype: torch.dtype) -> Case:
    """Normal x, dy, U and b, and W a finetuning's distance from U. x requires grad, as inside a network."""
    case = random_case(*astuple(shape), p=p, dtype=dtype)
    case.input.requires_grad_()
    return case


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


def linear_of(case: Case, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    layer = kind(case.weight.shape[1], case.weight.shape[0], device="meta")
    layer.weight = nn.Parameter(case.weight.clone())
    layer.bias = nn.Parameter(case.bias.clone())
    return layer


def linear(case: Case) -> nn.Module:
    return linear_of(case)


def dropout(case: Case) -> nn.Module:
    return nn.Sequential(nn.Dropout(case.p), linear_of(case))


def published(case: Case) -> nn.Module:
    layer = linear_of(case, PublishedMixLinear)
    layer.register_buffer("target", case.target.clone())
    layer.p = case.p
    return layer


def compiled(case: Case) -> nn.Module:
    layer = linear_of(case, CompiledMixLinear)
    layer.register_buffer("target", case.target.clone())
    layer.register_buffer("p", torch.tensor(case.p, dtype=case.weight.dtype))
    return layer


def ours(case: Case) -> nn.Module:
    return MixLinear.from_linear(linear_of(case), case.p, case.target.clone())


CONTENDERS = {
    "ours": ours,
    "linear": linear,
    "dropout": dropout,
    "published": published,
    "compiled": compiled,
}


def why_not_compiled() -> str | None:
    """Why torch.compile cannot run here, in one line; None: it can."""
    tiny = problem(Shape(4, 4, 4), 0.5, torch.float32)
    try:
        compiled(tiny)(tiny.input).backward(tiny.grad_output)
    except Exception as error:  # Inductor reports a missing or broken C++ compiler through several exception types.
        return str(error).strip().splitlines()[0] or type(error).__name__
    return None
