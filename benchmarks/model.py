"""The model suite, Supplement E of the paper: a finetuning step of BERT with dropout, with mixout and with neither.

A step is forward, backward and AdamW on an RTE-like batch of 32 pairs, 128 tokens each. Weights are random: time does
not depend on them. Every ratio is a method's time over that of dropout(0.1) in the same round, median over rounds.
"""

import argparse
import gc
import itertools
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import timing
from benchmarks.agreement import check_ours, max_error
from benchmarks.bert import SIZES, Classifier, rte_like_batch
from benchmarks.contenders import PublishedMixLinear, why_not_compiled
from benchmarks.encoder import with_dropout, with_mixout
from benchmarks.layer import matmul_precision
from mixout_fast.testing import random_case

BASELINE = "dropout(0.1)"
PHASES = ("forward", "backward", "optimizer")
SOURCES = ("timing", "contenders", "layer", "encoder", "bert", "model")
MODES = ("eager", "compile")
PRECISIONS = ("fp32", "tf32", "bf16")
"""bf16 means autocast: parameters, gradients and AdamW's state stay fp32."""

RTE_STEPS = 3 * -(-2490 // 32)
"""Steps of 3 epochs of RTE's 2490 training pairs in batches of 32."""

# (models, precisions, modes), the most important first: a --budget may end a run early.
CPU_SWEEPS = (
    (("bert-base-4-layers",), ("fp32",), ("eager", "compile")),
    (("minilm", "bert-base-4-layers"), ("fp32", "bf16"), ("eager",)),
)
GPU_SWEEPS = (
    (("bert-large",), ("bf16", "tf32", "fp32"), ("eager",)),
    # Compile time grows with the number of layers: 24 of them in five methods take minutes.
    (("bert-large-4-layers",), ("bf16", "tf32"), ("eager", "compile")),
)
QUICK_SWEEPS = ((("tiny",), ("fp32",), ("eager",)),)

REPEATS = {"cpu": 1, "cuda": 3}
"""Steps per timing: on a GPU the host gets ahead of the device from the second step on."""


def cells(options: argparse.Namespace) -> list[dict]:
    """What to measure: the named models, precisions and modes in every combination, or the set for this device."""
    sweeps = QUICK_SWEEPS if options.quick else GPU_SWEEPS if options.device == "cuda" else CPU_SWEEPS
    if options.models or options.precisions or options.modes:
        models, precisions, modes = sweeps[0]
        sweeps = ((options.models or models, options.precisions or precisions, options.modes or modes),)
    chosen = [
        {"model": model, "precision": precision, "mode": mode}
        for models, precisions, modes in sweeps
        for precision, model, mode in itertools.product(precisions, models, modes)
    ]
    if any(cell["mode"] == "compile" for cell in chosen) and (reason := why_not_compiled(options.device)):
        print(f"without torch.compile: {reason}", file=sys.stderr)
        chosen = [cell for cell in chosen if cell["mode"] != "compile"]
    return list({tuple(cell.values()): cell for cell in chosen}.values())


def wanted(options: argparse.Namespace) -> list[str]:
    probabilities = options.p or (0.7, 0.9)
    published = [f"published({p:g})" for p in sorted(probabilities) if p < 1]  # it divides by 1 - p
    return [BASELINE, "none", *(f"mixout({p:g})" for p in probabilities), *published[-1:]]


def seconds(options: argparse.Namespace) -> float:
    return options.seconds or (1.0 if options.quick else 12.0)


def measure(cell: dict, options: argparse.Namespace) -> dict:
    """Times of a step with every method, their ratios to dropout's, and the time of 3 epochs of RTE."""
    device, compiles = options.device, cell["mode"] == "compile"
    names = wanted(options)
    torch.compiler.reset()
    gc.collect()  # the previous cell's models, whose steps are reference cycles
    plain = pretrained(cell["model"], device)
    batch = rte_like_batch(device)
    with matmul_precision(cell["precision"]):
        check_start(plain, batch, cell["precision"])
        check_layers(plain, cell["precision"], device)
        steps = {name: TrainingStep(method(name)(plain), batch, cell["precision"], compiles) for name in names}
        times, other_load = timing.alternate(steps, PHASES, device, seconds(options), REPEATS[device])
    phases = (*PHASES, "step") + (("host",) if device == "cuda" else ())
    contenders = {
        name: {f"{phase}_ms": timing.spread(times[name][phase], unit=1e-3) for phase in phases} for name in names
    }
    for figures in contenders.values():
        figures["rte_3_epochs_s"] = round(RTE_STEPS * figures["step_ms"]["median"] / 1e3, 1)
    return {
        "rounds": len(times[BASELINE]["step"]),
        "other_load": other_load,
        "contenders": contenders,
        "ratios": {
            name: {phase: timing.ratio(times[name], times[BASELINE], phase) for phase in (*PHASES, "step")}
            for name in names
            if name != BASELINE
        },
        "left_out": {},
    }


class TrainingStep:
    def __init__(self, model: nn.Module, batch: dict[str, Tensor], precision: str, compiles: bool = False) -> None:
        self.model = model.train()
        self.forward = torch.compile(self.loss, fullgraph=True) if compiles else self.loss
        self.batch = batch
        self.labels = torch.arange(len(batch["tokens"]), device=batch["tokens"].device) % 2
        self.precision = precision
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)

    def loss(self) -> Tensor:
        with autocast(self.labels.device.type, self.precision):
            return F.cross_entropy(self.model(**self.batch), self.labels)

    def __call__(self, mark: Callable[[], None]) -> None:
        mark()
        loss = self.forward()
        mark()
        loss.backward()
        mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark()


def autocast(device_type: str, precision: str) -> torch.autocast:
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16")


def pretrained(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return Classifier(SIZES[name])


def method(name: str) -> Callable[[nn.Module], nn.Module]:
    """none, dropout(p), mixout(p) or published(p) -> a function that copies a model into that form."""
    kind, _, p = name.rstrip(")").partition("(")
    forms = {"none": with_dropout, "dropout": with_dropout, "mixout": with_mixout, "published": with_published_mixout}
    return lambda model: forms[kind](model, float(p or 0.0))


def with_published_mixout(model: nn.Module, p: float) -> nn.Module:
    """Like with_mixout, but with the published code's layer."""
    model = with_dropout(model, 0.0)
    for parent in list(model.base_model.modules()):
        for name, linear in parent.named_children():
            if isinstance(linear, nn.Linear):
                layer = PublishedMixLinear(linear.in_features, linear.out_features, device="meta")
                layer.weight, layer.bias, layer.p = linear.weight, linear.bias, p
                layer.register_buffer("target", linear.weight.detach().clone(), persistent=False)
                setattr(parent, name, layer)
    return model


@torch.no_grad()
def check_start(plain: nn.Module, batch: dict[str, Tensor], precision: str) -> None:
    """Raise AssertionError if a mixed model whose weights are still its targets differs from the pretrained one.

    The error of the encoder's last hidden states against fp64 may be at most twice the plain model's.
    """
    few = {name: value[:4] for name, value in batch.items()}
    unregularised = with_dropout(plain, 0.0)
    library, ours = (hidden_states(model, few, precision) for model in (unregularised, with_mixout(plain, 0.9)))
    exact = hidden_states(unregularised.double(), few, "fp64")
    ours_error, library_error = (max_error(states, exact) for states in (ours, library))
    if not ours_error <= 2 * library_error:
        raise AssertionError(
            f"hidden states at the start: error {ours_error:.3g} against fp64, the plain model's {library_error:.3g}"
        )


def check_layers(plain: nn.Module, precision: str, device: str) -> None:
    """Raise AssertionError where a layer of one of the model's sizes, away from its target, is wrong (agreement.py)."""
    compute = torch.bfloat16 if precision == "bf16" else None
    linears = (module for module in plain.base_model.modules() if isinstance(module, nn.Linear))
    for in_features, out_features in {(linear.in_features, linear.out_features) for linear in linears}:
        check_ours(random_case(256, in_features, out_features, p=0.9, compute=compute, device=device))


def hidden_states(model: nn.Module, batch: dict[str, Tensor], precision: str) -> Tensor:
    """The output of the last block in training mode, (batch, length, width)."""
    states = []
    hook = model.base_model.blocks[-1].register_forward_hook(lambda block, inputs, output: states.append(output))
    with autocast(batch["tokens"].device.type, precision):
        model.train()(**batch)
    hook.remove()
    return states[0]
