"""The layer suite: forward and backward of one layer, ours beside everything one would use instead.

A step is a forward and a backward with a fixed dy; x requires grad and gradients are None before each step. Every ratio
is our time divided by the other's in the same round, as a median over rounds. Ours is checked against fp64 before it is
timed.
"""

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks import timing
from benchmarks.agreement import check_ours
from benchmarks.contenders import (
    CONTENDERS,
    Shape,
    contenders,
    in_a_line,
    other_backends,
    problem,
    variants,
    why_not,
)
from mixout_fast.reference import capacity
from mixout_fast.testing import Case

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
PHASES = ("forward", "backward")

SOURCES = ("timing", "contenders", "layer")
"""The modules that affect a figure: after a change in one of them, or in the package, cells are measured again."""

LAYERS = {
    "bert-base": ((768, 768), (768, 3072), (3072, 768)),
    "bert-large": ((1024, 1024), (1024, 4096), (4096, 1024)),
    "vit-b": ((768, 2304), (768, 768), (768, 3072), (3072, 768)),
    "gpt-2": ((768, 2304), (768, 768), (768, 3072), (3072, 768)),
    "llama-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}
"""Model -> (in_features, out_features) of its layers."""
ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
P = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)

TARGETS = {
    ("2048x768x768", "2048x3072x768"): {"linear": (0.74, 0.80, 0.90, 1.03), "dropout": (0.60, 0.60, 0.65, 0.85)},
    ("2048x768x3072", "1024x1024x4096"): {"linear": (0.76, 0.83, 0.95, 1.03), "dropout": (0.72, 0.78, 0.90, 1.00)},
    ("128x768x768", "128x1024x4096"): {"linear": (0.95, 1.00, 1.05, 1.12)},
}
"""Shapes -> other contender -> largest ratio allowed for a step, per p of TARGET_P; CPU, fp32, 2 threads."""
TARGET_P = (0.9, 0.7, 0.5, 0.1)
TARGET_SAVED = (0.2, 1.0, 1.0, 1.0)
"""Largest ratio allowed of our saved bytes to nn.Linear's, per p of TARGET_P."""
TARGET_SHAPES = tuple(itertools.chain(*TARGETS))

# (shapes, p, dtypes), the most important first: a --budget may end a run early.
CPU_SWEEPS = (
    (TARGET_SHAPES, TARGET_P, ("fp32",)),
    (("2048x768x768",), P, ("fp32",)),
    (tuple(f"{rows}x768x768" for rows in (16, 64, 256, 1024, 4096, 16384)), (0.9,), ("fp32",)),
    (("2048x768x768", "2048x768x3072"), (0.9, 0.5), ("bf16",)),
)
GPU_SWEEPS = (
    (("4096x1024x1024", "4096x1024x4096", "4096x4096x1024"), TARGET_P, ("bf16",)),
    (("4096x1024x4096",), P, ("bf16",)),
    (tuple(f"{rows}x1024x1024" for rows in (16, 64, 256, 1024, 16384)), (0.9,), ("bf16",)),
    (("8192x768x3072t", "8192x3072x768t"), (0.9, 0.5), ("bf16",)),
    (("4096x1024x1024", "4096x1024x4096"), (0.9, 0.5), ("tf32", "fp32", "fp16")),
    (("4096x4096x4096", "4096x4096x14336", "4096x14336x4096"), (0.9, 0.5), ("bf16",)),
    (tuple(f"{rows}x1024x4096" for rows in (16, 64, 256, 1024, 16384)), (0.9,), ("bf16",)),
)
QUICK_SWEEPS = ((("2048x768x768", "128x768x768"), (0.9, 0.5), ("fp32",)),)
TARGET_SWEEPS = ((TARGET_SHAPES, TARGET_P, ("fp32",)),)

REPEATS = {"cpu": 1, "cuda": 20}
"""Steps per timing. On a GPU the first step finds an idle device: with 20 steps that costs less than 5 %."""
GRAPH_REPLAYS = 20


def cells(options: argparse.Namespace) -> list[dict]:
    """What to measure: the named shapes, p and dtypes in every combination, or the set for this device."""
    if options.shapes or options.p or options.dtypes or options.full:
        shapes = options.shapes or (all_shapes() if options.full else QUICK_SWEEPS[0][0])
        sweeps = ((shapes, options.p or (P if options.full else TARGET_P), options.dtypes or ("fp32",)),)
    elif options.quick:
        sweeps = QUICK_SWEEPS
    elif options.targets:
        sweeps = TARGET_SWEEPS
    else:
        sweeps = GPU_SWEEPS if options.device == "cuda" else CPU_SWEEPS
    chosen = [
        {"shape": str(shape), "p": p, "dtype": dtype}
        for shapes, ps, dtypes in sweeps
        for dtype, shape, p in itertools.product(dtypes, shapes, ps)
    ]
    return list({tuple(cell.values()): cell for cell in chosen}.values())


def all_shapes() -> list[str]:
    sizes = dict.fromkeys(size for layer in LAYERS.values() for size in layer)
    return [f"{rows}x{k}x{n}" for (k, n), rows in itertools.product(sizes, ROWS)]


def wanted(options: argparse.Namespace) -> list[str]:
    """The contenders to time.

    These are always ours, nn.Linear and dropout, whose ratios every table has, and ours with every other compiled
    backend that serves the device, which shows whether the right backend is the default.
    """
    # A first torch.compile takes about 20 seconds, as long as a whole quick run; a GPU has many cells.
    brief = options.quick or options.targets or options.device == "cuda"
    chosen = options.contenders or (["published"] if brief else CONTENDERS)
    return list(dict.fromkeys(["ours", "linear", "dropout", *other_backends(options.device), *chosen]))


def seconds(options: argparse.Namespace) -> float:
    return options.seconds or (1.5 if options.quick or options.device == "cuda" else 2.5)


def measure(cell: dict, options: argparse.Namespace) -> dict:
    """Times and saved bytes of every contender, our ratios to the others, and the floor."""
    shape, p, device = Shape.parse(cell["shape"]), cell["p"], options.device
    reasons = {name: why_not(name, p, device) for name in wanted(options)}
    torch.compiler.reset()
    with matmul_precision(cell["dtype"]):
        case = problem(shape, p, DTYPES[cell["dtype"]], device)
        check_ours(case)
        for name, form in variants(device).items():
            if name in reasons:
                reasons[name] = why_wrong(case, form)
        names = [name for name, reason in reasons.items() if reason is None]
        available = contenders(device)
        steps = {name: LayerStep(available[name], case, copies(case)) for name in names}
        times, other_load = timing.alternate(steps, PHASES, device, seconds(options), REPEATS[device])
        if device == "cuda":
            for name, step in steps.items():
                times[name]["graph"] = graph_seconds(step)
        saved = {name: saved_bytes(step.layers[0], case.input) for name, step in steps.items()}

    phases = (*PHASES, "step") + (("host", "graph") if device == "cuda" else ())
    bandwidth = timing.copy_bandwidth(case.weight.nbytes, device)
    # A GPU's own time, where it is known: with few rows a step takes as long as the host does.
    phase = "graph" if all(times[name].get("graph") for name in ("linear", "ours")) else "step"
    linear, ours = (timing.spread(times[name][phase], unit=1e-3)["median"] for name in ("linear", "ours"))
    moved = sum(moved_bytes(shape, p, case.weight.itemsize).values())
    floor = floor_ms(p, linear, 1e3 * moved / bandwidth)
    return {
        "rounds": len(times["ours"]["step"]),
        "other_load": other_load,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "floor_ms": round(floor, 4),
        "floor_share": round(floor / ours, 4),
        "contenders": {
            name: {
                "saved_bytes": saved[name],
                **{f"{phase}_ms": timing.spread(times[name][phase], 1e-3) for phase in phases if times[name][phase]},
            }
            for name in names
        },
        "ratios": {
            name: {phase: timing.ratio(times["ours"], times[name], phase) for phase in (*PHASES, "step")}
            for name in names
            if name != "ours"
        },
        "left_out": {name: reason for name, reason in reasons.items() if reason is not None},
    }


def why_wrong(case: Case, form: dict) -> str | None:
    """Why one of our variants is not timed: the error of its check, or None. The others are timed without it."""
    try:
        check_ours(case, **form)
    except Exception as error:
        return in_a_line(error)
    return None


def graph_seconds(step: "LayerStep") -> list[float]:
    """Seconds of a step in a CUDA graph, which does not wait for the host; empty if the step cannot be captured.

    One graph holds a step on each copy of the operands; there is an entry per replay.
    """
    count = len(step.layers)
    try:
        seconds = timing.replay_seconds(lambda: [step(lambda: None) for _ in range(count)], GRAPH_REPLAYS)
    except RuntimeError:
        return []
    return [total / count for total in seconds]


class LayerStep:
    """Forward of a contender, and backward to the gradients named.

    Steps take `count` copies of the layer, x and dy in turn, so that none is found in the cache.
    """

    def __init__(
        self,
        make: Callable[[Case], nn.Module],
        case: Case,
        count: int,
        gradients: tuple[str, ...] = ("dX", "dW", "db"),
    ) -> None:
        self.layers = [make(case) for _ in range(count)]
        for layer in self.layers:
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(("db" if name.endswith("bias") else "dW") in gradients)
        inputs = [case.input.detach()] + [case.input.detach().clone() for _ in range(count - 1)]
        inputs = [x.requires_grad_("dX" in gradients) for x in inputs]
        grads = [case.grad_output] + [case.grad_output.clone() for _ in range(count - 1)]
        self.rotation = itertools.cycle(zip(self.layers, inputs, grads, strict=True))

    def __call__(self, mark: Callable[[], None]) -> None:
        layer, x, dy = next(self.rotation)
        reset_gradients(layer, x)
        mark()
        output = layer(x)
        mark()
        output.backward(dy)
        mark()


def reset_gradients(layer: nn.Module, x: torch.Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    x.grad = None


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    return timing.saved_bytes(layer, lambda: layer(x))


def copies(case: Case) -> int:
    """How many sets of operands fill a GPU's L2 three times over; 1 on CPUs, where other contenders run in between."""
    if case.weight.device.type != "cuda":
        return 1
    nbytes = sum(tensor.nbytes for tensor in (case.input, case.grad_output, case.weight, case.target))
    return -(-3 * timing.cache_bytes("cuda") // nbytes)


@contextlib.contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """Computes products of fp32 matrices in TF32 for dtype "tf32", which only GPUs have."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def floor_ms(p: float, linear_ms: float, moving_ms: float) -> float:
    """The least time a step can take: its products at nn.Linear's rate, its other bytes at a copy's bandwidth.

    nn.Linear's three products take linear_ms. Two of ours are as large; the third, dW, has 1 - p of the columns.
    """
    return linear_ms * (3 - p) / 3 + moving_ms


def moved_bytes(shape: Shape, p: float, itemsize: int) -> dict[str, int]:
    """Bytes read and written outside the products, for y, dX and dW.

    For y, and again for dX, W' is mixed: W and U are read and W' is written, (N, K) each. With y, X[:, kept] is
    gathered: (M, C) is read and written. For dW the compact gradient (N, C) is read, and the part of the dense gradient
    that the product does not compute, a share p of (N, K), is written.
    """
    if p == 0:
        return {}
    weight = shape.in_features * shape.out_features
    kept = capacity(shape.in_features, p)
    return {
        "y": itemsize * (3 * weight + 2 * shape.rows * kept),
        "dX": itemsize * 3 * weight,
        "dW": itemsize * (shape.out_features * kept + round(p * weight)),
    }
