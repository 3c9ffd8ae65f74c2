"""The picture of a finetuning run: time, dev scores and distance, method by method."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from benchmarks.data import Task
    from benchmarks.finetune import Result

DROPOUT, MIXOUT, INK, FAINT = "#9a9a9a", "#2b6cb0", "#222222", "#888888"


def plot(results: list[Result], task: Task, described: dict[str, str], path: Path) -> None:
    matplotlib.rcParams.update({"font.size": 11, "axes.titlesize": 12, "text.color": INK, "axes.titleweight": "bold"})
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08, h_pad=0.12)
    time, score, distance = figure.subplots(1, 3)

    bars(time, results, [result.ratio for result in results], "{:.2f}")
    time.axhline(1, color=FAINT, linewidth=0.8, linestyle="--")
    time.set_title("Time a training step takes,\nrelative to dropout (less is better)")

    points(score, results, task.chance)
    score.set_title(
        f"Dev {task.metric} at learning rate {described['learning rate']}\n(more is better; a point is a restart)"
    )

    bars(distance, results, [fmean(result.distances) for result in results], "{:.1f}")
    distance.set_title("Distance from the pretrained\nweights after training")

    figure.suptitle(f"Finetuning {described['model']} on {described['data']}", fontsize=13)
    footnote = f"{described['training']}\n{described['machine']}; {described['versions']}"
    figure.supxlabel(footnote, fontsize=8.5, color=FAINT)
    figure.savefig(path, dpi=150)


def colours(results: list[Result]) -> list[str]:
    return [MIXOUT if result.method.startswith("mixout") else DROPOUT for result in results]


def bars(axes: Axes, results: list[Result], values: list[float], form: str) -> None:
    drawn = axes.bar([result.method for result in results], values, width=0.6, color=colours(results))
    axes.bar_label(drawn, [form.format(value) for value in values], padding=3, fontsize=12)
    axes.set_ylim(0, 1.15 * max(values))
    axes.set_yticks([])
    tidy(axes)


def points(axes: Axes, results: list[Result], chance: float) -> None:
    for place, (result, colour) in enumerate(zip(results, colours(results), strict=True)):
        count = len(result.scores)
        offsets = [place + 0.12 * (restart - (count - 1) / 2) for restart in range(count)]
        axes.plot(offsets, result.scores, "o", markersize=8, color=colour, markeredgecolor="white")
        mean = fmean(result.scores)
        axes.hlines(mean, place - 0.35, place + 0.35, color=colour, linewidth=2)
        axes.annotate(f"{mean:.2f}", (place + 0.37, mean), va="center", fontsize=12)
    axes.axhline(chance, color=FAINT, linewidth=0.8, linestyle="--")
    end = len(results) - 0.25
    axes.annotate("always the same answer", (end, chance), (0, 4), textcoords="offset points", ha="right", color=FAINT)
    lowest = min(chance, *(min(result.scores) for result in results))
    highest = max(max(result.scores) for result in results)
    margin = 0.1 * (highest - lowest) + 0.01
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xlim(-0.5, end)
    axes.set_xticks(range(len(results)), [result.method for result in results])
    tidy(axes)


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", color=FAINT, labelcolor=FAINT)
