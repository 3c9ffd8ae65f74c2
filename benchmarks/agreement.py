"""What is timed must be right: our layer against fp64, by the rule of twice the library's own error."""

from dataclasses import replace

import torch
from torch import Tensor

from mixout_fast import testing
from mixout_fast.testing import Case


def check_ours(case: Case, *, mask: str = "input", backend: str | None = None) -> None:
    """Raise AssertionError where y or a gradient is off by more than twice the library's error on the same mask.

    A result as close as one rounding passes: the library's own error can be 0 by luck.
    """
    case = replace(case, mask=mask)
    with testing.sums_in_fp32():
        ours, library, exact = testing.run(case, backend), testing.library(case), fp64_results(case)
    for name, true in exact.items():
        rounding = torch.finfo(case.compute).eps / 2 * true.abs().max().item()
        error, allowed = max_error(ours[name], true), max(2 * max_error(library[name], true), rounding)
        if not error <= allowed:
            raise AssertionError(f"{name}: error {error:.3g} against fp64, the rule allows {allowed:.3g}: {case}")


def fp64_results(case: Case) -> dict[str, Tensor]:
    if case.compute == torch.float64:
        return testing.oracle(case)
    # testing's oracle is exact to fp64's last places, at ten times the price of plain fp64 products, which are exact
    # enough to judge fp32 by.
    tensors = {name: value.double() for name, value in vars(case).items() if torch.is_tensor(value) and name != "seed"}
    return testing.library(replace(case, compute=torch.float64, **tensors))


def max_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact.to(value.device)).abs().max().item()
