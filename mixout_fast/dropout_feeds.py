"""Which weights a Dropout feeds: layers="paper" of apply_mixout, found by one forward pass."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def dropout_feeds(model: nn.Module, example: Any) -> dict[int, set[nn.Module]]:
    """id of each weight -> the Dropout modules that feed it, in model(example) in eval mode.

    A Dropout feeds a weight if its output reaches the weight's operation through operations without a weight matrix:
    residual sums, normalisation, activations, attention's products. `example` is a tensor, or a tuple or mapping of
    arguments.
    """
    training = {module: module.training for module in model.modules()}
    mode = _Feeds()
    hooks = [module.register_forward_hook(mode.mark) for module in model.modules() if isinstance(module, DROPOUTS)]
    try:
        model.eval()
        with torch.no_grad(), mode:
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, was_training in training.items():
            module.training = was_training
    return mode.feeds


class _Feeds(TorchFunctionMode):
    """Each tensor carries the Dropouts that feed it, in the attribute `fed_by`."""

    def __init__(self) -> None:
        super().__init__()
        self.feeds: dict[int, set[nn.Module]] = {}

    def mark(self, dropout: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        # A separate tensor: in eval mode a Dropout returns its input, which other modules may read too.
        marked = output.view_as(output)
        marked.fed_by = {dropout}
        return marked

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        operands = list(_tensors((*args, *kwargs.values())))
        fed_by = set().union(*(getattr(operand, "fed_by", ()) for operand in operands))
        weights = [operand for operand in operands if isinstance(operand, nn.Parameter) and operand.dim() >= 2]
        for weight in weights if fed_by else ():
            self.feeds.setdefault(id(weight), set()).update(fed_by)
        if fed_by and not weights:
            for tensor in _tensors((result,)):
                tensor.fed_by = fed_by
        return result


def _tensors(values: Iterable) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
