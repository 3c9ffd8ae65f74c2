"""The uses of a model's parameters: a use is a parameter in one module that holds it, and may read it as a weight.

apply_mixout decides by what is found here: which dimensions number a weight's input neurons, what speaks against
mixing it, which uses are tied, and which modules read the same x.
"""

import itertools
from dataclasses import dataclass

from torch import Tensor, nn

from mixout_fast.embedding import MixEmbedding
from mixout_fast.functional import DTYPES
from mixout_fast.linear import MixLinear, MixOutput
from mixout_fast.mixed_weight import CONV1D, Mixing, mix_weight
from mixout_fast.read_past import READ_PAST

INPUT_DIMS: dict[str, dict[str, tuple[int, ...]]] = {
    "torch.nn.modules.linear.Linear": {"weight": (1,)},
    "torch.nn.modules.sparse.Embedding": {"weight": (0,)},
    "torch.nn.modules.sparse.EmbeddingBag": {"weight": (0,)},
    "torch.nn.modules.conv.Conv1d": {"weight": (1,)},
    "torch.nn.modules.conv.Conv2d": {"weight": (1,)},
    "torch.nn.modules.conv.Conv3d": {"weight": (1,)},
    "torch.nn.modules.activation.MultiheadAttention": {
        "in_proj_weight": (1,),
        "q_proj_weight": (1,),
        "k_proj_weight": (1,),
        "v_proj_weight": (1,),
    },
    CONV1D: {"weight": (0,)},
    "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention": {
        "q": (0,),
        "k": (0,),
        "v": (0,),
        "r": (0,),
        "o": (1, 2),
    },
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": {"gate_up_proj": (1,), "down_proj": (1,)},
}
"""Class -> weight -> the dimensions that number its input neurons: (1,), (0,), or in three dimensions (2,) or (1, 2).

Subclasses are covered. Add your own classes that hold weights directly.
"""

EXPERTS = ("gate_up_proj", "up_proj", "down_proj")
"""Weights of classes that transformers' use_experts_implementation decorates, one per architecture: (expert, out, in),
or transposed (expert, in, out). All experts share a mask: entry k of x, or hidden neuron k, is dropped for all."""

OPTIONS = ("p", "mask", "grad_scale", "distribution", "backend", "seed", "columns", "base_p", "tied", "report_row")
"""Attributes, besides `target`, that MixLinear and MixEmbedding have or that apply_mixout and MixoutScheduler add."""

SIBLINGS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of nn.Linear children that read the same x in Hugging Face models, for share_masks. In cross-attention the
query reads another x than key and value, and shares their mask all the same."""


@dataclass(eq=False)
class Use:
    """A parameter in a module that holds it, and what is to become of it: it is mixed where `reason` is None."""

    module_name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    input_dims: tuple[int, ...]
    kind: str
    reason: str | None = None
    toward_zero: bool = False
    p: float | None = None
    target: Tensor | None = None
    mixing: nn.Module | None = None
    read_past: bool = False
    is_output: bool = False
    tied: bool = False

    @property
    def name(self) -> str:
        return join_names(self.module_name, self.attribute)

    @property
    def is_linear(self) -> bool:
        return type(self.module) is nn.Linear and self._takes_our_class()

    @property
    def is_embedding(self) -> bool:
        return type(self.module) is nn.Embedding and self._takes_our_class()

    def _takes_our_class(self) -> bool:
        """Whether the module can become a MixLinear or MixEmbedding; if not, its weight is mixed where it is read.

        It cannot where another module reads the weight, where a forward on the instance would hide our class's, or
        where our attributes would replace the module's own.
        """
        module = self.module
        own = itertools.chain(vars(module), module._buffers, module._modules)
        return not self.read_past and {"forward", "target", *OPTIONS}.isdisjoint(own)

    def mix(self, mask: str, grad_scale: str, backend: str | None) -> None:
        """Have the module read the mixed weight."""
        module = self.module
        if self.is_linear:
            module.__class__ = MixOutput if self.is_output else MixLinear
            module.set_mixout(None, self.p, mask, grad_scale, "bernoulli", backend)
            module.target = self.target
            if self.tied and self.is_output:
                module.tied = True
            self.mixing = module
        elif self.is_embedding:
            module.__class__ = MixEmbedding
            module.set_mixout(self.target, self.p, mask, grad_scale, columns=self.input_dims == (1,))
            self.mixing = module
        else:
            self.mixing = Mixing(self.target, self.p, self.input_dims, mask, grad_scale, backend)
            mix_weight(module, self.attribute, self.mixing)


def find_uses(model: nn.Module, frozen: bool, mask: str) -> list[Use]:
    """Every use in the model, with the reasons against mixing that lie in the parameter and its module."""
    lora, read_past, outputs = _lora_weights(model), _read_past(model), _output_layers(model)
    uses = []
    for module_name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            input_dims = _input_dims(module, attribute)
            if input_dims not in ((), (0,), (1,)) and not (input_dims in ((2,), (1, 2)) and parameter.dim() == 3):
                raise ValueError(
                    f"INPUT_DIMS: {input_dims!r} for {join_names(module_name, attribute)} of shape "
                    f"{tuple(parameter.shape)}; it takes (0,), (1,), or, of three dimensions, (2,) or (1, 2)"
                )
            use = Use(
                module_name, module, attribute, parameter, input_dims, type(module).__name__,
                toward_zero=parameter in lora[0], read_past=module in read_past, is_output=module in outputs,
            )  # fmt: skip
            use.reason = _why_not(use, frozen, mask, lora)
            uses.append(use)
    return uses


def _why_not(use: Use, frozen: bool, mask: str, lora: tuple[set, set, set]) -> str | None:
    """The reason against mixing that lies in the parameter and its module; None: there is none."""
    module, attribute, parameter, input_dims = use.module, use.attribute, use.parameter, use.input_dims
    lora_a, lora_b, lora_parameters = lora
    if parameter.numel() == 0 and hasattr(parameter, "ds_shape"):
        raise ValueError(
            f"model: {use.name} is partitioned by DeepSpeed's ZeRO-3; call apply_mixout before that, on a "
            "model made outside zero.Init and, with Trainer, before the TrainingArguments"
        )
    if parameter.dim() < 2 or attribute.endswith("bias"):
        return "bias or normalisation"
    if parameter.dtype not in DTYPES:
        return f"dtype {str(parameter.dtype).removeprefix('torch.')}"
    if type(parameter) is not nn.Parameter and not hasattr(parameter, "device_mesh"):
        # Its class multiplies by it in a way of its own (quantised, low-precision); DTensor has a device mesh.
        return f"{type(parameter).__name__}, no plain Parameter"
    if parameter.is_meta:
        raise ValueError(f"model: {use.name} is on the meta device; load its weights first")
    if parameter in lora_parameters:
        return "LoRA of a parameter: PEFT reads it past its layer"
    if parameter in lora_b:
        return "LoRA's B: mixing A toward zero mixes the product"
    if parameter in lora_a and mask == "element":
        return "LoRA's A: an element mask of it is none of the product"
    if not parameter.requires_grad and not frozen:
        return "frozen"
    if not input_dims:
        cls = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"raw parameter: INPUT_DIMS has no {attribute!r} of {cls}"
    if getattr(module, "groups", 1) != 1:
        return "grouped convolution"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes it in place"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and not use.is_embedding:
        return "sparse gradient of a module that is no plain nn.Embedding"
    return None


def _lora_weights(model: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter], set[nn.Parameter | None]]:
    """PEFT's LoRA parameters: (all A, all B, those of bare parameters).

    The last are what target_parameters adapts, with its A and B, and the A and B of nn.MultiheadAttention and
    embeddings.
    """
    a, b, of_parameters = set(), set(), set()
    for module in model.modules():
        if any(cls.__name__ == "LoraLayer" and cls.__module__.startswith("peft.") for cls in type(module).__mro__):
            a.update(module.lora_A.parameters(), module.lora_embedding_A.parameters())
            b.update(module.lora_B.parameters(), module.lora_embedding_B.parameters())
            of_parameters.update(module.lora_embedding_A.parameters(), module.lora_embedding_B.parameters())
            if isinstance(module.get_base_layer(), nn.MultiheadAttention):
                # PEFT adds BA to the weights that the attention reads, out_proj's too, and calls no A and no B.
                for layer in (module, module.get_base_layer().out_proj):
                    of_parameters.update(layer.lora_A.parameters(), layer.lora_B.parameters())
            if hasattr(module, "parameter_name"):
                of_parameters.update(module.lora_A.parameters(), module.lora_B.parameters())
                of_parameters.add(module.get_base_layer()._parameters.get(module.parameter_name))
    return a, b, of_parameters


def _read_past(model: nn.Module) -> set[nn.Module]:
    return {
        part
        for module in model.modules()
        # The variants of PEFT's LoRA are no modules.
        for reader in (module, *getattr(module, "lora_variant", {}).values())
        for cls in type(reader).__mro__
        for name in READ_PAST.get(f"{cls.__module__}.{cls.__qualname__}", ())
        if (child := module._modules.get(name)) is not None
        for part in (child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else (child,))
    }


def _output_layers(model: nn.Module) -> set[nn.Module]:
    """What get_output_embeddings of transformers' models returns; of PEFT's modules_to_save, the copies in it."""
    outputs = set()
    for module in model.modules():
        if not hasattr(type(module), "get_output_embeddings"):
            continue
        try:
            output = module.get_output_embeddings()
        except (AttributeError, NotImplementedError):  # its decoder has none
            continue
        if isinstance(output, nn.Module):
            outputs.update((output, *output._modules.get("modules_to_save", nn.ModuleDict()).children()))
    return outputs


def _input_dims(module: nn.Module, attribute: str) -> tuple[int, ...]:
    for cls in type(module).__mro__:
        dims = INPUT_DIMS.get(f"{cls.__module__}.{cls.__qualname__}", {})
        if attribute in dims:
            return dims[attribute]
    # use_experts_implementation sets both attributes.
    if attribute in EXPERTS and hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
        return (1,) if module.is_transposed else (2,)
    return ()


def resolve_ties(uses: list[Use]) -> list[list[Use]]:
    """Make tied uses alike: all mixed or none, with one p, target and input_dims; return the groups that are mixed."""
    by_parameter: dict[nn.Parameter, list[Use]] = {}
    for use in uses:
        by_parameter.setdefault(use.parameter, []).append(use)
    ties = []
    for tied in by_parameter.values():
        left_out = next((use for use in tied if use.reason is not None), None)
        if len(tied) == 1 or all(use.reason is not None for use in tied):
            continue
        if left_out is not None:
            for use in tied:
                use.reason = use.reason or f"tied to {left_out.name}: {left_out.reason}"
            continue
        # A linear layer saves time only with a mask over its own inputs; an embedding is cheap either way.
        input_dims = next((use.input_dims for use in tied if isinstance(use.module, nn.Linear)), tied[0].input_dims)
        for use in tied:
            use.p, use.target, use.input_dims, use.tied = tied[0].p, tied[0].target, input_dims, True
        ties.append(tied)
    return ties


def siblings(mixed: list[Use]) -> list[list[Use]]:
    """Groups of nn.Linear uses under one parent, with names in one entry of SIBLINGS and the same in_features."""
    groups: dict[tuple, list[Use]] = {}
    for use in mixed:
        parent, _, name = use.module_name.rpartition(".")
        for number, names in enumerate(SIBLINGS):
            if name in names and isinstance(use.module, nn.Linear):
                groups.setdefault((parent, number, use.parameter.shape[1]), []).append(use)
    return [group for group in groups.values() if len(group) > 1]


def merge_groups(groups: list[list[Use]]) -> list[list[Use]]:
    """Merge groups that have a use in common, until none have."""
    merged: list[list[Use]] = []
    for group in groups:
        touching = [other for other in merged if any(use in other for use in group)]
        merged = [other for other in merged if other not in touching]
        merged.append(list(dict.fromkeys(itertools.chain(*touching, group))))
    return merged


def lowest_common_module(model: nn.Module, group: list[Use]) -> nn.Module:
    """The innermost module that contains every use of the group and has a forward of its own."""
    paths = [use.module_name.split(".") if use.module_name else [] for use in group]
    common = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    while True:
        module = model.get_submodule(".".join(common))
        if not common or type(module).forward is not nn.Module.forward:
            return module
        common.pop()


def join_names(module_name: str, name: str) -> str:
    return f"{module_name}.{name}" if module_name else name
