"""Alternating timings in one process, so that ratios hold on a machine whose speed changes with its load."""

import gc
import os
import random
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

PHASES = ("forward", "backward", "both")
MIN_ROUNDS, MAX_ROUNDS = 5, 400
WARMUP_ROUNDS = 2

Times = dict[str, list[float]]
"""Phase -> seconds, one entry per round."""


def reset_gradients(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    x.grad = None


def time_step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[float, float]:
    """Seconds of one forward and one backward."""
    reset_gradients(layer, x)
    start = time.perf_counter()
    output = layer(x)
    middle = time.perf_counter()
    output.backward(dy)
    return middle - start, time.perf_counter() - middle


def alternate(layers: dict[str, nn.Module], x: Tensor, dy: Tensor, seconds: float) -> dict[str, Times]:
    """Run one step of every layer per round, in a fresh order each round, for about `seconds`."""
    times: dict[str, Times] = {name: {phase: [] for phase in PHASES} for name in layers}
    order = list(layers)
    shuffle = random.Random(0).shuffle
    for name in order * WARMUP_ROUNDS:
        time_step(layers[name], x, dy)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            shuffle(order)
            for name in order:
                forward, backward = time_step(layers[name], x, dy)
                for phase, value in zip(PHASES, (forward, backward, forward + backward), strict=True):
                    times[name][phase].append(value)
    finally:
        gc.enable()
    return times


class OtherLoad:
    """While open, watches what other processes take of the machine's CPUs: `share` in 0 … 1, None where unknown.

    Two threads that wait for each other at every barrier lose far more than that share, and small layers most: such
    figures are not comparable with those of a quiet machine, however many rounds went into them.
    """

    share: float | None = None

    def __enter__(self) -> "OtherLoad":
        self.start = cpu_seconds()
        return self

    def __exit__(self, *_) -> None:
        if self.start is not None:
            total, busy, own = (end - start for end, start in zip(cpu_seconds(), self.start, strict=True))
            self.share = max(0.0, busy - own) / total


def cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds since boot that the CPUs have had together, that were used, and that this process used; Linux only."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    # user nice system idle iowait irq softirq steal; guest time, which follows, is part of user.
    ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    seconds = [tick / os.sysconf("SC_CLK_TCK") for tick in ticks]
    return sum(seconds), sum(seconds) - seconds[3] - seconds[4], time.process_time()


def spread(values: list[float], unit: float = 1.0) -> dict[str, float]:
    """Median and 20/80 percentiles, in `unit`."""
    quintiles = statistics.quantiles(values, n=5, method="inclusive")
    parts = {"median": statistics.median(values), "p20": quintiles[0], "p80": quintiles[3]}
    return {name: round(value / unit, 4) for name, value in parts.items()}


def ratio(times: Times, base: Times, phase: str) -> dict[str, float]:
    """Spread of the per-round ratios: two steps of one round see the same load, so noise cancels."""
    return spread([a / b for a, b in zip(times[phase], base[phase], strict=True)])


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that forward keeps for backward beyond parameters and buffers, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    # The tensors are held until the count is done: a storage freed in between could lend its address to the next.
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    del output
    return sum(size for address, size in storages.items() if address not in own)
