"""Alternating timings in one process, so that ratios hold on a machine whose speed changes with its load."""

import functools
import gc
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 5, 400
WARMUP_ROUNDS = 2

Step = Callable[[Callable[[], None]], None]
"""One training step; it calls its argument before the first phase and after each."""

Times = dict[str, list[float]]
"""Phase -> seconds, one entry per round. "step" is all phases together, "host" the time Python took to issue them."""


class CpuClock:
    def __init__(self) -> None:
        self.marks: list[float] = []

    def start(self) -> None:
        self.marks.clear()

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def read(self, phases: int) -> list[list[float]]:
        """Seconds from mark to mark, a list per step."""
        steps = _chunks(self.marks, phases + 1)
        return [[end - start for start, end in itertools.pairwise(step)] for step in steps]


class CudaClock:
    """Events on the stream: a phase is as long as the GPU takes, or as long as the host takes where that is longer."""

    def __init__(self) -> None:
        self.marks: list[torch.cuda.Event] = []

    def start(self) -> None:
        self.marks.clear()
        # Work left over from the previous step would hide how long the host takes.
        torch.cuda.synchronize()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def read(self, phases: int) -> list[list[float]]:
        torch.cuda.synchronize()
        steps = _chunks(self.marks, phases + 1)
        return [[start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(step)] for step in steps]


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def alternate(
    steps: dict[str, Step], phases: tuple[str, ...], device_type: str, seconds: float, repeats: int = 1
) -> tuple[dict[str, Times], float | None]:
    """Run `repeats` steps of every contender per round, in a fresh order each round, for about `seconds`.

    Returns the times, each the mean over the `repeats` steps, which follow each other without waiting for the device,
    as in training; and what other processes took of the CPUs during the rounds (OtherLoad; None for a GPU, whose time
    is its own). The warm-up doesn't count: compilers run in it, in processes of their own.
    """
    clock = CudaClock() if device_type == "cuda" else CpuClock()
    times: dict[str, Times] = {name: {phase: [] for phase in (*phases, "step", "host")} for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for name in order * WARMUP_ROUNDS:
        _run(steps[name], phases, clock, repeats)
    gc.collect()
    gc.disable()
    try:
        with OtherLoad() as others:
            start = time.perf_counter()
            for done in range(MAX_ROUNDS):
                if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                    break
                shuffle(order)
                for name in order:
                    for phase, value in _run(steps[name], phases, clock, repeats).items():
                        times[name][phase].append(value)
    finally:
        gc.enable()
    return times, None if device_type == "cuda" else others.share


def _run(step: Step, phases: tuple[str, ...], clock: CpuClock | CudaClock, repeats: int) -> dict[str, float]:
    clock.start()
    start = time.perf_counter()
    for _ in range(repeats):
        step(clock.mark)
    host = (time.perf_counter() - start) / repeats
    means = [statistics.fmean(values) for values in zip(*clock.read(len(phases)), strict=True)]
    return {**dict(zip(phases, means, strict=True)), "step": sum(means), "host": host}


def replay_seconds(run: Callable[[], None], replays: int) -> list[float]:
    """Seconds of each replay of `run` as a CUDA graph, which does not wait for the host. Call `run` once before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    seconds = []
    for _ in range(replays):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


class OtherLoad:
    """While open, measures other processes' use of the machine's CPUs: `share` in 0 … 1, None where unknown.

    Two threads that wait for each other at every barrier lose far more than that share, and small layers most: figures
    of a loaded machine are not comparable with a quiet machine's, however many rounds went into them.
    """

    share: float | None = None

    def __enter__(self) -> "OtherLoad":
        self.start = cpu_seconds()
        return self

    def __exit__(self, *_) -> None:
        if self.start is not None:
            total, busy, own = (end - start for end, start in zip(cpu_seconds(), self.start, strict=True))
            self.share = round(max(0.0, busy - own) / total, 3) if total else 0.0


def cpu_seconds() -> tuple[float, float, float] | None:
    """CPU seconds of all CPUs since boot, those of them in use, and those of this process; None except on Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    # user nice system idle iowait irq softirq steal; guest time, which follows, is part of user.
    ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    seconds = [tick / os.sysconf("SC_CLK_TCK") for tick in ticks]
    return sum(seconds), sum(seconds) - seconds[3] - seconds[4], time.process_time()


def spread(values: list[float], unit: float = 1.0) -> dict[str, float]:
    """Median, 20th and 80th percentile, in `unit`."""
    quintiles = statistics.quantiles(values, n=5, method="inclusive")
    parts = {"median": statistics.median(values), "p20": quintiles[0], "p80": quintiles[3]}
    return {name: round(value / unit, 4) for name, value in parts.items()}


def ratio(times: Times, base: Times, phase: str) -> dict[str, float]:
    """Spread of the per-round ratios: two steps of one round see the same load, so noise cancels."""
    return spread([a / b for a, b in zip(times[phase], base[phase], strict=True)])


@functools.cache
def copy_bandwidth(nbytes: int, device_type: str) -> float:
    """Bytes read and written per second by copies of buffers of `nbytes`, each last used long ago.

    On a GPU they have at least 64 MiB: issuing a smaller copy takes longer than the copy. One figure per size and run.
    """
    if device_type == "cuda":
        nbytes = max(nbytes, 64 << 20)
    count = max(2, -(-2 * cache_bytes(device_type) // nbytes))
    buffers = [torch.ones(nbytes, dtype=torch.uint8, device=device_type) for _ in range(count)]
    clock = CudaClock() if device_type == "cuda" else CpuClock()
    seconds = []
    while len(seconds) < 7 or sum(seconds) < 0.2:
        clock.start()
        clock.mark()
        for source, destination in zip(buffers, buffers[1:] + buffers[:1], strict=True):
            destination.copy_(source)
        clock.mark()
        seconds.append(clock.read(1)[0][0])
    return 2 * nbytes * count / statistics.median(seconds)


def cache_bytes(device_type: str) -> int:
    """The cache that a step after other layers' steps finds cold: a GPU's L2; on CPUs 4 MiB, two cores' private L2."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device_type == "cuda" else 4 << 20


def saved_bytes(module: torch.nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward` keeps for backward beyond the module's parameters and buffers, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    # The tensors are held until the count is done: a storage freed in between could lend its address to the next.
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    del output
    return sum(size for address, size in storages.items() if address not in own)
