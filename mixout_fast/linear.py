"""MixLinear: nn.Linear whose weight is mixed with its target at every training step."""

import torch
from torch import Tensor, nn

from mixout_fast.functional import check_backend, check_options, mix_linear, mixout, storage_of


class MixLinear(nn.Linear):
    """A drop-in nn.Linear with mixout (Lee, Cho, Kang, ICLR 2020).

    In training y = x W'ᵀ + b with W' = mixout(weight, target, p); in eval mode, or at p = 0, it is nn.Linear. Its
    state_dict has nn.Linear's keys; `target` is a non-persistent buffer that follows `.to()` and is None for zero.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        target: (out_features, in_features) tensor, the pretrained weight, held as a constant; None means zero. It is
            copied only where its device or dtype differs from the weight's, or where it is the layer's own weight. To
            hold a target in a smaller dtype, assign it to the attribute `target`.
        p: probability in [0, 1] that an input neuron's weights are replaced by the target's. The attribute may be
            reassigned, and so may `seed`: None draws a mask per call, an int or a 0-d int64 tensor on the weight's
            device determines the mask.
        mask, grad_scale, distribution, backend: as for `mixout_fast.mixout`.

    Shapes: input (…, in_features) -> (…, out_features).

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    target: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        target: Tensor | None = None,
        p: float = 0.0,
        *,
        mask: str = "input",
        grad_scale: str = "exact",
        distribution: str = "bernoulli",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        if isinstance(bias, Tensor):
            raise TypeError("bias: Tensor; it takes True or False (target is the fourth argument)")
        check_options(p, mask, grad_scale, distribution)
        check_backend(backend, distribution)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.set_mixout(target, p, mask, grad_scale, distribution, backend)

    def set_mixout(self, target, p, mask, grad_scale, distribution, backend) -> None:
        """Set the attributes that nn.Linear lacks; the target is checked here, the options by the caller."""
        if target is not None:
            if not isinstance(target, Tensor):
                raise TypeError(f"target: {type(target).__name__}; it takes a tensor or None")
            if not target.is_floating_point():
                raise TypeError(f"target: dtype {target.dtype}; it takes a floating-point tensor")
            if target.shape != self.weight.shape:
                raise ValueError(
                    f"target: shape {tuple(target.shape)}; it takes {tuple(self.weight.shape)}, "
                    "(out_features, in_features)"
                )
            if self.weight.is_meta:
                raise ValueError(
                    "target: the layer is on the meta device, where a target has no values, and none is loaded later; "
                    "load the weights first, then call from_linear or apply_mixout"
                )
            own = storage_of(target) == storage_of(self.weight)
            target = target.detach().to(self.weight.device, self.weight.dtype, copy=own)
        self.p = float(p)
        self.mask = mask
        self.grad_scale = grad_scale
        self.distribution = distribution
        self.backend = backend
        self.seed: int | Tensor | None = None
        self.register_buffer("target", target, persistent=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        p: float,
        target: Tensor | None = None,
        *,
        mask: str = "input",
        grad_scale: str = "exact",
        distribution: str = "bernoulli",
        backend: str | None = None,
    ) -> "MixLinear":
        """A MixLinear with the Parameter objects and the training mode of `linear`; hooks are not carried over.

        The parameters are the same objects, so optimizers and tied weights stay valid. `target=None` takes a copy of
        the present weight, the usual w_pre; for dropout of weights pass zeros. p, mask, grad_scale, distribution and
        backend are MixLinear's.

        Raises:
            TypeError, ValueError: as MixLinear; TypeError also where `linear` is no nn.Linear or has a forward of its
                own.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: {type(linear).__name__}; it takes an nn.Linear")
        if type(linear).forward not in (nn.Linear.forward, MixLinear.forward):
            raise TypeError(
                f"linear: {type(linear).__name__}, which has a forward of its own; apply_mixout mixes what that reads"
            )
        check_options(p, mask, grad_scale, distribution)
        check_backend(backend, distribution)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        target = linear.weight.detach().clone() if target is None else target
        layer.set_mixout(target, p, mask, grad_scale, distribution, backend)
        return layer

    def to_linear(self) -> nn.Linear:
        """The plain nn.Linear with the same Parameter objects and training mode."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self._parameters["weight"], self.bias
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return self._multiply(input, self.weight)

    def _multiply(self, input: Tensor, weight: Tensor) -> Tensor:
        return mix_linear(
            input,
            weight,
            self.target,
            self.bias,
            self.p,
            mask=self.mask,
            grad_scale=self.grad_scale,
            distribution=self.distribution,
            seed=self.seed,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        target = "zero" if self.target is None else "tensor"
        others = {"grad_scale": "exact", "distribution": "bernoulli", "backend": None}
        chosen = {name: getattr(self, name) for name, default in others.items() if getattr(self, name) != default}
        shown = "".join(f", {name}={value!r}" for name, value in chosen.items())
        return f"{super().extra_repr()}, p={self.p}, mask={self.mask!r}, target={target}{shown}"


class MixOutput(MixLinear):
    """A model's output layer under apply_mixout: in training its weight reads as W', whoever reads it.

    Losses that compute no logits (TRL's trainers, Liger's and other fused cross-entropies) multiply by `lm_head.weight`
    and do not call the layer. A tensor in the Parameter's place, which FSDP1 and nn.DataParallel put there, and a shard
    of FSDP2 read as they are. So does a tied weight before the first forward pass of the model, which draws the mask of
    its uses: accelerate and DeepSpeed see by then that it is the embedding's.
    """

    tied = False

    @property
    def weight(self) -> Tensor:
        plain = self._plain_weight()
        is_plain = not self.training or (self.tied and self.seed is None)
        if is_plain or "weight" in vars(self) or hasattr(plain, "device_mesh"):
            return plain
        options = {"mask": self.mask, "grad_scale": self.grad_scale, "seed": self.seed, "backend": self.backend}
        try:
            mixed = mixout(plain, self.target, self.p, True, **options)
        except AttributeError as error:
            # After an AttributeError in a property Python calls nn.Module.__getattr__, which returns the plain weight.
            raise RuntimeError(f"weight: {error}") from error
        if hasattr(plain, "ds_status"):
            # DeepSpeed's ZeRO-3 has gathered the weight for this reading; TRL asks the weight whether it is to do so.
            mixed.ds_status = plain.ds_status
        return mixed

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Take a tensor in the Parameter's place; nn.Module sets Parameters without this function."""
        vars(self)["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        if vars(self).pop("weight", None) is None:
            raise AttributeError("weight")

    def forward(self, input: Tensor) -> Tensor:
        return self._multiply(input, self._plain_weight()) if self.training else nn.Linear.forward(self, input)

    def _plain_weight(self) -> Tensor:
        for held in (vars(self), self._parameters):
            if "weight" in held:
                return held["weight"]
        raise AttributeError("weight")
