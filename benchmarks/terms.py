"""The terms suite: the time of each term of a layer's step, beside nn.Linear's and the least it could be.

A gradient is timed in a backward that computes it alone, y in a forward of a layer that needs all gradients.
"""

import argparse

from benchmarks import timing
from benchmarks.agreement import check_ours
from benchmarks.contenders import CONTENDERS, Shape, problem
from benchmarks.layer import DTYPES, PHASES, REPEATS, LayerStep, copies, matmul_precision, moved_bytes
from mixout_fast.testing import Case

SOURCES = ("timing", "contenders", "layer", "terms")
TERMS = ("y", "dX", "dW", "db")
CPU_SHAPES = ("2048x768x768", "128x768x768")
GPU_SHAPES = ("4096x1024x4096", "256x1024x1024")


def cells(options: argparse.Namespace) -> list[dict]:
    shapes, dtype = (GPU_SHAPES, "bf16") if options.device == "cuda" else (CPU_SHAPES, "fp32")
    return [{"shape": shape, "p": 0.9, "dtype": dtype} for shape in (shapes[1:] if options.quick else shapes)]


def wanted(options: argparse.Namespace) -> list[str]:
    return ["ours", "linear"]


def seconds(options: argparse.Namespace) -> float:
    return options.seconds or (1.0 if options.quick else 5.0)


def measure(cell: dict, options: argparse.Namespace) -> dict:
    """Milliseconds of every term and of a whole step, ours and nn.Linear's, and the floor of each term."""
    device = options.device
    with matmul_precision(cell["dtype"]):
        case = problem(Shape.parse(cell["shape"]), cell["p"], DTYPES[cell["dtype"]], device)
        check_ours(case)
        steps = {
            f"{name} {term}": LayerStep(CONTENDERS[name], case, copies(case), gradients)
            for name in wanted(options)
            for term, gradients in {"y": TERMS[1:], "dX": ("dX",), "dW": ("dW",), "db": ("db",)}.items()
        }
        times, other_load = timing.alternate(steps, PHASES, device, seconds(options), REPEATS[device])
    contenders = {}
    for name in wanted(options):
        phases = {"y": times[f"{name} y"]["forward"], "step": times[f"{name} y"]["step"]}
        phases |= {term: times[f"{name} {term}"]["backward"] for term in TERMS[1:]}
        contenders[name] = {f"{term}_ms": timing.spread(values, unit=1e-3) for term, values in phases.items()}
    bandwidth = timing.copy_bandwidth(case.weight.nbytes, device)
    return {
        "rounds": len(times["ours y"]["step"]),
        "other_load": other_load,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "contenders": contenders,
        "floor_ms": {term: round(value, 4) for term, value in floors(case, contenders, bandwidth).items()},
        "left_out": {},
    }


def floors(case: Case, contenders: dict, bandwidth: float) -> dict[str, float]:
    """Term -> its floor: nn.Linear's time, of which dW needs 1 - p, and the time to move its other bytes; in ms."""
    out_features, in_features = case.weight.shape
    moved = moved_bytes(Shape(len(case.rows), in_features, out_features), case.p, case.weight.itemsize)
    products = {"y": 1.0, "dX": 1.0, "dW": 1 - case.p, "db": 1.0}
    return {
        term: share * contenders["linear"][f"{term}_ms"]["median"] + 1e3 * moved.get(term, 0) / bandwidth
        for term, share in products.items()
    }
