"""What is timed must be right: our layer against fp64, by the rule of twice the library's own error."""

import torch
from torch import Tensor

from benchmarks.contenders import Operands
from mixout_fast import mix_linear, reference

NAMES = ("y", "dX", "dW", "db")
SEED = 20_191_102


def check_ours(operands: Operands, p: float) -> None:
    """Raise AssertionError where max|ours - exact| exceeds 2 max|library - exact|, in y or a gradient.

    Both are given the same mask; the library computes with reference's W' and dense products in the operands' dtype.
    """
    exact = reference_results(*(tensor.detach().double() for tensor in vars(operands).values()), p=p)
    library = reference_results(*(tensor.detach() for tensor in vars(operands).values()), p=p)
    for name, ours, theirs, true in zip(NAMES, our_results(operands, p), library, exact, strict=True):
        error, allowed = max_error(ours, true), 2 * max_error(theirs, true)
        if not error <= allowed:
            raise AssertionError(f"{name} at p={p}: error {error:.3g} against fp64, the rule allows {allowed:.3g}")


def our_results(operands: Operands, p: float) -> tuple[Tensor, ...]:
    weight, bias = operands.weight.clone().requires_grad_(), operands.bias.clone().requires_grad_()
    output = mix_linear(operands.x, weight, operands.target, bias, p, seed=SEED)
    return output.detach(), *torch.autograd.grad(output, (operands.x, weight, bias), operands.dy)


def reference_results(x: Tensor, dy: Tensor, weight: Tensor, target: Tensor, bias: Tensor, p: float):
    seed = torch.tensor(SEED)
    output = reference.linear_forward(x, weight, target, bias, seed, p, "input")
    return output, *reference.linear_backward(dy, x, weight, target, seed, p, "input")


def max_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()
