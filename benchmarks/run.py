"""Measure time and memory of mixout_fast, dropout, plain layers and published mixout: `python -m benchmarks.run`.

Results go to benchmarks/results/, one line per cell as soon as it is measured; the same command resumes an interrupted
run. `python -m benchmarks.report` makes tables and pictures of the results. The exit status is 1 if a cell failed, and
3 if it left CUDA unusable: the same command then goes on with the other cells, and tries that one last.
"""

import argparse
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import bert, layer, memory, model, paths, terms
from benchmarks.contenders import Shape, contenders
from benchmarks.environment import cuda_is_lost, environment, machine_slug, occasion
from benchmarks.progress import progress
from benchmarks.records import RESULTS, Records, is_disturbed, key

SUITES = {"layer": layer, "terms": terms, "paths": paths, "model": model, "memory": memory}
"""Modules with cells(options), what to measure, and measure(cell, options), a cell's record. wanted(options) are the
contenders and seconds(options) the measuring time of a finished cell; SOURCES are modules that affect its figures."""
CUDA_IS_LOST = 3  # exit status


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    start, failures = time.perf_counter(), 0
    for name in SUITES if options.suite == "all" else [options.suite]:
        budget = options.budget and options.budget - (time.perf_counter() - start)
        failures += run_suite(name, options, budget)
    return 1 if failures else 0


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, help="measuring time per cell")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further cell after so many seconds")
    parser.add_argument("--fresh", action="store_true", help="measure again what is already there")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    parser.add_argument("--p", nargs="+", type=probability, help="mixout's probabilities; layer suite: dropout's too")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a few small cells: a minute or so, in files of their own")
    which.add_argument("--targets", action="store_true", help="layer suite: the shapes and p that have targets")
    which.add_argument("--full", action="store_true", help="layer suite: all layers, rows and p (hours)")
    layers = parser.add_argument_group("layer suite")
    layers.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="ROWSxKxN", help="rows x in x out features")
    layers.add_argument("--dtypes", nargs="+", choices=layer.DTYPES)
    layers.add_argument(
        "--contenders", nargs="+", metavar="NAME", help="ours, linear and dropout always run; a wrong name lists all"
    )
    models = parser.add_argument_group("model and memory suites")
    models.add_argument("--models", nargs="+", choices=bert.SIZES)
    models.add_argument("--precisions", nargs="+", choices=model.PRECISIONS)
    models.add_argument("--modes", nargs="+", choices=model.MODES, help="model suite")
    options = parser.parse_args(arguments)

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda, but torch sees no GPU")
    if options.device == "cpu" and "tf32" in (*(options.dtypes or ()), *(options.precisions or ())):
        parser.error("tf32: only GPUs have it")
    known = contenders(options.device)
    if unknown := set(options.contenders or ()) - set(known):
        parser.error(f"--contenders: {', '.join(sorted(unknown))}; on this {options.device}: {', '.join(known)}")
    return options


def probability(text: str) -> float:
    p = float(text)
    if not 0.0 <= p <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return p


def run_suite(name: str, options: argparse.Namespace, budget: float | None) -> int:
    """Measure the suite's cells that have no finished result yet; returns how many failed."""
    suite = SUITES[name]
    quick = "-quick" if options.quick else ""
    records = Records(options.results / f"{name}-{machine_slug(options.device)}{quick}.jsonl")
    changed = records.start(environment(options.device, suite.SOURCES), occasion())
    if changed:
        say(f"{records.path.name} holds results of another {', '.join(changed)}: measured afresh")
    cells = suite.cells(options)
    there = {} if options.fresh else records.cells
    missing = [cell for cell in cells if not is_finished(there.get(key(cell)), suite, options)]
    missing.sort(key=lambda cell: "error" in there.get(key(cell), {}))
    if len(missing) < len(cells):
        say(f"{name}: {len(cells) - len(missing)} of {len(cells)} cells are there already; --fresh measures them again")
    return measure_all(suite, missing, records, options, budget) if missing else 0


def is_finished(record: dict | None, suite: ModuleType, options: argparse.Namespace) -> bool:
    """Whether a cell has been measured with every contender, for long enough, and undisturbed."""
    if record is None or "error" in record or is_disturbed(record):
        return False
    seen = {*record["contenders"], *record["left_out"]}
    return seen.issuperset(suite.wanted(options)) and record["seconds"] >= suite.seconds(options)


def measure_all(
    suite: ModuleType, cells: list[dict], records: Records, options: argparse.Namespace, budget: float | None
) -> int:
    start, failures = time.perf_counter(), 0
    bar = progress(cells)
    for done, cell in enumerate(bar):
        if budget is not None and time.perf_counter() - start > budget:
            say(f"\nthe budget is used up: {len(cells) - done} cells left; the same command goes on with them")
            break
        bar.set_description(" ".join(map(str, cell.values())))
        try:
            measured = suite.measure(cell, options)
        except Exception as error:  # A cell that is wrong or out of memory must not cost the others.
            failures += 1
            measured = {"error": f"{type(error).__name__}: {error}"}
            say(f"\n{' '.join(map(str, cell.values()))}: {measured['error']}")
        records.append({"cell": cell, "seconds": suite.seconds(options), **measured})
        if cuda_is_lost():
            say("CUDA is unusable after this: the same command goes on with the other cells")
            sys.exit(CUDA_IS_LOST)
    return failures


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
