"""How a layer's step spreads over more threads than there are cores: an estimate where no such machine is at hand.

The threads share the cores, and Linux counts each one's CPU time. The busiest thread's is the least that a step takes
on a machine with a core for each; that of all together is what it costs. Not in it: the bandwidth of memory, and what a
core of its own would have in its caches. A thread that waits sleeps, and waking the others falls to the busiest one, of
nn.Linear as of ours.
"""

import argparse
import os
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # read as torch loads

import torch

from benchmarks.contenders import CONTENDERS, Shape, problem
from benchmarks.layer import DTYPES, LayerStep, copies


def cpu_times() -> dict[str, int]:
    """Nanoseconds that each thread of this process has run."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in Path("/proc/self/task").iterdir()}


def busiest_and_all(step: LayerStep, repeats: int) -> tuple[float, float]:
    """Milliseconds of CPU time that a step takes the busiest thread, and all of them."""
    for _ in range(2):
        step(lambda: None)
    before = cpu_times()
    for _ in range(repeats):
        step(lambda: None)
    spent = [(after - before.get(task, 0)) / repeats / 1e6 for task, after in cpu_times().items()]
    return max(spent), sum(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
