"""The layer comparison under pytest-benchmark: one group per phase, shape and p, contenders side by side.

    pytest benchmarks --benchmark-only                    a table of times
    pytest benchmarks --benchmark-disable                 a smoke run: every step once, on a tiny shape

Ratios between rows of a group suffer from a changing load; `python -m benchmarks.layer` alternates and does not.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.agreement import check_ours  # noqa: E402
from benchmarks.contenders import CONTENDERS, Operands, Shape, why_not_compiled  # noqa: E402
from benchmarks.timing import reset_gradients  # noqa: E402

P = (0.9, 0.5)


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


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_forward(benchmark, contender, shape, p, layer, operands):
    benchmark.group = f"forward {shape} p={p}"
    benchmark(layer, operands.x)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_forward_and_backward(benchmark, contender, shape, p, layer, operands):
    benchmark.group = f"forward and backward {shape} p={p}"

    def step() -> None:
        reset_gradients(layer, operands.x)
        layer(operands.x).backward(operands.dy)

    benchmark(step)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_backward(benchmark, contender, shape, p, layer, operands):
    benchmark.group = f"backward {shape} p={p}"
    output = layer(operands.x)

    def setup() -> None:
        reset_gradients(layer, operands.x)

    rounds = 1 if benchmark.disabled else 20
    benchmark.pedantic(output.backward, (operands.dy, True), setup=setup, rounds=rounds, warmup_rounds=1)
