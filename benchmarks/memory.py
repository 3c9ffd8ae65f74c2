"""The memory suite: bytes saved for backward and peak bytes of a finetuning step, method by method.

The peak includes parameters, gradients, AdamW's state and, for mixout, the targets, but not what was held before there
was a model. On a GPU it is the allocator's. On a CPU it is the process's, so there each method runs in a process of its
own, `python -m benchmarks.memory` (Linux only).
"""

import argparse
import gc
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.bert import SIZES, rte_like_batch
from benchmarks.layer import matmul_precision
from benchmarks.model import BASELINE, PRECISIONS, TrainingStep, method, pretrained

SOURCES = ("timing", "layer", "encoder", "bert", "model", "memory")
PROBABILITIES = (0.1, 0.3, 0.5, 0.7, 0.9)

CPU_MODELS = ("minilm", "bert-base-4-layers")
GPU_MODELS = ("bert-large",)


def cells(options: argparse.Namespace) -> list[dict]:
    models = ("tiny",) if options.quick else GPU_MODELS if options.device == "cuda" else CPU_MODELS
    precisions = ("bf16", "fp32") if options.device == "cuda" else ("fp32",)
    chosen = itertools.product(options.precisions or precisions, options.models or models)
    return [{"model": model, "precision": precision} for precision, model in chosen]


def wanted(options: argparse.Namespace) -> list[str]:
    probabilities = options.p or ((0.9,) if options.quick else PROBABILITIES)
    return [BASELINE, "none", *(f"mixout({p:g})" for p in probabilities)]


def seconds(options: argparse.Namespace) -> float:
    """Measuring time per cell: 0, since nothing here is repeated."""
    return 0.0


def measure(cell: dict, options: argparse.Namespace) -> dict:
    measure_one = measure_method if options.device == "cuda" else in_own_process
    contenders = {name: measure_one(cell["model"], cell["precision"], name, options.device) for name in wanted(options)}
    base = contenders[BASELINE]
    return {
        "contenders": contenders,
        "ratios": {
            name: {kind: round(figures[kind] / base[kind], 4) for kind in base}
            for name, figures in contenders.items()
            if name != BASELINE
        },
        "left_out": {},
    }


def in_own_process(model: str, precision: str, name: str, device: str) -> dict[str, int]:
    arguments = [model, precision, name, device, str(torch.get_num_threads())]
    process = subprocess.run([sys.executable, "-m", "benchmarks.memory", *arguments], capture_output=True, text=True)
    if process.returncode:
        reasons = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise RuntimeError(f"{name}: {reasons[-1]}")
    return json.loads(process.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("precision", choices=PRECISIONS)
    parser.add_argument("method", help="none, dropout(0.1), mixout(0.9), …")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure_method(options.model, options.precision, options.method, options.device)))


def measure_method(model: str, precision: str, name: str, device: str) -> dict[str, int]:
    gpu = device == "cuda"
    gc.collect()
    if gpu:  # cuBLAS allocates its workspace at its first product; it is no method's
        torch.ones(16, 16, device=device).mm(torch.ones(16, 16, device=device))
    before = torch.cuda.memory_allocated() if gpu else process_bytes("VmRSS")
    step = TrainingStep(method(name)(pretrained(model, device)), rte_like_batch(device), precision)
    with matmul_precision(precision):
        step(lambda: None)
        torch.cuda.reset_peak_memory_stats() if gpu else reset_process_peak()
        # The first step creates AdamW's state; the second is like all later ones.
        step(lambda: None)
        peak = torch.cuda.max_memory_allocated() if gpu else process_bytes("VmHWM")
        return {"saved_bytes": timing.saved_bytes(step.model, step.loss), "peak_bytes": peak - before}


def process_bytes(field: str) -> int:
    """What this process holds (VmRSS), or held at most since reset_process_peak (VmHWM)."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def reset_process_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
