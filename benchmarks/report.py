"""Tables and pictures of what benchmarks.run and benchmarks.finetune measured: `python -m benchmarks.report`.

Prints every figure of this machine; with --all, or if this one has no results, of all machines. Says which limits are
missed and by how much, draws a picture per file of results, and ends with the main figures in words. With --readme it
also rewrites the measured parts of README.md and docs/, which are marked by comments, from all machines' results.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean, median

from benchmarks.contenders import TITLES, Shape
from benchmarks.environment import ROOT, this_machine
from benchmarks.layer import GPU_SWEEPS, TARGET_P, TARGET_SAVED, TARGET_SHAPES, TARGETS
from benchmarks.model import BASELINE
from benchmarks.records import RESULTS, Records, is_disturbed, key

SUITES = ("layer", "terms", "paths", "model", "memory")
PIVOT = ("ours", "linear", "dropout")
"""The contenders whose ratios are a table's pairs; each other contender has a column of its own."""
NOT_MEASURED = "On GPUs: not measured yet."
OVERVIEW = (*TARGET_SHAPES, *GPU_SWEEPS[0][0])
"""The layer shapes that README.md shows; docs/measurements.md has all."""

NOISE = 1.2
"""Between runs hours apart single ratios moved by 0.81 to 1.17 with kernels whose times, by turns, were level."""

LEGEND = """Each figure is the median over rounds of our time divided by the other's in the same round; below 1 ours is
faster. * marks cells that other processes disturbed."""
PATHS_LEGEND = "Microseconds of a call on the device / of the host."
HOST_LEGEND = """Microseconds of a step / that the host takes to issue it / of the step as a CUDA graph, which waits for
no host. Where the first two are the same, the device waits for the host."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="of the --quick runs' results")
    parser.add_argument("--all", action="store_true", help="other machines' results too")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="name the layers that are slower than in it")
    parser.add_argument("--readme", action="store_true", help="put all machines' tables into README.md and docs/")
    options = parser.parse_args(arguments)
    if options.quick and options.readme:
        parser.error("--readme: not of --quick runs")
    if options.against and not load(options.against, "layer", options.quick):
        parser.error(f"--against: no results of layers in {options.against}")
    results = {suite: load(options.results, suite, options.quick) for suite in SUITES}
    if not any(results.values()):
        sys.exit(f"no results in {options.results}: python -m benchmarks.run measures")
    if not (options.all or options.readme):
        results = of_this_machine(results)
    for records in results["layer"]:
        print(f"{caption(records)}\n\n{LEGEND}\n\n{layer_details(records)}\n\n{limits_section(records)}\n")
        if options.against and (older := Records(options.against / records.path.name)).cells:
            print(f"{compared(records, older)}\n")
        if is_gpu(records):
            print(f"{HOST_LEGEND}\n\n{host_table(records)}\n")
    for records in results["terms"]:
        print(f"{terms_part(records)}\n")
    for records in results["paths"]:
        print(f"{caption(records)}\n\n{PATHS_LEGEND}\n\n{paths_table(records)}\n")
    for records in results["model"]:
        print(f"{model_part(records)}\n")
    for records in results["memory"]:
        print(f"{memory_part(records)}\n")
    for records in filter(measured, (*results["layer"], *results["memory"])):
        draw(records)
    print(f"\n{in_short(results)}")
    if options.readme:
        for name, of_file in measured_parts(results, options.results).items():
            (ROOT / name).write_text(with_parts((ROOT / name).read_text(), of_file))
            print(f"written: {name}")
    return 0


def load(folder: Path, suite: str, quick: bool = False) -> list[Records]:
    """The suite's results, machine by machine."""
    paths = sorted(path for path in folder.glob(f"{suite}-*.jsonl") if is_quick(path) == quick)
    return [records for records in map(Records, paths) if records.cells]


def is_quick(path: Path) -> bool:
    return path.stem.endswith("-quick")


def of_this_machine(results: dict[str, list[Records]]) -> dict[str, list[Records]]:
    """The results of this processor and this GPU; all results if there are none of these."""
    devices = this_machine()
    own = {
        suite: [records for records in of_suite if records.environment["device"] in devices]
        for suite, of_suite in results.items()
    }
    return own if any(own.values()) else results


def measured(records: Records) -> list[dict]:
    """The cells that were measured, in that order, without the failed cells, which limits_section lists."""
    return [cell for cell in records.cells.values() if "error" not in cell]


def caption(records: Records) -> str:
    """The device, versions and commit of the results, and the commands that measured them."""
    commands = "".join(f"\n    {command}" for command in dict.fromkeys(run["command"] for run in records.runs))
    return f"{machine(records)}\n{commands}"


def machine(records: Records) -> str:
    """The device, versions and commit of the results."""
    facts, run = records.environment, records.runs[-1]
    device = facts["device"] if is_gpu(records) else f"{facts['device']}, {facts['threads']} threads"
    versions = [f"{name} {facts[name]}" for name in ("torch", "cuda", "driver", "triton") if name in facts]
    return f"**{device}**: {', '.join(versions)}, backend {facts['backend']}, commit {run['commit']}."


def is_gpu(records: Records) -> bool:
    return "cuda" in records.environment


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A markdown table that is aligned as plain text too."""
    lines = [header, *rows]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = "|".join("-" * (width + 1) + (":" if place else "-") for place, width in enumerate(widths))
    texts = [
        " | ".join(text.rjust(width) if place else text.ljust(width) for place, (text, width) in cells)
        for cells in (enumerate(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([f"| {texts[0]} |", f"|{rule}|", *(f"| {text} |" for text in texts[1:])])


def layer_details(records: Records) -> str:
    """Every cell of the layer suite with every figure of a whole step."""
    cells = measured(records)
    others = [name for name in TITLES if any(name in cell["ratios"] for cell in cells)]
    others += extra_contenders(cells)
    header = ["rows x K x N", "dtype", "p", "ours, ms"]
    header += [f"/ {TITLES.get(name, name)}" for name in others]
    header += ["+-", "floor share", "saved / nn.Linear's"]
    return table(header, (layer_row(cell, others) for cell in cells))


def layer_row(cell: dict, others: list[str]) -> list[str]:
    name, ratios = cell["cell"], cell["ratios"]
    spread = (ratios["linear"]["step"]["p80"] - ratios["linear"]["step"]["p20"]) / 2
    return [
        name["shape"] + "*" * is_disturbed(cell),
        name["dtype"],
        f"{name['p']:g}",
        f"{cell['contenders']['ours']['step_ms']['median']:.3f}",
        *(f"{ratios[other]['step']['median']:.2f}" if other in ratios else "-" for other in others),
        f"{spread:.2f}",
        f"{cell['floor_share']:.2f}",
        f"{saved_share(cell):.2f}",
    ]


def host_table(records: Records) -> str:
    """What decides between backends: each contender's time of a step, on the host, and as a CUDA graph."""
    cells = measured(records)
    names = [name for name in (*PIVOT, *extra_contenders(cells)) if any(name in cell["contenders"] for cell in cells)]
    header = ["rows x K x N", "dtype", "p", *(TITLES.get(name, name) for name in names)]
    return table(header, (host_row(cell, names) for cell in cells))


def host_row(cell: dict, names: list[str]) -> list[str]:
    figures = [cell["contenders"].get(name) for name in names]
    name = cell["cell"]
    return [name["shape"], name["dtype"], f"{name['p']:g}", *(host_and_device(f) if f else "-" for f in figures)]


def host_and_device(figures: dict) -> str:
    phases = [figures.get(f"{phase}_ms") for phase in ("step", "host", "graph")]
    return " / ".join(f"{1e3 * phase['median']:.0f}" if phase else "-" for phase in phases)


def extra_contenders(cells: list[dict]) -> list[str]:
    """The contenders without a title in TITLES: variants of ours."""
    return sorted({name for cell in cells for name in cell["ratios"]} - {*TITLES})


def step_ratio(cell: dict, other: str) -> float:
    return cell["ratios"][other]["step"]["median"]


def saved_share(cell: dict) -> float:
    return cell["contenders"]["ours"]["saved_bytes"] / cell["contenders"]["linear"]["saved_bytes"]


LIMITS: tuple[tuple[str, int, float, Callable[[dict], float]], ...] = (
    ("slower than Dropout+Linear", 256, 0.3, lambda cell: step_ratio(cell, "dropout")),
    ("slower than nn.Linear", 256, 0.7, lambda cell: step_ratio(cell, "linear")),
    ("below 0.88 of the floor", 1024, 0.7, lambda cell: 0.88 / cell["floor_share"]),
)
"""(what a cell beyond the limit is, the least rows and p that it applies to, the value that may be at most 1)."""


def limits_section(records: Records) -> str:
    """The cells beyond each limit, the worst first, the cells that failed and, for a CPU, the table of targets."""
    lines = []
    for sentence, worst in beyond_limits(measured(records)):
        lines += [sentence, *(f"    {excess:.2f} times the limit: {cell_name(cell)}" for excess, cell in worst)]
    lines += [f"failed: {cell_name(cell)}: {cell['error']}" for cell in records.cells.values() if "error" in cell]
    left_out = ((cell, name, why) for cell in measured(records) for name, why in cell["left_out"].items())
    lines += [f"left out: {cell_name(cell)}: {TITLES.get(name, name)}: {why}" for cell, name, why in left_out]
    targets = "" if is_gpu(records) or records.environment["threads"] != 2 else targets_table(measured(records))
    return "\n".join(lines) + (f"\n\n{targets}" if targets else "")


def beyond_limits(cells: list[dict]) -> Iterator[tuple[str, list[tuple[float, dict]]]]:
    """For each limit a sentence that counts the cells beyond it, and (excess, cell) for each, the worst first."""
    for what, rows, p, excess in LIMITS:
        judged = [c for c in cells if Shape.parse(c["cell"]["shape"]).rows >= rows and c["cell"]["p"] >= p]
        beyond = [(excess(cell), cell) for cell in judged if excess(cell) > 1]
        beyond.sort(key=lambda pair: pair[0], reverse=True)
        yield f"{len(beyond)} of {len(judged)} cells with at least {rows} rows and p >= {p} are {what}", beyond


def compared(records: Records, older: Records) -> str:
    """How our ratios to nn.Linear have changed in the cells that both have, and which are slower by more than NOISE."""
    old, new = ({key(cell["cell"]): cell for cell in measured(both)} for both in (older, records))
    changes = {
        cell_name(new[name]): step_ratio(new[name], "linear") / step_ratio(old[name], "linear")
        for name in new
        if name in old
    }
    if not changes:
        return f"no cell in common with {older.path}"
    slower = sorted((name for name in changes if changes[name] > NOISE), key=changes.get, reverse=True)
    return "\n".join([
        f"our ratios to nn.Linear over those of {older.path}: median {median(changes.values()):.2f} of {len(changes)}",
        f"{len(slower)} of them above {NOISE}",
        *(f"    {changes[name]:.2f}: {name}" for name in slower),
    ])  # fmt: skip


def cell_name(cell: dict) -> str:
    return " ".join(f"{value}" if isinstance(value, str) else f"p={value:g}" for value in cell["cell"].values())


def targets_table(cells: list[dict]) -> str:
    """The cells that have targets: measured value beside target."""
    by_name = {(c["cell"]["shape"], c["cell"]["p"]): c for c in cells if c["cell"]["dtype"] == "fp32"}
    rows = []
    for shapes, limits in TARGETS.items():
        for shape in shapes:
            row = [by_name.get((shape, p)) for p in TARGET_P]
            if not any(row):
                continue
            for other, bounds in limits.items():
                ratios = [cell and step_ratio(cell, other) for cell in row]
                rows.append([f"{shape} / {TITLES[other]}", *map(verdict, ratios, bounds)])
            rows.append(
                [f"{shape} saved / nn.Linear's", *map(verdict, [c and saved_share(c) for c in row], TARGET_SAVED)]
            )
    if not rows:
        return ""
    missed = sum("miss" in text for row in rows for text in row)
    return f"targets (fp32, 2 threads): {missed} missed\n\n" + table(["a step", *(f"p {p}" for p in TARGET_P)], rows)


def verdict(value: float | None, limit: float) -> str:
    if value is None:
        return "-"
    # Where our layer saves x itself, as nn.Linear does, it also saves its seed: 8 bytes, which three decimals hide.
    return f"{value:.3f} <= {limit:.2f} {'pass' if round(value, 3) <= limit else 'miss'}"


def terms_part(records: Records) -> str:
    tables = (f"{cell_name(cell)}{'*' * is_disturbed(cell)}:\n\n{terms_table(cell)}" for cell in measured(records))
    return "\n\n".join([caption(records), *tables])


def terms_table(cell: dict) -> str:
    """Term by term: nn.Linear's time, ours, the floor."""
    ours, linear, floor = cell["contenders"]["ours"], cell["contenders"]["linear"], cell["floor_ms"]
    rows = [
        [term, f"{linear[f'{term}_ms']['median']:.3f}", f"{ours[f'{term}_ms']['median']:.3f}", f"{floor[term]:.3f}"]
        for term in floor
    ]
    rows.append([
        "a whole step",
        f"{linear['step_ms']['median']:.3f}",
        f"{ours['step_ms']['median']:.3f}",
        f"{sum(floor.values()):.3f}",
    ])  # fmt: skip
    return table(["ms", "nn.Linear", "ours", "floor"], rows)


def paths_table(records: Records) -> str:
    """Times of both ways to each product, backend by backend, beside the library's."""
    cells = measured(records)
    names = list(dict.fromkeys(name for cell in cells for name in cell["contenders"]))
    rows = [
        [cell["cell"]["shape"], cell["cell"]["dtype"], result]
        + [
            f"{figures[f'{result}_us']:.1f} / {figures[f'{result}_host_us']:.1f}" if figures else "-"
            for figures in map(cell["contenders"].get, names)
        ]
        for cell in cells
        for result in ("y", "dX")
    ]
    return table(["rows x K x N", "dtype", "of", *names], rows)


def model_table(records: Records) -> str:
    """A finetuning step: dropout's time, every other method's relative to it, and 3 epochs of RTE."""
    cells = measured(records)
    methods = list(dict.fromkeys(name for cell in cells for name in cell["ratios"]))
    header = ["model", "precision", "mode", f"{BASELINE}, s", *(f"{name} /" for name in methods), "+-"]
    header += [f"RTE: {BASELINE}, s", *(f"{name}, s" for name in methods if name.startswith("mixout"))]
    return table(header, (model_row(cell, methods) for cell in cells))


def model_row(cell: dict, methods: list[str]) -> list[str]:
    contenders, ratios = cell["contenders"], cell["ratios"]
    row = [cell["cell"]["model"] + "*" * is_disturbed(cell), cell["cell"]["precision"], cell["cell"]["mode"]]
    row.append(f"{contenders[BASELINE]['step_ms']['median'] / 1e3:.3f}")
    row += [f"{ratios[name]['step']['median']:.2f}" if name in ratios else "-" for name in methods]
    row.append(f"{fmean((r['step']['p80'] - r['step']['p20']) / 2 for r in ratios.values()):.2f}")
    timed = [BASELINE, *(name for name in methods if name.startswith("mixout"))]
    return row + [f"{contenders[name]['rte_3_epochs_s']:.0f}" if name in contenders else "-" for name in timed]


def memory_table(records: Records) -> str:
    """MB saved for backward and at the peak of a step, method by method."""
    cells = measured(records)
    methods = list(dict.fromkeys(name for cell in cells for name in cell["contenders"]))
    header = ["MB saved / MB at the peak", "precision", *methods]
    return table(header, (memory_row(cell, methods) for cell in cells))


def memory_row(cell: dict, methods: list[str]) -> list[str]:
    figures = [cell["contenders"].get(name) for name in methods]
    texts = [f"{f['saved_bytes'] / 1e6:.0f} / {f['peak_bytes'] / 1e6:.0f}" if f else "-" for f in figures]
    return [cell["cell"]["model"], cell["cell"]["precision"], *texts]


def in_short(results: dict[str, list[Records]]) -> str:
    """The main figures, each at its largest p below 1, in words."""
    lines = []
    for suite, describe in (("layer", layer_in_short), ("model", model_in_short), ("memory", memory_in_short)):
        for records in results[suite]:
            cells = measured(records)
            lines += [f"{records.environment['device']}: {text}" for text in describe(cells)]
    return "\n".join(lines)


def layer_in_short(cells: list[dict]) -> Iterator[str]:
    for dtype in dict.fromkeys(cell["cell"]["dtype"] for cell in cells):
        of_dtype = [cell for cell in cells if cell["cell"]["dtype"] == dtype]
        largest = max((p for cell in of_dtype if (p := cell["cell"]["p"]) < 1), default=1.0)
        spans = []
        for name, title in (("linear", "nn.Linear"), ("dropout", "nn.Dropout + nn.Linear")):
            ratios = [step_ratio(cell, name) for cell in of_dtype if cell["cell"]["p"] == largest]
            spans.append(f"{min(ratios):.2f} to {max(ratios):.2f} of {title}'s time")
        yield f"a training step of a layer with mixout({largest:g}) takes {' and '.join(spans)} ({dtype})"


def model_in_short(cells: list[dict]) -> Iterator[str]:
    for cell in cells:
        name, (method, ratios) = cell["cell"], largest_mixout(cell["ratios"])
        time = f"{ratios['step']['median']:.2f} of {BASELINE}'s time ({name['precision']}, {name['mode']})"
        yield f"a finetuning step of {name['model']} with {method} takes {time}"


def memory_in_short(cells: list[dict]) -> Iterator[str]:
    for cell in cells:
        method, figures = largest_mixout(cell["contenders"])
        share = figures["saved_bytes"] / cell["contenders"][BASELINE]["saved_bytes"]
        yield f"{cell['cell']['model']} with {method} saves {share:.2f} of {BASELINE}'s bytes for backward"


def largest_mixout(by_method: dict[str, dict]) -> tuple[str, dict]:
    """The method mixout(p) with the largest p below 1: its name and its entry."""
    p = {name: float(name[7:-1]) for name in by_method if name.startswith("mixout(")}
    name = max(p, key=lambda name: (p[name] < 1, p[name]))
    return name, by_method[name]


def draw(records: Records) -> None:
    try:
        from benchmarks.report_plot import plot_layers, plot_memory
    except ModuleNotFoundError as error:
        print(f"no picture of {records.path.name}: {error}")
        return
    plot = plot_layers if records.path.name.startswith("layer") else plot_memory
    path = records.path.with_suffix(".png")
    plot(measured(records), records.environment["device"], path)
    print(f"picture: {path}")


def measured_parts(results: dict[str, list[Records]], folder: Path) -> dict[str, dict[str, str]]:
    """File -> marker -> the measured part between the markers of that name; parts without results are left out."""
    finetuning = [json.loads(path.read_text()) for path in sorted(folder.glob("finetune*.json")) if not is_quick(path)]
    parts = {
        "README.md": {
            "summary": summary_table(results),
            "layers": machine_by_machine(latest(results["layer"]), layer_overview),
            "models": machine_by_machine(latest(results["model"]), model_part),
            "finetune": "\n\n".join(map(finetune_part, finetuning)),
        },
        "docs/measurements.md": {
            "layers": machine_by_machine(results["layer"], layer_part),
            "models": machine_by_machine(results["model"], model_part),
            "memory": machine_by_machine(results["memory"], memory_part),
        },
        "docs/performance.md": {"terms": "\n\n".join(map(terms_part, results["terms"]))},
    }
    return {name: {marker: part for marker, part in of_file.items() if part} for name, of_file in parts.items()}


def machine_by_machine(of_suite: list[Records], describe: Callable[[Records], str]) -> str:
    parts = list(map(describe, of_suite))
    return "\n\n".join(parts if any(map(is_gpu, of_suite)) else [*parts, NOT_MEASURED])


def latest(of_suite: list[Records]) -> list[Records]:
    """The results measured last on a CPU, and those measured last on a GPU."""
    newest = {is_gpu(records): records for records in sorted(of_suite, key=lambda records: records.runs[-1]["date"])}
    return list(newest.values())


def summary_table(results: dict[str, list[Records]]) -> str:
    """The smallest and largest ratio of a step's time to another's, by machine: models, and layers at p = 0.9."""
    ratios: dict[str, dict[str, list[float]]] = {}  # by title and device
    for suite in ("model", "layer"):
        for records in results[suite]:
            for cell in measured(records):
                for title, ratio in summarised(suite, cell).items():
                    ratios.setdefault(title, {}).setdefault(records.environment["device"], []).append(ratio)
    devices = dict.fromkeys(device for by_device in ratios.values() for device in by_device)
    rows = [[title, *(span(by_device.get(device)) for device in devices)] for title, by_device in ratios.items()]
    return table(["time of a step", *devices], rows)


def summarised(suite: str, cell: dict) -> dict[str, float]:
    """A cell's entries of the summary: title -> ratio."""
    if suite == "model":
        medians = {name: ratios["step"]["median"] for name, ratios in cell["ratios"].items()}
        return {f"finetuning with {name} / with {BASELINE}": median for name, median in medians.items()}
    if cell["cell"]["p"] != 0.9:
        return {}
    return {f"a layer with mixout(0.9) / {TITLES[name]}": step_ratio(cell, name) for name in ("linear", "dropout")}


def span(values: list[float] | None) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "–"


def layer_part(records: Records) -> str:
    """Ratios by shape and p, a table per dtype, and what is beyond the limits."""
    parts = [caption(records)]
    cells = measured(records)
    for dtype in dict.fromkeys(cell["cell"]["dtype"] for cell in cells):
        parts.append(f"{dtype}, time of a step over `nn.Linear`'s / over `nn.Dropout(p)` + `nn.Linear`'s:")
        parts.append(ratio_pivot([cell for cell in cells if cell["cell"]["dtype"] == dtype]))
    return "\n\n".join([*parts, *limits_and_picture(records, ROOT / "docs")])


def layer_overview(records: Records) -> str:
    """Like layer_part, but for the shapes of OVERVIEW alone and without the commands."""
    parts, cells = [machine(records)], measured(records)
    for dtype in dict.fromkeys(cell["cell"]["dtype"] for cell in cells):
        shown = [cell for cell in cells if cell["cell"]["shape"] in OVERVIEW and cell["cell"]["dtype"] == dtype]
        parts += [f"{dtype}:", ratio_pivot(shown)] if shown else []
    return "\n\n".join([*parts, *limits_and_picture(records, ROOT)])


def limits_and_picture(records: Records, folder: Path) -> Iterator[str]:
    """How many cells are beyond the limits, and the link to the picture from a file in `folder`."""
    yield "; ".join(sentence for sentence, _ in beyond_limits(measured(records))) + "."
    picture = records.path.with_suffix(".png")
    if picture.exists() and picture.is_relative_to(ROOT):
        yield f"![ratios, memory and share of the floor]({os.path.relpath(picture, folder)})"


def model_part(records: Records) -> str:
    return f"{caption(records)}\n\n{model_table(records)}"


def memory_part(records: Records) -> str:
    return f"{caption(records)}\n\n{memory_table(records)}"


def ratio_pivot(cells: list[dict]) -> str:
    """Shapes down, p across; the other contenders, share of the floor and saved bytes at the largest p."""
    probabilities = [p for p in TARGET_P if any(cell["cell"]["p"] == p for cell in cells)]
    by_name = {(cell["cell"]["shape"], cell["cell"]["p"]): cell for cell in cells}
    others = [name for name in TITLES if name not in PIVOT and any(name in cell["ratios"] for cell in cells)]
    header = ["rows × K × N", *(f"p = {p:g}" for p in probabilities), *(f"/ {TITLES[name]}" for name in others)]
    header += ["share of the floor", "saved bytes"]
    rows = []
    for shape in dict.fromkeys(cell["cell"]["shape"] for cell in cells):
        row = [by_name.get((shape, p)) for p in probabilities]
        if not any(row):
            continue
        at_largest_p = ["–"] * (len(others) + 2)
        if row[0]:
            at_largest_p = [f"{step_ratio(row[0], name):.2f}" if name in row[0]["ratios"] else "–" for name in others]
            at_largest_p += [f"{row[0]['floor_share']:.2f}", f"{saved_share(row[0]):.2f}"]
        rows.append([shape.replace("x", "×"), *map(ratio_pair, row), *at_largest_p])
    return table(header, rows)


def ratio_pair(cell: dict | None) -> str:
    if cell is None:
        return "–"
    return f"{step_ratio(cell, 'linear'):.2f} / {step_ratio(cell, 'dropout'):.2f}" + "*" * is_disturbed(cell)


def finetune_table(record: dict) -> str:
    header = ["", "s a step", "ratio", f"dev {record['metric']} of each restart", "mean", "‖w − w_pre‖"]
    rows = [
        [
            result["method"],
            f"{result['seconds']:.3f}",
            f"{result['ratio']:.2f}",
            " ".join(f"{score:.3f}" for score in result["scores"]),
            f"{fmean(result['scores']):.3f}",
            f"{fmean(result['distances']):.2f}",
        ]
        for result in record["results"]
    ]
    return table(header, rows)


def finetune_part(record: dict) -> str:
    where = f"{record['model']} on {record['data']}; {record['training']}, learning rate {record['learning rate']}; "
    chance = f"Always giving the same answer scores {record['chance']:.3f}."
    return (
        f"{where}{record['machine']}; {record['versions']}; `{record['command']}`. {chance}\n\n{finetune_table(record)}"
    )


def with_parts(text: str, parts: dict[str, str]) -> str:
    """The text with each part between `<!-- measured: NAME -->` and `<!-- /measured: NAME -->`.

    Raises ValueError if the text lacks a part's markers.
    """
    for name, part in parts.items():
        begin, end = f"<!-- measured: {name} -->", f"<!-- /measured: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"no {begin} … {end} to put the part into")
        text = pattern.sub(lambda _, whole=f"{begin}\n{part}\n{end}": whole, text)
    return text


if __name__ == "__main__":
    sys.exit(main())
