"""Finetune a pretrained encoder on real sentences with dropout and with mixout: `python -m benchmarks.finetune`.

All methods train at once, one step of each in rotation on the same batch, so that other load on the machine affects all
methods alike and the ratios of their times hold.
"""

import argparse
import json
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mixout_fast
from benchmarks import data, report
from benchmarks.encoder import Pretrained, distance, linear_weights, with_dropout, with_mixout
from benchmarks.environment import backend_name, cpu_model
from benchmarks.finetune_plot import plot
from benchmarks.model import BASELINE
from benchmarks.records import RESULTS
from benchmarks.run import probability

EVALUATION_BATCH = 100


@dataclass
class Result:
    """One method's measurements: scores and distances per restart, times over all steps of all restarts."""

    method: str
    seconds: float
    ratio: float
    scores: list[float]
    distances: list[float]


class Run:
    """One method's model in training, its optimizer, and its own stream of random numbers."""

    def __init__(self, model: nn.Module, lr: float, steps: int, seed: int) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_then_linear_decay(steps))
        self.seconds: list[float] = []
        torch.manual_seed(seed)
        self.random_state = torch.get_rng_state()

    def step(self, batch: dict[str, Tensor]) -> None:
        # Each run keeps its own random state: its result does not depend on which other methods train beside it.
        torch.set_rng_state(self.random_state)
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.random_state = torch.get_rng_state()


def warmup_then_linear_decay(steps: int, warmup_share: float = 0.1) -> Callable[[int], float]:
    warmup = max(1, round(warmup_share * steps))
    return lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def training_batches(pretrained: Pretrained, train: data.Examples, size: int, epochs: int, seed: int) -> list[dict]:
    order = random.Random(seed)
    batches = []
    for _ in range(epochs):
        rows = order.sample(range(len(train)), len(train))
        batches += [pretrained.batch(train, rows[start : start + size]) for start in range(0, len(rows), size)]
    return batches


@torch.inference_mode()
def dev_score(model: nn.Module, pretrained: Pretrained, task: data.Task) -> float:
    model.eval()
    # Batches of sentences of similar length need less padding.
    rows = sorted(range(len(task.dev)), key=lambda row: len(task.dev.first[row]))
    predictions = torch.empty(len(rows))
    for start in range(0, len(rows), EVALUATION_BATCH):
        chunk = rows[start : start + EVALUATION_BATCH]
        batch = pretrained.batch(task.dev, chunk)
        batch.pop("labels")
        logits = model(**batch).logits
        predictions[chunk] = logits[:, 0] if task.classes == 1 else logits.argmax(1).float()
    return task.score(predictions)


def finetune(pretrained: Pretrained, task: data.Task, options: argparse.Namespace) -> list[Result]:
    """Train every method from the same `restarts` seeds: for the head, the sentences' order and random numbers."""
    methods: dict[str, Callable[[nn.Module], nn.Module]] = {BASELINE: lambda model: with_dropout(model, 0.1)}
    if options.plain:
        methods["no regulariser"] = lambda model: with_dropout(model, 0.0)
    for p in options.p:
        methods[f"mixout({p:g})"] = lambda model, p=p: with_mixout(model, p)
    seconds = {method: [] for method in methods}
    scores = {method: [] for method in methods}
    distances = {method: [] for method in methods}

    steps = options.epochs * -(-len(task.train) // options.batch)
    # A log file wants few lines, a terminal a live bar.
    interval = 0.2 if sys.stderr.isatty() else 15.0
    total = options.restarts * steps * len(methods)
    with tqdm(total=total, unit="step", smoothing=0.05, mininterval=interval, dynamic_ncols=True) as progress:
        for seed in range(options.restarts):
            start = pretrained.model(seed)
            runs = {method: Run(make(start), options.lr, steps, seed) for method, make in methods.items()}
            progress.set_description(f"restart {seed + 1} of {options.restarts}", refresh=False)
            batches = training_batches(pretrained, task.train, options.batch, options.epochs, seed)
            train_in_rotation(list(runs.values()), batches, progress)
            for method, run in runs.items():
                seconds[method] += run.seconds
                scores[method].append(dev_score(run.model, pretrained, task))
                distances[method].append(distance(linear_weights(run.model), linear_weights(start)))
    return [
        Result(method, median(times), ratio(times, seconds[BASELINE]), scores[method], distances[method])
        for method, times in seconds.items()
    ]


def train_in_rotation(runs: list[Run], batches: list[dict], progress: tqdm) -> None:
    for number, batch in enumerate(batches):
        # The first in the rotation changes too: no method always finds the caches as the same other method left them.
        first = number % len(runs)
        for run in runs[first:] + runs[:first]:
            run.step(batch)
            progress.update()


def ratio(times: list[float], baseline: list[float]) -> float:
    """The median over steps of the time divided by the baseline's on the same batch, a moment apart."""
    return median(time / base for time, base in zip(times, baseline, strict=True))


def settings(pretrained: Pretrained, task: data.Task, options: argparse.Namespace) -> dict[str, str]:
    """What the figures hold for, in words."""
    return {
        "model": pretrained.name,
        "data": f"{task.name}: {len(task.train)} training and {len(task.dev)} dev examples",
        "training": f"{counted(options.epochs, 'epoch')}, batch {options.batch}, at most {options.max_tokens} tokens, "
        "AdamW, linear decay, fp32",
        "learning rate": f"{options.lr:g}",
        "machine": f"{cpu_model()}, {torch.get_num_threads()} threads, mixout_fast's {backend_name('cpu')} backend",
        "versions": f"mixout_fast {mixout_fast.__version__}, torch {torch.__version__}, "
        f"transformers {version('transformers')}, Python {platform.python_version()}",
        "command": shlex.join(["python", "-m", "benchmarks.finetune", *sys.argv[1:]]),
    }


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__.splitlines()[0])
    parser.add_argument("--p", type=probability, nargs="+", default=[0.7, 0.9], help="mixout probabilities (0.7 0.9)")
    parser.add_argument("--plain", action="store_true", help="train without any regulariser too")
    parser.add_argument("--data", choices=["rated", *data.GLUE], default="rated", help="rated sentences, or GLUE")
    parser.add_argument("--source", choices=data.RATED, default="movie", help="which rated sentences (movie)")
    parser.add_argument("--task", choices=["classification", "regression"], default="classification")
    parser.add_argument("--model", help="a model on the Hugging Face hub or a folder, in place of the packaged one")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (1e-3)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--train-size", type=int, help="training examples (rated: 500, GLUE: all)")
    parser.add_argument("--dev-size", type=int, help="dev examples (rated: 1000, GLUE: all)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 restart, 1 epoch, 96 sentences")
    parser.add_argument("--out", type=Path, help="where the PNG goes, its JSON beside it")
    options = parser.parse_args()
    if options.quick:
        options.restarts, options.epochs, options.train_size, options.dev_size = 1, 1, 96, 100
    if options.out is None:
        options.out = RESULTS / ("finetune-quick.png" if options.quick else "finetune.png")
    return options


def load_task(options: argparse.Namespace) -> data.Task:
    if options.data in data.GLUE:
        return data.glue(options.data, options.train_size, options.dev_size)
    return data.rated_sentences(options.source, options.task, options.train_size or 500, options.dev_size or 1000)


def main() -> None:
    options = parse_arguments()
    try:
        task = load_task(options)
        pretrained = Pretrained(options.model, task.classes, options.max_tokens)
    except RuntimeError as error:
        sys.exit(str(error))
    described = settings(pretrained, task, options)
    print("\n".join(f"{key:>13}: {text}" for key, text in described.items()), flush=True)

    results = finetune(pretrained, task, options)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot(results, task, described, options.out)
    record = {**described, "metric": task.metric, "chance": task.chance, "results": [asdict(r) for r in results]}
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{report.finetune_table(record)}\n")
    print("Ratio to dropout: median over the steps, each against dropout's step on the same batch.")
    print(f"Always giving the same answer scores {task.chance:.3f}.")
    print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()
