"""wdecay(u, λ): weight decay toward a target, λ/2 ‖w - u‖² (Wiese et al. 2017; Lee et al. 2020, section 5)."""

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixout_fast.apply import checked_target, mixed_parameters, tensors_of
from mixout_fast.functional import storage_of


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter decays by default: matrices do, biases and the scales of a normalisation do not."""
    return parameter.dim() >= 2


def wdecay(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    decay: float,
    *,
    target: nn.Module | Mapping[str, Tensor] | float | None = None,
    decoupled: bool = True,
    include: Callable[[str, nn.Parameter], bool] = is_matrix,
) -> RemovableHandle:
    """Make every step of an optimizer decay the model's weights w toward their targets u.

    Decoupled, as in AdamW: w ← w - lr · decay · (w - u) before the step. Coupled, as in Adam or SGD with weight_decay:
    decay · (w - u), the gradient of decay/2 ‖w - u‖², is added to w's gradient. Set the optimizer's own weight_decay to
    0; where both decay the same weights, a warning says so.
    Parameters without a gradient do not decay, as with torch's optimizers. The targets are fixed by this call: move the
    model to its device, and make a MixoutScheduler with `ema`, before it.

    Args:
        optimizer: the optimizer whose steps decay, by its groups' learning rates. GradScaler works, also with an
            optimizer that unscales gradients itself (fused Adam), and so does step(closure).
        model: the model whose weights decay, before or after DDP or torch.compile wraps it, mixed or not.
        decay: λ, at least 0.
        target: None: a mixed parameter's mixout target, and a copy of any other parameter's present value. A model, or
            a state dict with the model's keys: its tensors, copied where they are the model's own. 0.0: ordinary weight
            decay.
        include: (name, parameter) -> whether it decays; by default matrices do, biases and normalisation do not.

    Returns:
        A handle whose remove() undoes it.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: {type(optimizer).__name__}; it takes a torch.optim.Optimizer, before the model")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}; it takes an nn.Module, after the optimizer")
    if not isinstance(decay, (float, int)) or isinstance(decay, bool):
        raise TypeError(f"decay: {decay!r} of type {type(decay).__name__}; it takes a number of 0 or more")
    if not decay >= 0.0:
        raise ValueError(f"decay: {decay!r}; it takes a number of 0 or more")
    if isinstance(target, (int, float)) and target != 0:
        raise ValueError(f"target: {target!r}; the only number it takes is 0")
    # accelerate's wrapper is an Optimizer without an Optimizer's hooks: the optimizer within takes the steps.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    targets = _targets(model, target, include)
    if not _holds_any(optimizer, targets):
        raise ValueError("optimizer: none of its parameters is one of the model's that decay")
    own = [
        group["weight_decay"]
        for group in optimizer.param_groups
        if group.get("weight_decay") and any(w in targets and w.requires_grad for w in group["params"])
    ]
    if own and decay:
        warnings.warn(f"optimizer: its own weight_decay, {own[0]}, decays the same weights toward 0", stacklevel=2)

    @torch.no_grad()
    def decay_weights() -> None:
        # GradScaler leaves unscaling and skipping to optimizers that can do both themselves, such as fused Adam.
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        if not _holds_any(optimizer, targets):
            raise RuntimeError(
                "optimizer: it no longer holds the model's parameters; call wdecay after FSDP2, which shards them, and "
                "not with DeepSpeed's ZeRO, which steps flat copies"
            )
        for group in optimizer.param_groups:
            weights = [weight for weight in group["params"] if weight in targets and weight.grad is not None]
            if not weights:
                continue
            ends = None
            if not isinstance(target, (int, float)):
                ends = [_sharded_as(weight, targets[weight]).to(weight.dtype) for weight in weights]
            if decoupled:
                _decay(weights, ends, float(group["lr"]) * decay)
            else:
                _add_decay_gradient(weights, ends, decay if grad_scale is None else decay * grad_scale.item())

    def before_step(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        named = kwargs.get("closure") is not None
        closure = kwargs["closure"] if named else args[1] if len(args) > 1 else None
        if not callable(closure):
            return decay_weights()
        # The step calls the closure first, and perhaps again. Each call makes new gradients, to which coupled decay is
        # added; decoupled, the weights decay once.
        calls = itertools.count()

        def closure_and_decay() -> Any:
            loss = closure()
            if next(calls) == 0 or not decoupled:
                decay_weights()
            return loss

        if named:
            return args, kwargs | {"closure": closure_and_decay}
        return (args[0], closure_and_decay, *args[2:]), kwargs

    return optimizer.register_step_pre_hook(before_step)


def _holds_any(optimizer: torch.optim.Optimizer, targets: dict[nn.Parameter, Tensor]) -> bool:
    return any(parameter in targets for group in optimizer.param_groups for parameter in group["params"])


def _sharded_as(weight: Tensor, target: Tensor) -> Tensor:
    """The target, as a DTensor sharded like its weight where FSDP2 has sharded that; without communication."""
    if not hasattr(weight, "device_mesh") or hasattr(target, "device_mesh"):
        return target
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(target, weight.device_mesh, weight.placements, src_data_rank=None)


def _decay(weights: list[Tensor], ends: list[Tensor] | None, factor: float) -> None:
    """w ← w - factor · (w - u)"""
    if ends is None:
        torch._foreach_mul_(weights, 1.0 - factor)
    else:
        torch._foreach_lerp_(weights, ends, factor)


def _add_decay_gradient(weights: list[Tensor], ends: list[Tensor] | None, factor: float) -> None:
    """w.grad ← w.grad + factor · (w - u); where w == u the gradient keeps its bits."""
    offsets = weights if ends is None else torch._foreach_sub(weights, ends)
    torch._foreach_add_([weight.grad for weight in weights], offsets, alpha=factor)


def _targets(model: nn.Module, target: Any, include: Callable) -> dict[nn.Parameter, Tensor]:
    """Parameter -> target, for the parameters that decay; for a target of zero, the parameter is a placeholder."""
    named = {name: parameter for name, parameter in model.named_parameters() if include(name, parameter)}
    if not named:
        raise ValueError("include: no parameter of the model decays")
    if isinstance(target, (int, float)):
        return {parameter: parameter for parameter in named.values()}
    if target is None:
        mixed = {m.parameter: m.mixing.target for m in mixed_parameters(model)}
        zero = [name for name, parameter in named.items() if parameter in mixed and mixed[parameter] is None]
        if zero:
            raise ValueError(f"target: None, and {zero[0]} is mixed toward zero; pass targets, or 0, or leave it out")
        return {p: mixed[p] if p in mixed else p.detach().clone() for p in named.values()}
    given = tensors_of(target)
    missing = [name for name in named if name not in given]
    if missing:
        raise ValueError(f"target: it has no {missing[0]}; leave it out by `include`")
    targets = {parameter: checked_target(name, given[name], parameter) for name, parameter in named.items()}
    return {w: u.to(w.device, copy=storage_of(u) == storage_of(w)) for w, u in targets.items()}
