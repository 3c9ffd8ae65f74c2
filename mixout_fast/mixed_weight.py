"""Mixing a weight where it is read: of convolutions, attention's projections, experts, and raw parameters.

The class of the module that holds the weight is replaced by a subclass in which the parameter's name is a property:
reading it gives the mixed weight in training, computed at each reading, and the Parameter in eval mode.
torch.nn.utils.parametrize works like this too, but the Parameter stays in place here, under its name. parametrize
moves it to `parametrizations.weight.original`, which changes the keys of state_dict and the names by which optimizers,
PEFT and transformers find parameters; its modules cannot be pickled; and removing a parametrization from a deep copy
breaks the original (both share the class from which the property is deleted).

nn.MultiheadAttention and GPT-2's Conv1D also get a forward pass of ours (forwards.py); Conv1D's weight then needs no
property.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mixout_fast import forwards
from mixout_fast.functional import mix_linear, mixout

PREFIX = "mixing_"
"""A mixed parameter `weight` has its Mixing in the child module `mixing_weight`."""

CONV1D = "transformers.pytorch_utils.Conv1D"
"""Hugging Face's linear layer with a weight (in, out), which GPT-2 and its kin use."""

FORWARDS = {
    CONV1D: (forwards.conv1d, ("weight",)),
    "torch.nn.modules.activation.MultiheadAttention": (forwards.multihead_attention, ()),
}
"""Class -> the forward that replaces its own, also in subclasses that inherit that one, and the weights that only the
new forward reads: these get no property and read as the plain Parameter."""


class Mixing(nn.Module):
    """Mixes one weight of its parent module: weight -> W' in training, the weight itself in eval mode.

    Every reading of the weight draws a mask, as every call of MixLinear does, unless `seed` is set.
    `input_dims` are the weight's dimensions that number its input neurons: (1,) for (out, in, …), (0,) for (in, …),
    (2,) for (expert, out, in) and (1, 2) for (out, in, in). `p`, `mask`, `grad_scale`, `backend` and `seed` are as for
    `mixout_fast.mixout` and may be reassigned; `target` is a non-persistent buffer of the weight's shape, or None for
    zero.
    """

    target: Tensor | None

    def __init__(
        self,
        target: Tensor | None,
        p: float,
        input_dims: tuple[int, ...],
        mask: str,
        grad_scale: str,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.p = p
        self.input_dims = input_dims
        self.mask = mask
        self.grad_scale = grad_scale
        self.backend = backend
        self.seed: int | Tensor | None = None
        self.register_buffer("target", target, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.mixes() or self._sharded(weight):
            return weight
        mixed = mixout(
            self._numbered(weight),
            None if self.target is None else self._numbered(self.target),
            self.p,
            True,
            mask=self.mask,
            grad_scale=self.grad_scale,
            # SharedSeed draws on the default device where it finds no tensor that tells the layers' device.
            seed=self.seed.to(weight.device) if isinstance(self.seed, Tensor) else self.seed,
            backend=self.backend,
        )
        return mixed.view(weight.shape)

    def mixes(self) -> bool:
        """Whether the weight is mixed now: in training, with p above 0."""
        return self.training and self.p != 0.0

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W'ᵀ + bias for a weight (out, in); x W' + bias for a weight (in, out), with the input mask only."""
        weight, target = (t.t() if t is not None and self.input_dims == (0,) else t for t in (weight, self.target))
        return mix_linear(
            input,
            weight,
            target,
            bias,
            self.p,
            mask=self.mask,
            grad_scale=self.grad_scale,
            seed=self.seed,
            backend=self.backend,
        )

    def _sharded(self, weight: Tensor) -> bool:
        """Whether the weight is the shard that FSDP2 reads between forward passes; for forward it gathers the weight.

        FSDP2 leaves buffers whole; code that distributes a module to multiply by DTensors distributes its buffers too.
        """
        return hasattr(weight, "device_mesh") and not hasattr(self.target, "device_mesh")

    def _numbered(self, weight: Tensor) -> Tensor:
        """A view of the weight whose dimension 1 numbers the input neurons, as mixout expects."""
        if self.input_dims == (0,):
            return weight.unsqueeze(0)
        if self.input_dims == (2,):
            return weight.flatten(0, 1)
        return weight if self.input_dims == (1,) else weight.flatten(1)

    def extra_repr(self) -> str:
        target = "zero" if self.target is None else "tensor"
        return f"p={self.p}, mask={self.mask!r}, input_dims={self.input_dims}, target={target}"


class MixedWeights:
    """First base of every class that mix_weight makes; pickles and copies instances, whose class no import finds."""

    plain_class: type[nn.Module]
    mixed_names: tuple[str, ...]
    keeps_forward: bool

    def __reduce_ex__(self, protocol: Any) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.plain_class, self.mixed_names, self.keeps_forward), *state


def mix_weight(module: nn.Module, name: str, mixing: Mixing) -> None:
    """Make the module read its parameter `name` through `mixing`."""
    names = module.mixed_names if isinstance(module, MixedWeights) else ()
    plain_class = module.plain_class if names else type(module)
    module.add_module(PREFIX + name, mixing.train(module.training))
    # A forward on the instance calls the plain class's and not ours; that one reads the weight through the property.
    keeps_forward = "forward" in vars(module) or _forward_for(plain_class) is None
    module.__class__ = _mixed_class(plain_class, (*names, name), keeps_forward)


def _forward_for(plain_class: type[nn.Module]) -> tuple[Callable, tuple[str, ...]] | None:
    """The entry of FORWARDS for a class, unless a subclass overrides the forward or other code has replaced it."""
    for cls in plain_class.__mro__:
        found = FORWARDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if found and plain_class.forward is cls.forward and cls.forward.__module__ == cls.__module__:
            return found
    return None


def unmix_weights(module: nn.Module) -> None:
    """Undo every mix_weight of a module."""
    for name in module.mixed_names:
        # Without base_p a MixoutScheduler knows that the mixing is gone.
        vars(module._modules.pop(PREFIX + name)).pop("base_p", None)
    module.__class__ = module.plain_class


@functools.cache
def _mixed_class(plain_class: type[nn.Module], names: tuple[str, ...], keeps_forward: bool) -> type[nn.Module]:
    attributes = {"plain_class": plain_class, "mixed_names": names, "keeps_forward": keeps_forward}
    attributes["__module__"] = plain_class.__module__
    plain = ()
    if not keeps_forward:
        attributes["forward"], plain = _forward_for(plain_class)
    for name in set(names).difference(plain):
        attributes[name] = property(functools.partial(_read, name), functools.partial(_refuse_tensor, name))
    # Named like the plain class: transformers writes the class's name into a saved model's configuration.
    return type(plain_class.__name__, (MixedWeights, plain_class), attributes)


def _read(name: str, module: nn.Module) -> Tensor:
    # During a forward pass PEFT takes away a parameter that it adapts, and asks whether the attribute is there.
    if name not in module._parameters:
        raise AttributeError(name)
    mixing = module._modules.get(PREFIX + name)
    if mixing is None:  # a new instance of the class, which has no Mixing
        return module._parameters[name]
    try:
        return mixing(module._parameters[name])
    except AttributeError as error:
        # After an AttributeError in a property Python calls nn.Module.__getattr__, which returns the plain Parameter.
        raise RuntimeError(f"{PREFIX + name}: {error}") from error


def _refuse_tensor(name: str, module: nn.Module, value: Any) -> None:
    """Refuse to set what is no Parameter; nn.Module sets Parameters without this function."""
    raise AttributeError(
        f"{name}: a {type(value).__name__} in place of a Parameter that {type(module).__name__} mixes on reading; "
        "use DDP, not nn.DataParallel, and fully_shard (FSDP2), not FullyShardedDataParallel; call apply_mixout after "
        "PEFT, not before it; or leave the layer out"
    )


def _new(plain_class: type[nn.Module], names: tuple[str, ...], keeps_forward: bool) -> nn.Module:
    mixed_class = _mixed_class(plain_class, names, keeps_forward)
    return mixed_class.__new__(mixed_class)
