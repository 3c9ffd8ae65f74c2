"""The layer comparison under pytest-benchmark: one group per phase, shape and p, contenders side by side.

    pytest benchmarks --benchmark-only                    a table of times
    pytest benchmarks --benchmark-disable                 a smoke run: every step once, on a tiny shape

Ratios between rows of a group suffer from a changing load; `python -m benchmarks.layer` alternates and does not.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.agreement import check_ours
from benchmarks.contenders import CONTENDERS, Operands, Shape, why_not_compiled
from benchmarks.timing import reset_gradients

pytestmark = [pytest.mark.parametrize("p", (0.9, 0.5)), pytest.mark.parametrize("contender", CONTENDERS)]


@pytest.fixture
def operands(shape: Shape) -> Operands:
    return Operands.random(shape, torch.float32)


@pytest.fixture
def layer(contender: str, operands: Operands, p: float) -> torch.nn.Module:
    if contender == "ours":
        check_ours(operands, p)
    if contender == "compiled" and (reason := why_not_compiled()):
        pytest.skip(f"torch.compile: {reason}")
    return CONTENDERS[contender](operands, p)


def test_forward(benchmark, shape, p, layer, operands):
    benchmark.group = f"forward {shape} p={p}"
    benchmark(layer, operands.x)


def test_forward_and_backward(benchmark, shape, p, layer, operands):
    benchmark.group = f"forward and backward {shape} p={p}"

    def step() -> None:
        reset_gradients(layer, operands.x)
        layer(operands.x).backward(operands.dy)

    benchmark(step)


def test_backward(benchmark, shape, p, layer, operands):
    benchmark.group = f"backward {shape} p={p}"

    def forward() -> tuple:
        reset_gradients(layer, operands.x)
        return (layer(operands.x),), {}

    rounds = 1 if benchmark.disabled else 20
    benchmark.pedantic(lambda output: output.backward(operands.dy), setup=forward, rounds=rounds, warmup_rounds=1)
