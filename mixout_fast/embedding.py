"""MixEmbedding: nn.Embedding with mixout, at the cost of the rows that are looked up."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixout_fast import reference
from mixout_fast.functional import check_options, seed_tensor


class MixEmbedding(nn.Embedding):
    """nn.Embedding whose training output is that of the mixed table W' = mixout(weight, target, p).

    An embedding is a linear layer fed by one-hot vectors, so its input neurons are the rows of the table: with the
    input mask a row is kept or replaced as a whole, wherever it occurs in the batch (Lee et al. 2020, section 3). A
    table tied to an nn.Linear is mixed as that layer reads it: with one mask entry per column (`columns`). Only rows
    that are looked up are mixed; the reference's bound on the number of kept entries (exceeded with a probability below
    1e-8 a draw) is not applied to rows.

    `mixout_fast.apply_mixout` turns an nn.Embedding into a MixEmbedding in place. `p`, `mask`, `grad_scale` and `seed`
    are as for `mixout_fast.mixout` and may be reassigned; `target` is a non-persistent buffer, None for zero.

    Shapes: input integer (…) -> (…, embedding_dim), in the weight's dtype. Backend: PyTorch, on any device.
    """

    target: Tensor | None

    def set_mixout(self, target: Tensor | None, p: float, mask: str, grad_scale: str, columns: bool) -> None:
        """Set the attributes of a module that was constructed as an nn.Embedding; the caller has checked them."""
        self.p = p
        self.mask = mask
        self.grad_scale = grad_scale
        self.columns = columns
        self.seed: int | Tensor | None = None
        self.register_buffer("target", target, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        if not self.training:
            return rows
        check_options(self.p, self.mask, self.grad_scale)
        if self.p == 0.0:
            return rows
        if self.target is not None and self.target.shape != self.weight.shape:
            raise ValueError(
                f"target: shape {tuple(self.target.shape)}, weight has {tuple(self.weight.shape)}; they must be equal: "
                "resize the table before apply_mixout"
            )
        scale = reference.scale(self.p)
        w = rows.to(reference.compute_dtype(rows.dtype))
        u = torch.zeros_like(w) if self.target is None else F.embedding(input, self.target).to(w.dtype)
        keep = self._kept(input)
        mixed = torch.where(keep, u + (w - u) * scale, u)
        if self.grad_scale == "paper":
            mixed = WithGradientOf.apply(mixed.detach(), torch.where(keep, w, torch.zeros_like(w)))
        return mixed.to(rows.dtype)

    def _kept(self, input: Tensor) -> Tensor:
        """The kept entries of the rows looked up, as bool that broadcasts against (…, embedding_dim)."""
        seed = seed_tensor(self.seed, self.weight.device)
        if self.mask == "input" and self.columns:
            return reference.keep_mask(seed, self.weight.shape, self.p, "input")
        index = input.long().unsqueeze(-1)
        if self.mask == "element":
            index = index * self.embedding_dim + torch.arange(self.embedding_dim, device=input.device)
        return words_at(seed, index) >= reference.threshold(self.p)

    def extra_repr(self) -> str:
        target = "zero" if self.target is None else "tensor"
        return f"{super().extra_repr()}, p={self.p}, mask={self.mask!r}, target={target}"


class WithGradientOf(torch.autograd.Function):
    """(values, other) -> values, with the gradient of `other`.

    This gives the published code's unscaled gradient without scaling and then dividing, which would round twice, and
    overflow in fp16.
    """

    @staticmethod
    def forward(ctx, values, other):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def words_at(seed: Tensor, index: Tensor) -> Tensor:
    """reference.mask_words for any entries: int64 index (…) -> words, int64 (…)."""
    return reference.counter_words(seed, index >> 2).gather(-1, (index & 3).unsqueeze(-1)).squeeze(-1)
