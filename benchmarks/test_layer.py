"""The layer comparison under pytest-benchmark: one group per phase, shape and p, contenders side by side.

    pytest benchmarks --benchmark-only                    a table of times
    pytest benchmarks --benchmark-disable                 a smoke run: every step once, on a tiny shape

A changing load distorts ratios between rows of a group; `python -m benchmarks.run` alternates and avoids that.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.agreement import check_ours
from benchmarks.contenders import CONTENDERS, Shape, problem, why_not
from benchmarks.layer import reset_gradients
from mixout_fast.testing import Case

pytestmark = [pytest.mark.parametrize("p", (0.9, 0.5)), pytest.mark.parametrize("contender", CONTENDERS)]


@pytest.fixture
def case(shape: Shape, p: float) -> Case:
    return problem(shape, p, torch.float32)


@pytest.fixture
def layer(contender: str, case: Case) -> torch.nn.Module:
    torch.compiler.reset()
    if contender == "ours":
        check_ours(case)
    if reason := why_not(contender, case.p, "cpu"):
        pytest.skip(reason)
    return CONTENDERS[contender](case)


def test_forward(benchmark, shape, p, layer, case):
    benchmark.group = f"forward {shape} p={p}"
    benchmark(layer, case.input)


def test_forward_and_backward(benchmark, shape, p, layer, case):
    benchmark.group = f"forward and backward {shape} p={p}"

    def step() -> None:
        reset_gradients(layer, case.input)
        layer(case.input).backward(case.grad_output)

    benchmark(step)


def test_backward(benchmark, shape, p, layer, case):
    benchmark.group = f"backward {shape} p={p}"

    def forward() -> tuple:
        reset_gradients(layer, case.input)
        return (layer(case.input),), {}

    rounds = 1 if benchmark.disabled else 20
    benchmark.pedantic(lambda output: output.backward(case.grad_output), setup=forward, rounds=rounds, warmup_rounds=1)
