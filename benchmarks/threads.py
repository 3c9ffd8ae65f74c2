"""Estimate how a layer's step would scale to more cores than this machine has, from the CPU time of its threads.

The threads share the cores, and Linux counts the CPU time of each. The busiest thread's CPU time is the least that a
step takes on a machine with a core for every thread; the sum over all threads is what the step costs. The estimate
leaves out memory bandwidth, and the caches that a thread would have to itself. Waiting threads sleep, and waking them
is counted in the busiest thread's time, for nn.Linear as for ours.
"""

import argparse
import os
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # read as torch loads

import torch

from benchmarks.contenders import CONTENDERS, Shape, problem
from benchmarks.layer import DTYPES, LayerStep, copies


def cpu_times() -> dict[str, int]:
    """Nanoseconds of CPU time that each thread of this process has used."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in Path("/proc/self/task").iterdir()}


def busiest_and_all(step: LayerStep, repeats: int) -> tuple[float, float]:
    """Milliseconds of CPU time that a step costs the busiest thread, and all threads together."""
    for _ in range(2):
        step(lambda: None)
    before = cpu_times()
    for _ in range(repeats):
        step(lambda: None)
    spent = [(after - before.get(task, 0)) / repeats / 1e6 for task, after in cpu_times().items()]
    return max(spent), sum(spent)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.threads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["2048x768x768", "1024x1024x4096", "128x768x768"])
    parser.add_argument("--p", type=float, nargs="+", default=[0.9, 0.1])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    print("                                 busiest thread, ms       all threads, ms")
    print("shape           p   dtype threads   Linear ours ratio      Linear ours ratio")
    for dtype in options.dtypes:
        for shape in options.shapes:
            for p in options.p:
                case = problem(Shape.parse(shape), p, DTYPES[dtype])
                steps = [LayerStep(CONTENDERS[name], case, copies(case)) for name in ("linear", "ours")]
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    measured = [busiest_and_all(step, options.repeats) for step in steps]
                    (linear, all_of_linear), (ours, all_of_ours) = measured
                    print(
                        f"{shape:15} {p:.1f} {dtype:5} {threads:7} {linear:8.2f} {ours:7.2f} {ours / linear:5.2f}"
                        f"  {all_of_linear:10.2f} {all_of_ours:7.2f} {all_of_ours / all_of_linear:5.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
