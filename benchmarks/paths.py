"""The paths suite: products in one pass over W and U beside mixing first, for the rows where a backend must choose.

Its results decide every backend's ONE_PASS_ROWS and MANY_OUTPUTS_ROWS. Calls go to the backend's own functions, without
autograd, each on operands that were last used long ago. On a GPU a call's device time is measured in a CUDA graph,
whose launches do not wait for the host; the host's time is what issuing the call takes.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch.nn import functional as F

from benchmarks.agreement import check_ours
from benchmarks.contenders import in_a_line, problem
from benchmarks.layer import DTYPES, Shape, copies, matmul_precision
from benchmarks.timing import replay_seconds
from mixout_fast import backends
from mixout_fast.testing import Case

SOURCES = ("timing", "contenders", "layer", "paths")
RESULTS = ("y", "dX")
WAYS = {"one pass": 2**62, "mixed first": -1}
"""Name -> the number of rows up to which a backend is made to take one pass."""
CALLS, REPLAYS = 20, 9

P = 0.9
ROWS = (16, 64, 128, 1, 32, 256)
SIZES = ((1024, 1024), (1024, 4096), (4096, 1024))


def cells(options: argparse.Namespace) -> list[dict]:
    dtypes = ("bf16", "tf32", "fp32") if options.device == "cuda" else ("fp32",)
    rows, sizes = (ROWS[:1], ((64, 64),)) if options.quick else (ROWS, SIZES)
    return [
        {"shape": f"{m}x{k}x{n}", "p": P, "dtype": dtype} for dtype, m, (k, n) in itertools.product(dtypes, rows, sizes)
    ]


def wanted(options: argparse.Namespace) -> list[str]:
    return ["library", *(f"{name}, {way}" for name in choosing(options.device) for way in WAYS)]


def choosing(device_type: str) -> list[str]:
    """The backends that choose between the ways by the number of rows."""
    reasons = backends.describe(device_type)
    return [n for n, module in backends.BACKENDS.items() if reasons[n] is None and hasattr(module, "ONE_PASS_ROWS")]


def seconds(options: argparse.Namespace) -> float:
    """Measuring time per cell: 0, since calls are repeated a fixed number of times."""
    return 0.0


def measure(cell: dict, options: argparse.Namespace) -> dict:
    """Microseconds for y and for dX, on the device and on the host."""
    device = options.device
    with matmul_precision(cell["dtype"]):
        case = problem(Shape.parse(cell["shape"]), cell["p"], DTYPES[cell["dtype"]], device)
        operands = [(case.weight.clone(), case.target.clone()) for _ in range(max(CALLS, copies(case)))]
        contenders, left_out = {"library": timed(library_calls(case, operands), device)}, {}
        for name, (way, rows) in itertools.product(choosing(device), WAYS.items()):
            module = backends.BACKENDS[name]
            tables = [t for t in ("ONE_PASS_ROWS", "MANY_OUTPUTS_ROWS") if hasattr(module, t)]
            with mock.patch.multiple(module, **{t: dict.fromkeys(getattr(module, t), (rows, rows)) for t in tables}):
                try:
                    check_ours(case, backend=name)
                    contenders[f"{name}, {way}"] = timed(our_calls(module, case, operands), device)
                except Exception as error:  # The other figures are worth having without this one.
                    left_out[f"{name}, {way}"] = in_a_line(error)
    return {"contenders": contenders, "left_out": left_out}


Calls = dict[str, list[Callable[[], object]]]
"""For each of RESULTS, the calls to time together, each on operands of its own."""


def library_calls(case: Case, operands: list) -> Calls:
    x, grad = case.input.detach(), case.grad_output
    return {
        "y": [lambda w=w: F.linear(x, w, case.bias) for w, _ in operands],
        "dX": [lambda w=w: grad.mm(w) for w, _ in operands],
    }


def our_calls(module, case: Case, operands: list) -> Calls:
    x, grad, draw = case.input.detach(), case.grad_output, (case.seed, case.p, case.mask)
    dX_alone = (1.0, (True, False, False), False)
    return {
        "y": [lambda w=w, u=u: module.linear(x, w, u, case.bias, *draw, True, False) for w, u in operands],
        "dX": [lambda w=w, u=u: module.gradients(grad, None, None, None, w, u, *draw, *dX_alone) for w, u in operands],
    }


def timed(calls: Calls, device: str) -> dict[str, float]:
    figures = {}
    for result in RESULTS:
        host, on_device = microseconds(calls[result], device)
        figures |= {f"{result}_us": round(on_device, 2), f"{result}_host_us": round(host, 2)}
    return figures


@torch.no_grad()
def microseconds(calls: list[Callable[[], object]], device: str) -> tuple[float, float]:
    """A call's time on the host and on the device, as the median over REPLAYS runs of all calls."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run_all() -> None:
        for call in calls:
            call()

    run_all()
    times = []
    for _ in range(REPLAYS):
        synchronize()
        start = time.perf_counter()
        run_all()
        times.append(time.perf_counter() - start)
    on_device = times if device == "cpu" else replay_seconds(run_all, REPLAYS)
    return tuple(1e6 * statistics.median(seconds) / len(calls) for seconds in (times, on_device))
