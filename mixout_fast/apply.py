"""apply_mixout: mixout for a whole pretrained model, in place; remove_mixout undoes it.

An nn.Linear becomes a MixLinear and an nn.Embedding a MixEmbedding by a change of its class; every other weight is
mixed where its module reads it (mixed_weight.py). Module and Parameter objects stay the same, so names, hooks, ties
and optimizers remain valid.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixout_fast.dropout_feeds import DROPOUTS, dropout_feeds
from mixout_fast.embedding import MixEmbedding
from mixout_fast.functional import DTYPES, check_backend, check_options, seed_tensor, storage_of
from mixout_fast.linear import MixLinear
from mixout_fast.mixed_weight import PREFIX, MixedWeights, Mixing, unmix_weights
from mixout_fast.uses import (
    OPTIONS,
    Use,
    find_uses,
    join_names,
    lowest_common_module,
    merge_groups,
    resolve_ties,
    siblings,
)

Model = TypeVar("Model", bound=nn.Module)
Probability = float | Callable[[nn.Module, str], float]
HeadRule = tuple[str, float] | None

MIXINGS = (MixLinear, MixEmbedding, Mixing)
NO_TARGET = "the target has no such parameter"
NO_LONGER = "no longer mixed: its layer was replaced since, or its mixout removed"


@dataclass(frozen=True)
class Row:
    """What became of one parameter: `reason` says why it is not mixed; None means that it is."""

    name: str
    kind: str
    p: float | None
    parameters: int
    reason: str | None


@dataclass(frozen=True)
class Report:
    """What apply_mixout did: a row for every parameter (a tied one under each of its names), and the changed Dropouts.

    `dropouts` maps the name of each Dropout whose p was changed to its former p; `dropout` is the new p.
    """

    rows: tuple[Row, ...]
    dropouts: dict[str, float]
    dropout: float = 0.0

    def __str__(self) -> str:
        header = ("parameter", "module", "p", "parameters", "")
        cells = [
            (row.name, row.kind, "" if row.p is None else f"{row.p:g}", f"{row.parameters:,}", row.reason or "mixed")
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        align = (str.ljust, str.ljust, str.rjust, str.rjust, str.ljust)
        lines = [
            "  ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths, strict=True)).rstrip()
            for line in (header, *cells)
        ]
        lines.insert(1, "─" * max(map(len, lines)))
        mixed = sum(row.parameters for row in self.rows if row.reason is None)
        lines.append(f"{mixed:,} of {sum(row.parameters for row in self.rows):,} parameters mixed, ties counted each")
        if self.dropouts:
            former = ", ".join(f"{name} (was {p:g})" for name, p in self.dropouts.items())
            lines.append(f"Dropouts set to {self.dropout:g}: {former}")
        return "\n".join(lines)


@dataclass(frozen=True)
class MixedParameter:
    """A mixed parameter of a model: its name, the Parameter, and the module that holds its p, target and seed."""

    name: str
    parameter: nn.Parameter
    mixing: MixLinear | MixEmbedding | Mixing


def apply_mixout(
    model: Model,
    p: Probability = 0.9,
    *,
    target: nn.Module | Mapping[str, Tensor] | None = None,
    target_dtype: torch.dtype | None = None,
    layers: str = "all",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    head: Mapping[str, HeadRule] | None = None,
    example: Any = None,
    dropout: float | None = None,
    frozen: bool = False,
    share_masks: bool = False,
    mask: str = "input",
    grad_scale: str = "exact",
    backend: str | None = None,
    verbose: bool = False,
) -> Model:
    """Train every weight matrix of a model with mixout (Lee et al. 2020); changes the model in place.

    nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.Conv1d to 3d, nn.MultiheadAttention, Hugging Face's Conv1D, XLNet's
    attention and transformers' stacked experts are mixed, and so are their subclasses. Add your own classes that hold
    weights to `uses.INPUT_DIMS`, and modules that read their children's weights to `uses.READ_PAST`. A weight used in
    several modules (tied) is mixed in all of them, with one mask per forward pass, or in none. In a PEFT LoRA layer, A
    is mixed toward zero: that is mixout of the sum W + BA toward the frozen W. Load the pretrained weights before this
    call, and wrap the model (DDP, FSDP2, torch.compile) after it.

    Args:
        model: the pretrained model. Its module and Parameter objects stay; state_dict keeps its keys.
        p: probability in [0, 1] that an input neuron's weights are replaced by the target's, or a function
            (module, name of the module) -> probability, where 0 leaves the module's weights alone. The number 0 sets
            everything up as another p would, and mixes no weight.
        target: the weights to return to. None: a copy of the present ones. Another model, or a state dict with the
            model's keys: its tensors, not copied where they lie on the parameter's device in its dtype or a smaller
            one. A weight that the target lacks is not mixed, with a warning.
        target_dtype: the dtype to keep the targets in, such as bfloat16 to save memory, where it is smaller than the
            parameter's.
        layers: "all" mixes every weight. "paper" puts mixout in the place of dropout, as in the paper: it mixes the
            weights that a Dropout feeds in model(example), sets those Dropouts' p to 0, and in a transformers model
            mixes the base model only.
        filter_fn: (module, name of the module) -> whether its weights are mixed.
        head: name of a freshly initialised module -> what to do with its weights (the paper's Table 3). None leaves
            them alone; ("mixout", p) mixes them toward their present values, whatever `target` is; ("dropout", p)
            drops out the inputs of the module's nn.Linear layers, in addition to the model's own Dropout before them.
        example: for layers="paper", the model's argument, or a tuple or mapping of arguments. None uses the
            `dummy_inputs` of a transformers model, which are token numbers: models with other inputs need an example.
        dropout: the p to set in every Dropout module; the published code sets 0. None changes only what
            layers="paper" changes.
        frozen: also mix parameters with requires_grad=False.
        share_masks: give layers that read the same x one mask (query, key and value, …: `uses.SIBLINGS`).
        mask, grad_scale, backend: as for `mixout`; a MixEmbedding is computed by PyTorch, whatever the backend.
        verbose: print the report, which `mixout_report(model)` returns.

    Returns:
        model.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes; nothing has been changed then.
    """
    _check_arguments(model, p, target_dtype, layers, filter_fn, head, dropout, mask, grad_scale, backend)
    first_names = {module: name for name, module in model.named_modules()}
    head = {first_names[model.get_submodule(name)]: rule for name, rule in (head or {}).items()}
    uses = find_uses(model, frozen, mask)
    feeds = dropout_feeds(model, _example(model, example)) if layers == "paper" else None
    for use in uses:
        if use.reason is None:
            use.p, use.reason = _choose(use, model, p, filter_fn, head, feeds, mask, grad_scale)
    sources = None if target is None else tensors_of(target)
    for use in uses:
        if use.reason is None:
            use.target, use.reason = _source(use, uses, sources, head)
    ties = resolve_ties(uses)
    mixed = [use for use in uses if use.reason is None]
    if not mixed:
        raise ValueError(_nothing_mixed(uses, filter_fn, sources))
    missing = list({id(use.parameter): use.name for use in uses if use.reason == NO_TARGET}.values())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        warnings.warn(
            f"target: it has no {missing[0]}{more}: not mixed. Leave out by filter_fn or head what it should lack",
            stacklevel=2,
        )
    _own_targets(mixed, uses, target_dtype)

    for use in mixed:
        use.mix(mask, grad_scale, backend)
    for row, use in enumerate(uses):
        if use.reason is None:
            use.mixing.report_row = row
    groups = ties + (siblings(mixed) if share_masks else [])
    for group in merge_groups(groups):
        lowest_common_module(model, group).register_forward_pre_hook(SharedSeed([use.mixing for use in group]))
    for name, rule in head.items():
        if rule is not None and rule[0] == "dropout":
            for module in filter(_takes_dropout, model.get_submodule(name).modules()):
                module.register_forward_pre_hook(InputDropout(rule[1]), with_kwargs=True)
    new_p = {module: 0.0 for use in mixed for module in (feeds or {}).get(id(use.parameter), ())}
    if dropout is not None:
        new_p |= {module: dropout for module in model.modules() if isinstance(module, DROPOUTS)}
    model.mixout_report = Report(tuple(map(_row, uses)), _set_dropouts(model, new_p), float(dropout or 0.0))
    # DDP broadcasts buffers at every forward pass, which targets, being constants, do not need.
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [*ignored, *_target_buffers(model)]
    if verbose:
        print(model.mixout_report)
    return model


def remove_mixout(model: Model) -> Model:
    """Undo apply_mixout: restore the module types and the Dropouts' former p, and keep the trained Parameters.

    `model` may also be a wrapper, such as DDP's or PEFT's, of the model given to apply_mixout; or a part of that model,
    which leaves the report, the Dropouts' p and the other uses of the part's tied weights as they are.

    Raises ValueError for a model without mixout, and where after apply_mixout a layer's forward was replaced, or a
    weight parametrized or pruned.
    """
    applied = [module for module in model.modules() if "mixout_report" in vars(module)]
    if not mixed_parameters(model) and not applied:
        raise ValueError("model: no weight of it is mixed")
    _drop_our_forwards(model)
    targets = [set(_target_buffers(module)) for module in applied]
    for module in list(model.modules()):
        if isinstance(module, (MixLinear, MixEmbedding)):
            del module.target
            for name in OPTIONS:
                vars(module).pop(name, None)
            module.__class__ = nn.Linear if isinstance(module, MixLinear) else nn.Embedding
        elif isinstance(module, MixedWeights):
            unmix_weights(module)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (SharedSeed, InputDropout)):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    for module, names in zip(applied, targets, strict=True):
        now = dict(module.named_modules())
        for name, p in vars(module).pop("mixout_report").dropouts.items():
            if isinstance(now.get(name), DROPOUTS):  # it may have been replaced since
                now[name].p = p
        ignored = vars(module).pop("_ddp_params_and_buffers_to_ignore", [])
        kept = [name for name in ignored if name not in names]
        if kept:
            module._ddp_params_and_buffers_to_ignore = kept
    return model


def _drop_our_forwards(model: nn.Module) -> None:
    """Delete our forward methods where a tool has left them on an instance, which is to have its class's again."""
    for name, module in model.named_modules():
        is_ours = isinstance(module, (MixLinear, MixEmbedding)) or (
            isinstance(module, MixedWeights) and not module.keeps_forward
        )
        if not is_ours or "forward" not in vars(module):
            continue
        if module.forward != MethodType(type(module).forward, module):
            raise ValueError(f"model: the forward of {name or 'the model'} was replaced after apply_mixout; undo that")
        del module.forward


def mixout_report(model: nn.Module) -> Report:
    """Return what apply_mixout did to each parameter; printed, the report is a table.

    `model` may also be a wrapper, such as DDP's or PEFT's, or another module around the model given to apply_mixout.
    Where apply_mixout was given several parts of `model` one by one, the report has the rows of all of them, under
    their names in `model`. A weight whose layer was replaced since is listed as no longer mixed.

    Raises ValueError for a model without mixout.
    """
    parts = {name: _report_now(part) for name, part in model.named_modules() if "mixout_report" in vars(part)}
    if not parts:
        raise ValueError("model: apply_mixout has not been applied to it")
    if len(parts) == 1:
        return next(iter(parts.values()))
    rows = [replace(row, name=join_names(name, row.name)) for name, part in parts.items() for row in part.rows]
    dropouts = {join_names(name, key): p for name, part in parts.items() for key, p in part.dropouts.items()}
    return Report(tuple(rows), dropouts, max(part.dropout for part in parts.values()))


def _report_now(model: nn.Module) -> Report:
    """The model's report, less the layers that are mixed no longer."""
    report = vars(model)["mixout_report"]
    mixings = (module for module in model.modules() if isinstance(module, MIXINGS))
    rows = {vars(mixing).get("report_row") for mixing in mixings}
    current = (
        row if row.reason is not None or number in rows else replace(row, p=None, reason=NO_LONGER)
        for number, row in enumerate(report.rows)
    )
    return replace(report, rows=tuple(current))


def mixed_parameters(model: nn.Module) -> list[MixedParameter]:
    """Every mixed parameter of the model; a tied one under each of its names."""
    found = []
    for module_name, module in model.named_modules():
        if isinstance(module, (MixLinear, MixEmbedding)):
            mixings = {"weight": module}
        elif isinstance(module, MixedWeights):
            mixings = {name: getattr(module, PREFIX + name) for name in module.mixed_names}
        else:
            continue
        for name, mixing in mixings.items():
            full_name = join_names(module_name, name)
            if name not in module._parameters:
                raise ValueError(f"model: {full_name} was parametrized or pruned after apply_mixout; undo that first")
            found.append(MixedParameter(full_name, module._parameters[name], mixing))
    return found


def target_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> target, for every mixed parameter that has one: a valid `target` of apply_mixout.

    Names are those in `model`: pass the model given to apply_mixout, not a wrapper (DDP's add "module."). state_dict
    leaves targets out. Where they cannot be read from the pretrained checkpoint again, save this dict once, beside a
    run's first checkpoint.
    """
    return {mixed.name: mixed.mixing.target for mixed in mixed_parameters(model) if mixed.mixing.target is not None}


class SharedSeed:
    """A forward pre-hook that gives several layers one mask: in training it draws their seed before each forward pass.

    It is registered on the lowest module that contains them all, so activation checkpointing of that module, or of one
    around it, draws the same seed again. While MixoutScheduler draws the seeds (`held`), the hook does nothing.
    """

    def __init__(self, mixings: list[nn.Module]) -> None:
        self.mixings = mixings
        self.held = False

    def __call__(self, module: nn.Module, arguments: tuple) -> None:
        if module.training and not self.held and any(mixing.p for mixing in self._still_mixed()):
            self.draw()

    def draw(self) -> None:
        mixings = self._still_mixed()
        if not mixings:
            return
        first = mixings[0]
        tensor = first.target if first.target is not None else getattr(first, "weight", None)
        seed = seed_tensor(None, None if tensor is None else tensor.device)
        for mixing in mixings:
            mixing.seed = seed

    def _still_mixed(self) -> list[nn.Module]:
        """All but those that remove_mixout, called with a part of the model, has made plain layers."""
        return [mixing for mixing in self.mixings if hasattr(mixing, "p")]


class InputDropout:
    """A forward pre-hook that drops out an nn.Linear's input in training."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        if arguments:
            arguments = (self._dropped(module, arguments[0]), *arguments[1:])
        elif "input" in keywords:
            keywords = keywords | {"input": self._dropped(module, keywords["input"])}
        return arguments, keywords

    def _dropped(self, module: nn.Module, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, module.training)


def _takes_dropout(module: nn.Module) -> bool:
    """Whether head's ("dropout", p) drops out the module's input; nn.MultiheadAttention never calls its out_proj."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _check_arguments(model, p, target_dtype, layers, filter_fn, head, dropout, mask, grad_scale, backend) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}; it takes an nn.Module")
    if not callable(p):
        check_options(p, mask, grad_scale)
    if target_dtype is not None and target_dtype not in DTYPES:
        raise TypeError(f"target_dtype: {target_dtype}; it takes one of {', '.join(map(str, DTYPES))}")
    if layers not in ("all", "paper"):
        raise ValueError(f"layers: {layers!r}; it takes one of all, paper (or use filter_fn)")
    check_backend(backend)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: {type(filter_fn).__name__}; it takes a function (module, name) -> bool, or None")
    if dropout is not None and (not isinstance(dropout, (float, int)) or isinstance(dropout, bool)):
        raise TypeError(f"dropout: {dropout!r} of type {type(dropout).__name__}; it takes a number in [0, 1] or None")
    if dropout is not None and not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: {dropout}; it takes a probability in [0, 1] or None")
    applied = [mixed.name for mixed in mixed_parameters(model)]
    if applied:
        raise ValueError(f"model: mixed already ({applied[0]}, …); call remove_mixout(model) first")
    if head is not None and not isinstance(head, Mapping):
        raise TypeError(f"head: {type(head).__name__}; it takes a mapping of module names to rules")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, rule in (head or {}).items():
        if name not in modules:
            raise ValueError(f"head: {name!r}; the model has no such module")
        if rule is None:
            continue
        if not isinstance(rule, tuple) or len(rule) != 2 or rule[0] not in ("mixout", "dropout"):
            raise ValueError(f'head: {name!r}: {rule!r}; it takes None, ("mixout", p) or ("dropout", p)')
        check_options(rule[1], mask, grad_scale)
        if rule[0] == "dropout" and not any(map(_takes_dropout, modules[name].modules())):
            raise ValueError(f'head: {name!r}: ("dropout", p) needs an nn.Linear in it')


def _choose(use, model, p, filter_fn, head, feeds, mask, grad_scale) -> tuple[float | None, str | None]:
    """(p, None), or (None, why this use is not mixed)."""
    part = _head_of(use, head)
    if filter_fn is not None and not filter_fn(use.module, use.module_name):
        return None, "filter_fn"
    if part is not None:
        rule = head[part]
        if rule is None:
            return None, "head, left alone"
        if rule[0] == "dropout":
            return None, f"head, dropout({rule[1]:g})" if _takes_dropout(use.module) else "head, left alone"
        chosen = rule[1]
    else:
        if feeds is not None and not _in_base_model(model, use.module):
            return None, "outside the base model"
        if feeds is not None and id(use.parameter) not in feeds:
            return None, "no Dropout module feeds it"
        chosen = p(use.module, use.module_name) if callable(p) else p
    check_options(chosen, mask, grad_scale)
    return (None, "p = 0") if part is None and callable(p) and chosen == 0.0 else (float(chosen), None)


def _head_of(use: Use, head: Collection[str]) -> str | None:
    parts = [name for name in head if name == "" or f"{use.module_name}.".startswith(f"{name}.")]
    return max(parts, key=len, default=None)


def _in_base_model(model: nn.Module, module: nn.Module) -> bool:
    base = getattr(model, "base_model", model)
    return base is model or any(module is inner for inner in base.modules())


def _example(model: nn.Module, example: Any) -> Any:
    # The dummy_inputs of every transformers model are token numbers, also where its main input is images or sound.
    if example is None and getattr(model, "main_input_name", None) in getattr(model, "dummy_inputs", ()):
        device = next(model.parameters()).device
        example = {
            name: torch.as_tensor(value, device=device)
            for name, value in model.dummy_inputs.items()
            if value is not None
        }
    if example is None:
        raise ValueError(
            'example: None; layers="paper" takes an argument of the model, or a tuple or mapping of them, such as '
            '{"pixel_values": images}'
        )
    return example


def tensors_of(target: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(target, nn.Module):
        return dict(target.named_parameters(remove_duplicate=False))
    if not isinstance(target, Mapping):
        raise TypeError(f"target: {type(target).__name__}; it takes an nn.Module, a state dict or None")
    return target


def _source(use, uses, sources, head) -> tuple[Tensor | None, str | None]:
    """(the target, or None for zero; None), or (None, why this use is not mixed)."""
    if use.toward_zero:
        return None, None
    if sources is None or _head_of(use, head) is not None:
        return use.parameter.detach(), None
    # A saved state dict may hold a tied weight under one of its names only.
    names = [use.name, *(other.name for other in uses if other.parameter is use.parameter)]
    tensor = next((sources[name] for name in names if name in sources), None)
    if tensor is None:
        return None, NO_TARGET
    return checked_target(use.name, tensor, use.parameter), None


def checked_target(name: str, tensor: Any, parameter: nn.Parameter) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
        got = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"target: {name} is {got}; it takes a floating-point tensor")
    if tensor.shape != parameter.shape:
        raise ValueError(f"target: {name} has shape {tuple(tensor.shape)}; it takes {tuple(parameter.shape)}")
    return tensor.detach()


def _own_targets(mixed: list[Use], uses: list[Use], dtype: torch.dtype | None) -> None:
    """Put each use's target on its parameter's device, copied where it is a weight of the model; tied uses share one.

    A target's dtype is `dtype`, or its own by default, where that is smaller than the parameter's, else the
    parameter's.
    """
    own = {storage_of(use.parameter) for use in uses}
    made: dict[nn.Parameter, Tensor] = {}
    for use in mixed:
        if use.target is None:
            continue
        if use.parameter not in made:
            copy = storage_of(use.target) in own
            held, own_dtype = dtype or use.target.dtype, use.parameter.dtype
            held = held if held.itemsize < own_dtype.itemsize else own_dtype
            made[use.parameter] = use.target.to(use.parameter.device, held, copy=copy)
        use.target = made[use.parameter]


def _set_dropouts(model: nn.Module, new_p: dict[nn.Module, float]) -> dict[str, float]:
    """Set each module's new p; return name -> former p of the modules whose p changed."""
    former = {}
    for name, module in model.named_modules():
        if module in new_p and module.p != new_p[module]:
            former[name], module.p = module.p, new_p[module]
    return former


def _row(use: Use) -> Row:
    p = use.p if use.reason is None else None
    return Row(use.name, use.kind, p, use.parameter.numel(), use.reason)


def _target_buffers(model: nn.Module) -> list[str]:
    """The names of the buffers that hold targets."""
    return [join_names(name, "target") for name, module in model.named_modules() if isinstance(module, MIXINGS)]


def _nothing_mixed(uses: list[Use], filter_fn: Callable | None, sources: Mapping[str, Tensor] | None) -> str:
    candidates = [use for use in uses if use.parameter.dim() >= 2]
    wanted = next((use.name for use in candidates if use.reason == NO_TARGET), None)
    if wanted is not None:
        keys = ", ".join(map(repr, [*sources][:3])) + (", …" if len(sources) > 3 else "")
        return f"target: it has no {wanted} nor another weight to mix; its keys are {keys or 'none'}"
    if filter_fn is not None and candidates:
        names = ", ".join(use.module_name for use in candidates[:8])
        return f"filter_fn: it matches no layer that can be mixed, among {names}{', …' if len(candidates) > 8 else ''}"
    reasons = ", ".join(sorted({f"{use.name}: {use.reason}" for use in candidates})[:8])
    return f"model: nothing to mix ({reasons or 'it has no weight matrix'})"
