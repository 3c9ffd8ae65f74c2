"""The pictures of the report: a layer's time and memory against p and rows, a model's memory against p."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import TITLES, Shape

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#718096", "#975a16", "#285e61")
FAINT = "#888888"
OTHERS = ("linear", "dropout", "published", "compiled", "compiled-dropout")


def plot_layers(cells: list[dict], device: str, path: Path) -> None:
    """Four panels: ratios against p and against rows, saved bytes against p, share of the floor against rows."""
    figure = prepared_figure(f"One layer, forward and backward, {device}")
    (by_p, by_rows), (saved, floor) = figure.subplots(2, 2)

    sweep, name = largest_group(cells, lambda c: (c["cell"]["shape"], c["cell"]["dtype"]), lambda c: c["cell"]["p"])
    draw_ratios(by_p, sweep, lambda cell: cell["cell"]["p"])
    finish(by_p, f"Our time over the others', {' '.join(name)}", "p")
    lines = {
        "ours": lambda c: c["contenders"]["ours"]["saved_bytes"] / c["contenders"]["linear"]["saved_bytes"],
        "1 - p": lambda c: 1 - c["cell"]["p"],
    }
    for colour, (label, value) in zip(COLOURS, lines.items(), strict=False):
        draw_line(saved, sweep, lambda c: c["cell"]["p"], value, label, colour)
    finish(saved, f"Bytes saved for backward over nn.Linear's, {' '.join(name)}", "p")

    sweep, name = largest_group(cells, lambda c: (layer_of(c), c["cell"]["dtype"], c["cell"]["p"]), rows_of)
    where = f"{name[0]} {name[1]}, p = {name[2]:g}"
    draw_ratios(by_rows, sweep, rows_of)
    finish(by_rows, f"Our time over the others', {where}", "rows")
    draw_line(floor, sweep, rows_of, lambda c: c["floor_share"], "floor / measured", COLOURS[0])
    for axes in (by_rows, floor):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    floor.axhline(1, color=FAINT, linewidth=0.8, linestyle="--")
    finish(floor, f"Share of the floor, {where}", "rows")
    figure.savefig(path, dpi=120)


def plot_memory(cells: list[dict], device: str, path: Path) -> None:
    """Saved and peak bytes of a step over dropout(0.1)'s against mixout's p, a line per model and precision."""
    figure = prepared_figure(f"Memory of a finetuning step over dropout(0.1)'s, {device}", height=4.2)
    for axes, kind, title in zip(
        figure.subplots(1, 2), ("saved_bytes", "peak_bytes"), ("saved for backward", "peak"), strict=True
    ):
        for colour, cell in zip(COLOURS, cells, strict=False):
            mixed = {float(name[7:-1]): r[kind] for name, r in cell["ratios"].items() if name.startswith("mixout")}
            points = sorted(mixed.items())
            label = f"{cell['cell']['model']} {cell['cell']['precision']}"
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=f"{label}, mixout(p)")
            axes.axhline(cell["ratios"]["none"][kind], color=colour, linestyle="--", label=f"{label}, no regulariser")
        finish(axes, title, "p")
    figure.savefig(path, dpi=120)


def prepared_figure(title: str, height: float = 8.4) -> Figure:
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    figure = Figure(figsize=(12, height), layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure


def largest_group(cells: list[dict], group: Callable, place: Callable) -> tuple[list[dict], tuple]:
    """The cells of the largest group, in order of `place` along the axis, and the group's name."""
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        groups.setdefault(group(cell), []).append(cell)
    name = max(groups, key=lambda name: len(groups[name]))
    return sorted(groups[name], key=place), name


def layer_of(cell: dict) -> str:
    """KxN, followed by a t for a column-major weight."""
    return cell["cell"]["shape"].partition("x")[2]


def rows_of(cell: dict) -> int:
    return Shape.parse(cell["cell"]["shape"]).rows


def draw_ratios(axes: Axes, cells: list[dict], place: Callable) -> None:
    """A line per contender through the medians, with a band from the 20th to the 80th percentile."""
    for colour, name in zip(COLOURS, OTHERS, strict=False):
        compared = [cell for cell in cells if name in cell["ratios"]]
        if not compared:
            continue
        draw_line(
            axes, compared, place, lambda c, n=name: c["ratios"][n]["step"]["median"], f"/ {TITLES[name]}", colour
        )
        low, high = ([cell["ratios"][name]["step"][edge] for cell in compared] for edge in ("p20", "p80"))
        axes.fill_between([*map(place, compared)], low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(1, color=FAINT, linewidth=0.8, linestyle="--")


def draw_line(axes: Axes, cells: list[dict], place: Callable, value: Callable, label: str, colour: str) -> None:
    axes.plot([*map(place, cells)], [*map(value, cells)], "o-", markersize=4, color=colour, label=label)


def finish(axes: Axes, title: str, axis: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(axis)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
