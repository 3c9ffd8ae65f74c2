"""Forward passes that use mix_linear, for modules that multiply by a weight of their own.

mixed_weight.py puts them in the place of the class's own forward. That one would read the mixed weight and multiply by
it, so that backward would compute the full gradient of W', not the kept columns' alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv1d(module: nn.Module, input: Tensor) -> Tensor:
    """Forward of Hugging Face's Conv1D in all cases: so its weight can read as the Parameter, as nn.Linear's does."""
    mixing = module._modules.get("mixing_weight")
    if mixing is None:  # a new instance of the class, which has no Mixing
        return module.plain_class.forward(module, input)
    # A weight tied to an nn.Linear is mixed along that layer's inputs, which are Conv1D's outputs.
    if mixing.mixes() and mixing.mask == "input" and mixing.input_dims == (0,):
        return mixing.linear(input, module.weight, module.bias)
    return F.linear(input, mixing(module.weight).t(), module.bias)


def multihead_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Forward of nn.MultiheadAttention for batched self-attention without need_weights; else it calls the class's."""
    if (
        not _multiplies(module, "in_proj_weight") or need_weights or not query is key is value or query.dim() != 3
        or query.is_nested or module.bias_k is not None or module.add_zero_attn or (is_causal and attn_mask is None)
        or not _fit(module, query, attn_mask, key_padding_mask)
    ):  # fmt: skip
        return module.plain_class.forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    projected = module.mixing_in_proj_weight.linear(query, module._parameters["in_proj_weight"], module.in_proj_bias)
    # (batch, length, 3, heads, head_dim) to three of (batch, heads, length, head_dim)
    projected = projected.unflatten(-1, (3, module.num_heads, -1))
    projected = projected if module.batch_first else projected.transpose(0, 1)
    is_causal = is_causal and key_padding_mask is None
    bias = None if is_causal else _added(attn_mask, projected.dtype)
    if bias is not None and bias.dim() == 3:
        bias = bias.unflatten(0, (-1, module.num_heads))
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, projected.dtype)[:, None, None]
        bias = padding if bias is None else bias + padding
    dropout = module.dropout if module.training else 0.0
    attended = F.scaled_dot_product_attention(*projected.permute(2, 0, 3, 1, 4), bias, dropout, is_causal)
    attended = attended.permute(*((0, 2) if module.batch_first else (2, 0)), 1, 3).flatten(2)
    last = module.out_proj
    if _multiplies(last, "weight"):
        return last.mixing_weight.linear(attended, last._parameters["weight"], last.bias), None
    return F.linear(attended, last.weight, last.bias), None


def _multiplies(module: nn.Module, name: str) -> bool:
    """Whether the module mixes the weight now, as a matrix (out, in)."""
    mixing = module._modules.get(f"mixing_{name}")
    return mixing is not None and mixing.mixes() and mixing.input_dims == (1,)


def _fit(module: nn.Module, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> bool:
    """Whether the masks' dtypes and shapes are right; if not, the class's forward raises or warns."""
    batch, length = x.shape[:2] if module.batch_first else (x.shape[1], x.shape[0])
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    return (
        all(mask.dtype == torch.bool or mask.is_floating_point() for mask in masks)
        and len({mask.dtype for mask in masks}) <= 1
        and (attn_mask is None or attn_mask.shape in ((length, length), (batch * module.num_heads, length, length)))
        and (key_padding_mask is None or key_padding_mask.shape == (batch, length))
    )


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An attention mask as it is added to the scores; True in a boolean mask means left out."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
