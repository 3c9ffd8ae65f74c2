"""One layer, forward and backward: ours against nn.Linear, dropout, published mixout and compiled mixout.

    python -m benchmarks.layer [--quick | --targets] [--shapes 2048x768x768 …] [--p 0.9 …] [--dtype fp32] [--threads N]

A step is a forward and a backward with a fixed dy; x requires grad and gradients are None before each step. Every ratio
is the median over rounds of ours divided by the other's time in the same round.
"""

import argparse
import datetime
import json
import operator
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.agreement import check_ours
from benchmarks.contenders import CONTENDERS, Shape, problem, why_not_compiled
from benchmarks.progress import progress
from mixout_fast import backends

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
TITLES = {"linear": "nn.Linear", "dropout": "Dropout+Linear", "published": "published", "compiled": "compiled"}

QUIET = 0.03
"""Share of the CPUs that other processes may take of a measurement; an idle desktop takes about 1 %."""

DEFAULT_P = (0.9, 0.7, 0.5, 0.1)
DEFAULT_SHAPES = (Shape(2048, 768, 768), Shape(2048, 3072, 768), Shape(2048, 768, 3072), Shape(128, 768, 768))
QUICK_P = (0.9, 0.5)
QUICK_SHAPES = (Shape(2048, 768, 768), Shape(128, 768, 768))

TARGETS = {
    ("2048x768x768", "2048x3072x768"): {"linear": (0.74, 0.80, 0.90, 1.03), "dropout": (0.60, 0.60, 0.65, 0.85)},
    ("2048x768x3072", "1024x1024x4096"): {"linear": (0.76, 0.83, 0.95, 1.03), "dropout": (0.72, 0.78, 0.90, 1.00)},
    ("128x768x768", "128x1024x4096"): {"linear": (0.95, 1.00, 1.05, 1.12)},
}
"""Shapes -> other -> most that the ratio of forward + backward may be, per p of TARGET_P; fp32, 2 threads."""
TARGET_P = (0.9, 0.7, 0.5, 0.1)
TARGET_SAVED = (0.2, 1.0, 1.0, 1.0)
"""Most that our saved bytes may be of nn.Linear's."""


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    names = available(options.contenders)
    backend = backends.select(None, "cpu").__name__.rpartition(".")[2]
    print(f"{cpu_model()}, {options.threads} threads, torch {torch.__version__}, {options.dtype}, backend {backend}")

    bar = progress([(shape, p) for shape in options.shapes for p in options.p])
    cells = [measure_cell(shape, p, names, options, bar) for shape, p in bar]

    result = {
        "cpu": cpu_model(),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": backend,
        "dtype": options.dtype,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.layer " + shlex.join(sys.argv[1:]),
        "cells": cells,
    }
    for phase in reversed(timing.PHASES):
        print(phase_table(cells, names, phase))
    if options.targets:
        print(targets_table(cells))
    print("\n+- half the 20-80 % range of the ratio to nn.Linear over the rounds")
    if any(map(is_disturbed, cells)):
        print(f"*  other processes used more than {QUIET:.0%} of the CPUs meanwhile: repeat on a quiet machine")
    write(result, options.output or RESULTS / file_name(options))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", type=Shape.parse, metavar="ROWSxKxN", help="rows x in_features x out_features"
    )
    parser.add_argument("--p", nargs="+", type=float, help=f"default {DEFAULT_P}")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default all; ours and linear always run")
    parser.add_argument("--seconds", type=float, help="measuring time per shape and p")
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="two shapes, two p, nothing compiled: 20 seconds at most")
    mode.add_argument("--targets", action="store_true", help="the targets' shapes and p, pass or miss per cell")
    options = parser.parse_args()
    for name, value in defaults(options).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.targets and "dropout" not in options.contenders:
        parser.error("--contenders: the targets need dropout")
    return options


def defaults(options: argparse.Namespace) -> dict:
    if options.quick:
        # A first torch.compile takes about 20 seconds, the whole of a quick run.
        others = ["dropout", "published"]
        return {"shapes": QUICK_SHAPES, "p": QUICK_P, "contenders": others, "seconds": 2.0}
    if options.targets:
        shapes = [Shape.parse(text) for group in TARGETS for text in group]
        return {"shapes": shapes, "p": TARGET_P, "contenders": ["dropout"], "seconds": 6.0}
    return {"shapes": DEFAULT_SHAPES, "p": DEFAULT_P, "contenders": list(CONTENDERS), "seconds": 3.5}


def available(chosen: list[str]) -> list[str]:
    names = [name for name in CONTENDERS if name in chosen or name in ("ours", "linear")]
    if "compiled" not in names:
        return names
    print("compiling; the first time takes about 20 seconds", file=sys.stderr)
    if reason := why_not_compiled():
        print(f"compiled mixout left out: {reason}")
        names.remove("compiled")
    return names


def measure_cell(shape: Shape, p: float, names: list[str], options: argparse.Namespace, bar) -> dict:
    """Times and saved bytes of every contender, and our ratios to the others, at one shape and p."""
    bar.set_description(f"{shape} p={p}")
    case = problem(shape, p, DTYPES[options.dtype])
    check_ours(case)
    layers = {name: CONTENDERS[name](case) for name in names}
    with timing.OtherLoad() as others:
        times = timing.alternate(layers, case.input, case.grad_output, options.seconds)
    return {
        "shape": str(shape),
        "p": p,
        "rounds": len(times["ours"]["both"]),
        "other_load": others.share and round(others.share, 3),
        "contenders": {
            name: {
                "saved_bytes": timing.saved_bytes(layers[name], case.input),
                **{f"{phase}_ms": timing.spread(times[name][phase], unit=1e-3) for phase in timing.PHASES},
            }
            for name in names
        },
        "ratios": {
            name: {phase: timing.ratio(times["ours"], times[name], phase) for phase in timing.PHASES}
            for name in names
            if name != "ours"
        },
    }


def phase_table(cells: list[dict], names: list[str], phase: str) -> str:
    others = [name for name in names if name != "ours"]
    title = "forward + backward" if phase == "both" else phase
    header = ["rows x K x N", "p", "ours ms", *(f"/ {TITLES[name]}" for name in others), "+-"]
    if phase == "both":
        header += ["saved MB", "nn.Linear's"]
    rows = [phase_row(cell, others, phase) for cell in cells]
    return f"\n{title}: ours, and ours / theirs\n{table(header, rows)}"


def phase_row(cell: dict, others: list[str], phase: str) -> list[str]:
    ours = cell["contenders"]["ours"]
    row = [cell["shape"] + "*" * is_disturbed(cell), f"{cell['p']:g}", f"{ours[f'{phase}_ms']['median']:.2f}"]
    ratios = [cell["ratios"][name][phase] for name in others]
    row += [f"{ratio['median']:.2f}" for ratio in ratios]
    row.append(f"{(ratios[0]['p80'] - ratios[0]['p20']) / 2:.2f}")
    if phase == "both":
        row += [f"{cell['contenders'][name]['saved_bytes'] / 1e6:.2f}" for name in ("ours", "linear")]
    return row


def is_disturbed(cell: dict) -> bool:
    return (cell["other_load"] or 0.0) > QUIET


def targets_table(cells: list[dict]) -> str:
    """What was measured beside its target; - where it was not."""
    by_key = {(cell["shape"], cell["p"]): cell for cell in cells}
    rows = [["floor (matrix products alone)", *(f"{(3 - p) / 3:.2f}" for p in TARGET_P)]]
    for shapes, limits in TARGETS.items():
        for shape in shapes:
            measured = [by_key.get((shape, p)) for p in TARGET_P]
            if not any(measured):
                continue
            for name, bounds in limits.items():
                ratios = [cell and cell["ratios"][name]["both"]["median"] for cell in measured]
                marks = ["*" if cell and is_disturbed(cell) else "" for cell in measured]
                verdicts = map(operator.add, map(verdict, ratios, bounds), marks)
                rows.append([f"{shape} / {TITLES[name]}", *verdicts])
            rows.append([f"{shape} saved / nn.Linear's", *map(verdict, map(saved_share, measured), TARGET_SAVED)])
    header = ["forward + backward", *(f"p {p}" for p in TARGET_P)]
    missed = sum("miss" in value for row in rows for value in row)
    return f"\ntargets (fp32, 2 threads): {missed} missed\n" + table(header, rows)


def saved_share(cell: dict | None) -> float | None:
    return cell and cell["contenders"]["ours"]["saved_bytes"] / cell["contenders"]["linear"]["saved_bytes"]


def verdict(value: float | None, limit: float) -> str:
    if value is None:
        return "-"
    # Saving x itself, as nn.Linear does, our layer also saves its seed: 8 bytes, which three decimals leave out.
    return f"{value:.3f} <= {limit:.2f} {'pass' if round(value, 3) <= limit else 'miss'}"


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def cpu_model() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def file_name(options: argparse.Namespace) -> str:
    suite = "layer-quick" if options.quick else "layer-targets" if options.targets else "layer"
    return f"{suite}-{options.dtype}-{options.threads}threads.json"


def write(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = ",\n".join(json.dumps(cell) for cell in result["cells"])
    head = json.dumps({**result, "cells": []}, indent=1)
    path.write_text(head.replace('"cells": []', f'"cells": [\n{cells}\n]') + "\n")
    print(f"\nwritten to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
