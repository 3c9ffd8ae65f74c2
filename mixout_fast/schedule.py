"""MixoutScheduler: what changes from step to step: p, masks held for several steps, a moving target."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixout_fast.apply import MixedParameter, SharedSeed, mixed_parameters


@dataclass(eq=False)
class BaseP:
    """The p that apply_mixout set for a weight. Its mixing holds that of the scheduler whose steps count."""

    p: float


class MixoutScheduler:
    """Changes a mixed model's p, masks and targets over the steps of training, as a scheduler does the learning rate.

    The paper has p and targets constant and a mask for every forward pass, as without a scheduler.

        scheduler = MixoutScheduler(model, p_factor=lambda step: min(1.0, step / 100))
        optimizer.register_step_post_hook(lambda *_: scheduler.step())

    Args:
        model: one that apply_mixout has been applied to.
        p_factor: step -> factor of every layer's p, in [0, 1/p]; step counts from 0.
        hold: each mask serves this many steps. None: a mask for every forward pass.
        ema: after every step targets become ema · target + (1 - ema) · weight. They are copied first, for they may be
            another model's weights.

    Move the model to its device before: seeds and moving targets stay where they are. A further scheduler of the same
    model takes the place of the one before, and starts from the p that apply_mixout set.

    Under torch.compile a p that changes is a constant that changes: have p_factor take few values.

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
        # A scheduler before this one has scaled p and may hold seeds: this one begins where that one began.
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
        """Go on to the next step: call it after the optimizer's.

        Raises RuntimeError after remove_mixout, and where a further scheduler has taken this one's place.
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
        """Steps, held seeds and moving targets, by which load_state_dict resumes bit for bit."""
        seeds = [mixing.seed for mixing, _ in self._base_p] if self.hold else []
        targets = {name: target for name, (_, target) in self._moving.items()}
        return {"steps": self.steps, "seeds": seeds, "targets": targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is not of such a model's, or of other options."""
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
    """Of all processes' shards, where FSDP2 has spread it: targets are whole."""
    return weight.full_tensor() if hasattr(weight, "device_mesh") else weight


def _own_targets(mixed: list[MixedParameter]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Name -> parameter and a copy of its target, now in its place; a tied parameter once."""
    own: dict[nn.Parameter, tuple[str, Tensor]] = {}
    for entry in mixed:
        if entry.mixing.target is None:
            continue
        if entry.mixing.target.dtype != entry.parameter.dtype:
            raise ValueError(
                f"ema: the target of {entry.name} is {entry.mixing.target.dtype}; "
                f"it moves in the parameter's dtype, {entry.parameter.dtype}"
            )
        if entry.parameter not in own:
            own[entry.parameter] = entry.name, entry.mixing.target.clone()
        entry.mixing.target = own[entry.parameter][1]
    return {name: (parameter, target) for parameter, (name, target) in own.items()}


def _shared_seeds(model: nn.Module) -> list[SharedSeed]:
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, SharedSeed)]


def _draws(hooks: list[SharedSeed], mixings: list[nn.Module]) -> list[Callable[[], None]]:
    """What draws every layer's seed, one for those that share it."""
    grouped = {mixing for hook in hooks for mixing in hook.mixings}
    return [hook.draw for hook in hooks] + [SharedSeed([m]).draw for m in mixings if m not in grouped]
