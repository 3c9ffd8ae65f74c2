"""The layers under comparison, each set up on the same x, dy, W, U, b and p.

A contender is a function Case -> nn.Module; x and dy are the case's. Every layer holds its own copy of the weight (and
target), as layers of a network do, so that no layer finds its weight in the cache because another has just read it.
"""

import functools
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixout_fast import MixLinear, backends
from mixout_fast.testing import Case, column_major, random_case


@dataclass(frozen=True)
class Shape:
    """Written RxKxN, followed by a t if the weight is column-major, as in GPT-2's Conv1D."""

    rows: int
    in_features: int
    out_features: int
    column_major: bool = False

    @classmethod
    def parse(cls, text: str) -> "Shape":
        return cls(*map(int, text.removesuffix("t").split("x")), column_major=text.endswith("t"))

    def __str__(self) -> str:
        return f"{self.rows}x{self.in_features}x{self.out_features}{'t' if self.column_major else ''}"


@functools.lru_cache(maxsize=1)
def _tensors(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    case = random_case(*astuple(shape)[:3], p=0.5, dtype=dtype, device=device)
    case.input.requires_grad_()
    return column_major(case) if shape.column_major else case


def problem(shape: Shape, p: float, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Normal x, dy, U and b, and a W as far from U as finetuning moves it. x requires grad, as inside a network.

    Calls in a row that differ only in p share the tensors: at large sizes making them takes longer than the timing.
    """
    return replace(_tensors(shape, dtype, device), p=p)


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
        # In the weight's layout, as that code, which knows row-major ones alone, has it.
        rows = weight.shape[0]
        mask = draws.repeat(rows, 1) if weight.stride(1) == 1 else draws.unsqueeze(1).repeat(1, rows).t()
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
    mask = (torch.rand(weight.shape[1], device=weight.device) >= p).to(weight.dtype)
    mixed = target + mask * (weight - target) / (1 - p)
    return F.linear(x, mixed, bias)


def dropout_and_linear(x: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
    return F.linear(F.dropout(x, p), weight, bias)


# After 8 compilations of a function torch.compile would run it uncompiled; fullgraph makes that an error. Code that
# times many shapes or p calls torch.compiler.reset() in between.
compiled_mixout = torch.compile(three_line_mixout, fullgraph=True, dynamic=False)
compiled_dropout_and_linear = torch.compile(dropout_and_linear, fullgraph=True, dynamic=False)


class CompiledMixLinear(nn.Linear):
    target: Tensor
    p: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return compiled_mixout(input, self.weight, self.target, self.bias, self.p)


class CompiledDropoutLinear(nn.Linear):
    p: float

    def forward(self, input: Tensor) -> Tensor:
        return compiled_dropout_and_linear(input, self.weight, self.bias, self.p)


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
    layer.register_buffer("p", torch.tensor(case.p, dtype=case.weight.dtype, device=case.weight.device))
    return layer


def compiled_dropout(case: Case) -> nn.Module:
    layer = linear_of(case, CompiledDropoutLinear)
    layer.p = case.p
    return layer


def ours(case: Case, **options) -> nn.Module:
    return MixLinear.from_linear(linear_of(case), case.p, case.target.clone(), **options)


CONTENDERS = {
    "ours": ours,
    "linear": linear,
    "dropout": dropout,
    "published": published,
    "compiled": compiled,
    "compiled-dropout": compiled_dropout,
}
"""Name -> function that makes the layer; `variants` has further forms of ours."""

TITLES = {
    "ours": "ours",
    "linear": "nn.Linear",
    "dropout": "Dropout+Linear",
    "published": "published mixout",
    "compiled": "compiled mixout",
    "compiled-dropout": "compiled Dropout+Linear",
}


def variants(device_type: str) -> dict[str, dict]:
    """The forms of our layer on a device: contender's name -> MixLinear's options."""
    named = {f"ours-{name}": {"backend": name} for name in _served(device_type)}
    return {"ours-element": {"mask": "element"}, **named}


def other_backends(device_type: str) -> list[str]:
    """`ours-BACKEND` for each compiled backend that serves the device without being its default."""
    chosen = {name for name, module in backends.BACKENDS.items() if module is backends.select(None, device_type)}
    return [f"ours-{name}" for name in _served(device_type) if name not in {"reference", *chosen}]


def _served(device_type: str) -> list[str]:
    return [name for name, reason in backends.describe(device_type).items() if reason is None]


def contenders(device_type: str) -> dict[str, Callable[[Case], nn.Module]]:
    """CONTENDERS and every variant of ours: with the element mask, and with each backend that serves the device."""
    forms = {name: functools.partial(ours, **options) for name, options in variants(device_type).items()}
    return {**CONTENDERS, **forms}


def why_not(name: str, p: float, device: str) -> str | None:
    """Why a contender cannot run at p, in one line; None: it can."""
    if p == 1 and name in ("published", "compiled"):
        return "it divides by 1 - p"
    return why_not_compiled(device) if name.startswith("compiled") else None


@functools.cache
def why_not_compiled(device: str = "cpu") -> str | None:
    """Why torch.compile cannot run here, in one line; None: it can."""
    tiny = problem(Shape(4, 4, 4), 0.5, torch.float32, device)
    try:
        compiled(tiny)(tiny.input).backward(tiny.grad_output)
    except Exception as error:  # Inductor reports a missing or broken C++ compiler through several exception types.
        return in_a_line(error)
    return None


def in_a_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
