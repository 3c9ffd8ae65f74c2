"""MixoutScheduler: p that changes over the steps, masks held for several steps, targets that move."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixout_fast.apply import MixedParameter, SharedSeed, mixed_parameters


@dataclass(eq=False)
class BaseP:
    """The p that apply_mixout set for a weight; its mixing holds the BaseP of the scheduler now in charge."""

    p: float


class MixoutScheduler:
    """Changes a mixed model's p, masks and targets over the steps of training, as a scheduler does the learning rate.

    In the paper, as without a scheduler, p and targets are constant and every forward pass draws a mask.

        scheduler = MixoutScheduler(model, p_factor=lambda step: min(1.0, step / 100))
        optimizer.register_step_post_hook(lambda *_: scheduler.step())

    Args:
        model: a model that apply_mixout has been applied to.
        p_factor: step -> factor of every layer's p, in [0, 1/p]; steps count from 0.
        hold: number of steps that each mask serves. None: a mask for every forward pass.
        ema: after every step each target becomes ema · target + (1 - ema) · weight. The targets are copied first, since
            they may be another model's weights.

    Move the model to its device first: seeds and moving targets stay where they are. Another scheduler made for the
    same model takes this one's place, and starts from the p that apply_mixout set.

    torch.compile compiles again for each new p: let p_factor have few values.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        p_factor: Callable[[int], float] | None = None,
        hold: int | None = None,
        ema: float | None = None,
    ) -> None:
        mixed = mixed_parameters(model)
        if not mixed:
            raise ValueError("model: no weight of it is mixed; call apply_mixout first")
        if p_factor is not None and not callable(p_factor):
            raise TypeError(f"p_factor: {type(p_factor).__name__}; it takes a function step -> factor, or None")
        if hold is not None and (not isinstance(hold, int) or hold < 1):
            raise ValueError(f"hold: {hold!r}; it takes a number of steps, 1 or more")
        if ema is not None and (not isinstance(ema, (float, int)) or not 0.0 <= ema <= 1.0):
            raise ValueError(f"ema: {ema!r}; it takes a number in [0, 1]")
        self.p_factor, self.hold, self.ema = p_factor, hold, ema
        self.steps = 0
        # An earlier scheduler has scaled p and may hold seeds: start from the p that it started from, without seeds.
        self._base_p = [(entry.mixing, BaseP(vars(entry.mixing).get("base_p", entry.mixing).p)) for entry in mixed]
        for mixing, base in self._base_p:
            mixing.base_p, mixing.p, mixing.seed = base, base.p, None
        self._moving = _own_targets(mixed) if ema is not None else {}
        hooks = _shared_seeds(model)
        for hook in hooks:
            hook.held = hold is not None
        self._draws = _draws(hooks, [entry.mixing for entry in mixed]) if hold else []
        for draw in self._draws:
            draw()
        self._set_p()

    def step(self) -> None:
        """Go on to the next step; call this after the optimizer's step.

        Raises RuntimeError after remove_mixout, and where another scheduler has taken this one's place.
        """
        if any(vars(mixing).get("base_p") is not base for mixing, base in self._base_p):
            raise RuntimeError(
                "model: its mixout was removed, and perhaps applied anew, or a further scheduler has taken this one's "
                "place: remove the hook that takes this scheduler's steps, and make a new scheduler if there is none"
            )
        self.steps += 1
        if self._moving:
            torch._foreach_lerp_(
                [target for _, target in self._moving.values()],
                [_whole(parameter.detach()) for parameter, _ in self._moving.values()],
                1.0 - self.ema,
            )
        if self.hold and self.steps % self.hold == 0:
            for draw in self._draws:
                draw()
        self._set_p()

    def state_dict(self) -> dict[str, Any]:
        """The step count, held seeds and moving targets, from which load_state_dict resumes bit for bit."""
        seeds = [mixing.seed for mixing, _ in self._base_p] if self.hold else []
        targets = {name: target for name, (_, target) in self._moving.items()}
        return {"steps": self.steps, "seeds": seeds, "targets": targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what state_dict returned.

        Raises ValueError where the state does not fit the model, or was made with another `hold` or `ema`.
        """
        own = self.state_dict()
        if len(state["seeds"]) != len(own["seeds"]) or set(state["targets"]) != set(own["targets"]):
            raise ValueError(
                f"state: it has {len(state['seeds'])} seeds and {len(state['targets'])} moving targets, this scheduler "
                f"{len(own['seeds'])} and {len(own['targets'])}, or others: make it with the same `hold` and `ema`, of "
                "the same model"
            )
        self.steps = state["steps"]
        for (mixing, _), seed in zip(self._base_p, state["seeds"], strict=False):
            mixing.seed = seed.to(mixing.seed.device)
        for name, (_, target) in self._moving.items():
            target.copy_(state["targets"][name])
        self._set_p()

    def _set_p(self) -> None:
        if self.p_factor is None:
            return
        factor = self.p_factor(self.steps)
        for mixing, base in self._base_p:
            p = base.p * factor
            if not 0.0 <= p <= 1.0:
                raise ValueError(f"p_factor: {factor} at step {self.steps} makes p = {p}, outside [0, 1]")
            mixing.p = float(p)


def _whole(weight: Tensor) -> Tensor:
    """The weight, gathered from all processes where FSDP2 has sharded it: targets are whole."""
    return weight.full_tensor() if hasattr(weight, "device_mesh") else weight


def _own_targets(mixed: list[MixedParameter]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Replace each target by a copy; return name -> (parameter, the copy), with a tied parameter once."""
    own: dict[nn.Parameter, tuple[str, Tensor]] = {}
    for entry in mixed:
        if entry.mixing.target is None:
            continue
        if entry.mixing.target.dtype != entry.parameter.dtype:
            raise ValueError(
                f"ema: the target of {entry.name} is {entry.mixing.target.dtype}; "
                f"it moves in the parameter's dtype, {entry.parameter.dtype}"
            )
        if entry.parameter.shape != entry.mixing.target.shape:
            raise ValueError(
                f"ema: {entry.name} has shape {tuple(entry.parameter.shape)}, its target "
                f"{tuple(entry.mixing.target.shape)}; a weight that DeepSpeed's ZeRO-3 has partitioned cannot move it"
            )
        if entry.parameter not in own:
            own[entry.parameter] = entry.name, entry.mixing.target.clone()
        entry.mixing.target = own[entry.parameter][1]
    return {name: (parameter, target) for parameter, (name, target) in own.items()}


def _shared_seeds(model: nn.Module) -> list[SharedSeed]:
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, SharedSeed)]


def _draws(hooks: list[SharedSeed], mixings: list[nn.Module]) -> list[Callable[[], None]]:
    """Functions that draw the seeds of all layers; layers that share a seed have one function."""
    grouped = {mixing for hook in hooks for mixing in hook.mixings}
    return [hook.draw for hook in hooks] + [SharedSeed([m]).draw for m in mixings if m not in grouped]
