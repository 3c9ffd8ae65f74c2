"""A training step of a transformer encoder with dropout, with mixout, with neither: `python -m benchmarks.model_step`.

Models built from a configuration class, of random weights: time and memory do not depend on their values. Forward and
backward only; an optimizer costs all three the same. The three alternate step by step in one process.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from mixout_fast import apply_mixout

BASELINE = "dropout(0.1)"


def bert(layers: int, width: int = 768, heads: int = 12, vocabulary: int = 30522) -> nn.Module:
    """BERT for classification, without dropout, of BERT-base's width unless told."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def variants(model: nn.Module, p: float) -> dict[str, nn.Module]:
    """Copies of the model in training mode: dropout(0.1) everywhere, mixout(p) on the encoder's nn.Linear, nothing."""
    dropped = copy.deepcopy(model)
    for module in dropped.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    mixed = copy.deepcopy(model)
    apply_mixout(mixed, p, filter_fn=lambda module, name: ".encoder." in name and isinstance(module, nn.Linear))
    return {BASELINE: dropped.train(), f"mixout({p:g})": mixed.train(), "none": model.train()}


def step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    model(**batch).loss.backward()


def step_times(models: dict[str, nn.Module], batch: dict[str, Tensor], seconds: float) -> dict[str, list[float]]:
    """Seconds of each model's steps, after a warm-up step of each; a round has a step of each."""
    for model in models.values():
        step(model, batch)
    times: dict[str, list[float]] = {name: [] for name in models}
    names, end = list(models), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[names[0]]) < 3:
        for name in names:
            start = time.perf_counter()
            step(models[name], batch)
            times[name].append(time.perf_counter() - start)
        # Nobody always runs behind the same neighbour, who left the caches as they are.
        names = names[1:] + names[:1]
    return times


def peak_memory(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Most bytes that a step has allocated beyond what it starts with, by the profiler's record of allocations."""
    for parameter in model.parameters():
        parameter.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(model, batch)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def resident(model: nn.Module) -> int:
    """Bytes of parameters and buffers, targets included."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def measure(
    make: Callable[[], nn.Module], batch: dict[str, Tensor], p: float, seconds: float
) -> dict[str, dict[str, float]]:
    """Variant -> median seconds a step, its median ratio to dropout's and to none's, and bytes, the step's and held."""
    models = variants(make(), p)
    times = step_times(models, batch, seconds)

    def ratio(name: str, base: str) -> float:
        return median(ours / theirs for ours, theirs in zip(times[name], times[base], strict=True))

    return {
        name: {
            "seconds": median(times[name]),
            "of dropout": ratio(name, BASELINE),
            "of none": ratio(name, "none"),
            "step bytes": peak_memory(model, batch),
            "held bytes": resident(model),
        }
        for name, model in models.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_step", description=__doc__.splitlines()[0])
    parser.add_argument("--p", type=float, default=0.9)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=30.0, help="of timed steps (30)")
    options = parser.parse_args()
    batch = {
        "input_ids": torch.randint(0, 30522, (options.batch, options.tokens)),
        "labels": torch.randint(0, 2, (options.batch,)),
    }
    results = measure(
        lambda: bert(options.layers, options.width, options.width // 64), batch, options.p, options.seconds
    )
    print(f"{options.layers} layers, width {options.width}, batch {options.batch} x {options.tokens}, fp32, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    print(f"{'':>14}{'s/step':>9}{'of dropout':>12}{'of none':>9}{'step, MB':>10}{'held, MB':>10}")
    for name, row in results.items():
        print(
            f"{name:>14}{row['seconds']:>9.3f}{row['of dropout']:>12.3f}{row['of none']:>9.3f}"
            f"{row['step bytes'] / 1e6:>10.0f}{row['held bytes'] / 1e6:>10.0f}"
        )


if __name__ == "__main__":
    main()
