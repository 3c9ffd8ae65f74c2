"""What is timed must be right: checks our layer against fp64, allowing twice the library's own error."""

from dataclasses import replace

import torch
from torch import Tensor

from mixout_fast import testing
from mixout_fast.testing import Case


def check_ours(case: Case, *, mask: str = "input", backend: str | None = None) -> None:
    """Runs testing.check_error on one case, against a cheaper oracle."""
    testing.check_error([replace(case, mask=mask)], backend, fp64_results)


def fp64_results(case: Case) -> dict[str, Tensor]:
    if case.compute == torch.float64:
        return testing.oracle(case)
    # testing.oracle is exact to fp64's last places but takes ten times as long as plain fp64 products, which suffice to
    # judge fp32.
    case = replace(case, input=case.input.to(case.compute))
    tensors = {name: value.double() for name, value in vars(case).items() if torch.is_tensor(value) and name != "seed"}
    return testing.library(replace(case, compute=torch.float64, **tensors))


def max_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact.to(value.device)).abs().max().item()
