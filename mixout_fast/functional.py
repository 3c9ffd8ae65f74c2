"""Mixout as functions: argument checks, the seed draw and the choice of backend."""

from types import ModuleType, NoneType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixout_fast import autograd, backends, reference

MASKS = ("input", "element")
GRAD_SCALES = ("exact", "paper")
DISTRIBUTIONS = ("bernoulli", "gaussian")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONAL_TENSOR = (Tensor, NoneType)


def mixout(
    input: Tensor,
    target: Tensor | None = None,
    p: float = 0.0,
    training: bool = False,
    inplace: bool = False,
    *,
    mask: str = "input",
    grad_scale: str = "exact",
    distribution: str = "bernoulli",
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mix a parameter with its target (Lee et al. 2020, section 3): each dropped entry of `input` becomes `target`'s.

    Args:
        input: the trained weight, floating point (fp64, fp32, bf16, fp16), any strides: a matrix (N, K) as in
            nn.Linear, a convolution weight (out, in, …), or a vector (K,).
        target: the pretrained value u, of the same shape, on the same device, and in the same dtype or a smaller one,
            which is widened in use; None means zero (dropout of weights).
        p: probability in [0, 1] that an entry is replaced.
        training: False returns `input` itself, as p = 0 does.
        inplace: write the result into `input`, which must not require grad.
        mask: "input", one draw per input neuron (column k of a matrix, input channel of a convolution, entry of a
            vector), or "element", one draw per weight.
        grad_scale: "exact", the gradient m ⊙ grad / (1-p), or "paper", the published code's m ⊙ grad (Bernoulli masks
            only).
        distribution: "bernoulli", or "gaussian" (m normal with the same mean and variance; reference backend only).
        seed: int or 0-d int64 tensor on input's device that determines the mask; None draws one from the device's
            default generator, so torch.manual_seed governs it.
        backend: "cpu", "cuda", "triton" or "reference"; None chooses by device (`python -m mixout_fast` lists them).

    Returns:
        The mixed weight, of input's shape and dtype, contiguous. Twice differentiable in `input`.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """
    check_options(p, mask, grad_scale, distribution)
    _check_weight("input", input, target)
    if input.dim() == 0:
        raise ValueError("input: a 0-d tensor; mixout takes a vector, a matrix or a convolution weight")
    if inplace and torch.is_grad_enabled() and input.requires_grad:
        raise ValueError("inplace: input requires grad; mix it out of place, or under torch.no_grad()")
    if p == 0.0 or not training or input.numel() == 0:
        return input
    chosen = _select_backend(backend, input.device.type, distribution)
    seed = seed_tensor(seed, input.device)
    matrix, target_matrix = _as_matrix(input), None if target is None else _as_matrix(target)
    if distribution == "gaussian":
        mixed = reference.mix_gaussian(matrix, target_matrix, seed, p, mask)
    else:
        mixed = autograd.Mix.apply(matrix, target_matrix, seed, p, mask, _factor(p, grad_scale), chosen)
    mixed = mixed.view(input.shape)
    return input.copy_(mixed) if inplace else mixed


def mix_linear(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    *,
    mask: str = "input",
    grad_scale: str = "exact",
    distribution: str = "bernoulli",
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x W'ᵀ + b with W' = mixout(weight, target, p), at less than the cost of y = x Wᵀ + b in training.

    Args:
        input: x, (…, K), any number of leading dimensions, any strides.
        weight: W, (N, K), of x's dtype.
        target: U, (N, K), of W's dtype or a smaller one, or None for zero.
        bias: b, (N,), of x's dtype, or None.
        p, training, mask, grad_scale, distribution, seed, backend: as for `mixout`.

    All tensors are on one device. Under autocast, unless W is fp64, x and b may have any floating dtype and are cast to
    autocast's. 16-bit W and U are cast to it before they are mixed; fp32 W and U are mixed in fp32 and rounded once.

    Returns:
        y, (…, N), of x's dtype (autocast's under autocast). Once differentiable in input, weight and bias: a backward
        with create_graph=True raises RuntimeError; for a second derivative use F.linear(input, mixout(weight, …),
        bias). Gradients: dX = dY W', db = Σ dY, dW = m ⊙ (dYᵀ X) / (1-p).

    Limit: torch.compile with an activation memory budget below 1 (torch._functorch.config.activation_memory_budget) may
    draw the seed again in backward, whose mask is then not forward's (pytorch/pytorch#190758). Pass as `seed` a tensor
    drawn outside the compiled function: it is never drawn again.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """
    check_options(p, mask, grad_scale, distribution)
    mixes, factor = training and p != 0.0, _factor(p, grad_scale)
    if mixes and distribution == "bernoulli" and not torch.compiler.is_compiling():
        output = _mix_linear_in_cpp(input, weight, target, bias, p, mask, factor, seed, backend)
        if output is not None:
            return output
    dtype, device, shape = _check_weight("weight", weight, target)
    device_type = _device_type(weight)
    autocast = _autocast_dtype(dtype, device_type)
    _check_linear(input, bias, dtype, device, shape, autocast is not None)
    if not mixes or 0 in shape:
        return F.linear(input, weight, bias)
    if input.layout is not torch.strided:
        raise TypeError(
            f"input: layout {input.layout}; in training mix_linear takes a dense tensor: "
            "compute F.linear(input, mixout(weight, ...), bias)"
        )
    chosen = _select_backend(backend, device_type, distribution)
    seed = seed_tensor(seed, device)
    if distribution == "gaussian":
        return F.linear(input, reference.mix_gaussian(weight, target, seed, p, mask), bias)
    if autocast is not None:
        input = input.to(autocast)
        bias = None if bias is None else bias.to(autocast)
        if dtype != torch.float32:
            weight = weight.to(autocast)  # the target follows the weight
    return autograd.mix_linear(input, weight, target, bias, seed, p, mask, factor, chosen)


def _mix_linear_in_cpp(
    input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, p: float, mask: str, factor: float,
    seed: int | Tensor | None, backend: str | None,
) -> Tensor | None:  # fmt: skip
    """The rest of mix_linear in C++, or None: the backend has none, or the operands are not the usual ones.

    After a large product Python runs from cold caches, at five times its usual cost (docs/experiments.md, "The host's
    time").
    """
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        return None
    if not (isinstance(target, OPTIONAL_TENSOR) and isinstance(bias, OPTIONAL_TENSOR)):
        return None
    dtype, shape, device_type = weight.dtype, weight.shape, _device_type(weight)
    if dtype not in DTYPES or len(shape) != 2 or 0 in shape:
        return None
    chosen = backends.select(backend, device_type)
    if not autograd.is_in_cpp(chosen):
        return None
    seed = None if seed is None else seed_tensor(seed, weight.device)
    gathers = autograd.keeps_compact_copy(weight, p, mask)
    autocast = _autocast_dtype(dtype, device_type)
    return chosen.checked_mix_linear(input, weight, target, bias, seed, p, mask, factor, gathers, autocast)


def check_options(p: float, mask: str, grad_scale: str, distribution: str = "bernoulli") -> None:
    """Raise TypeError or ValueError for a p outside [0, 1] or an unknown choice."""
    if not isinstance(p, (float, int)) or isinstance(p, bool):
        raise TypeError(f"p: {p!r} of type {type(p).__name__}; it takes a number in [0, 1]")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: {p}; it takes a probability in [0, 1]")
    if mask not in MASKS:
        raise ValueError(f"mask: {mask!r}; it takes one of {', '.join(MASKS)}")
    if grad_scale not in GRAD_SCALES:
        raise ValueError(f"grad_scale: {grad_scale!r}; it takes one of {', '.join(GRAD_SCALES)}")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: {distribution!r}; it takes one of {', '.join(DISTRIBUTIONS)}")
    if distribution == "gaussian" and p == 1.0:
        raise ValueError("p: 1 with distribution='gaussian', whose variance p/(1-p) is then infinite")
    if distribution == "gaussian" and grad_scale == "paper":
        raise ValueError("grad_scale: 'paper' with distribution='gaussian', which has no published code")


def check_backend(backend: str | None, distribution: str = "bernoulli") -> None:
    """Raise ValueError for an unknown backend, or one without the distribution.

    Whether the backend serves the device is checked at the first call.
    """
    if backend is not None and backend not in backends.BACKENDS:
        raise ValueError(f"backend: {backend!r}; it takes one of {', '.join(backends.BACKENDS)}")
    if distribution == "gaussian" and backend not in (None, "reference"):
        raise ValueError(f"backend: {backend!r} with distribution='gaussian', which only 'reference' serves")


def storage_of(tensor: Tensor) -> int:
    """An id of a tensor's memory, the same for aliases through NumPy or DLPack.

    Where a tensor has no memory (meta, fake, DTensor), an id of its storage.
    """
    storage = tensor.untyped_storage()
    has_none = storage.device.type == "meta" or is_traceable_wrapper_subclass(tensor)
    return storage._cdata if has_none else storage.data_ptr()


def _check_weight(name: str, weight: Tensor, target: Tensor | None) -> tuple[torch.dtype, torch.device, torch.Size]:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: {type(weight).__name__}; it takes a tensor")
    dtype, device, shape = weight.dtype, weight.device, weight.shape
    if dtype not in DTYPES:
        raise TypeError(f"{name}: dtype {dtype}; it takes one of {', '.join(map(str, DTYPES))}")
    if target is not None:
        if not isinstance(target, Tensor):
            raise TypeError(f"target: {type(target).__name__}; it takes a tensor or None")
        if target.shape != shape:
            bias = " (bias is the fourth argument)" if name == "weight" and target.shape == shape[:1] else ""
            raise ValueError(
                f"target: shape {tuple(target.shape)}, {name} has {tuple(shape)}; they must be equal{bias}"
            )
        if target.dtype != dtype and not (target.dtype in DTYPES and target.dtype.itemsize < dtype.itemsize):
            raise TypeError(f"target: dtype {target.dtype}, {name} has {dtype}; it takes the same or a smaller one")
        if target.device != device:
            raise _wrong_device("target", target, name, device)
        if target.requires_grad:
            raise ValueError("target: it requires grad; it is a constant: pass target.detach()")
    return dtype, device, shape


def _device_type(tensor: Tensor) -> str:
    return "cpu" if tensor.is_cpu else tensor.device.type  # which takes 13 us from cold caches


def _autocast_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype | None:
    """The dtype to compute in under autocast, None without: for fp64 weights and meta tensors there is none."""
    if device_type == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _wrong_device(name: str, tensor: Tensor, other_name: str, device: torch.device) -> ValueError:
    return ValueError(f"{name}: on {tensor.device}, {other_name} on {device}; they must be on one device")


def _wrong_dtype(name: str, tensor: Tensor, dtype: torch.dtype, autocast: bool) -> TypeError:
    if autocast:
        return TypeError(f"{name}: dtype {tensor.dtype}; it takes one of {', '.join(map(str, DTYPES))}")
    return TypeError(f"{name}: dtype {tensor.dtype}, weight has {dtype}; they must be the same")


def _check_linear(
    input: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device, shape: torch.Size, autocast: bool
) -> None:
    """Check mix_linear's input and bias against the weight's dtype, device and shape."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: {type(input).__name__}; it takes a tensor")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: {type(bias).__name__}; it takes a tensor or None")
    if len(shape) != 2:
        raise ValueError(f"weight: shape {tuple(shape)}; it takes (out_features, in_features)")
    if input.shape[-1:] != shape[1:]:
        raise ValueError(
            f"input: shape {tuple(input.shape)}, weight has {tuple(shape)}; "
            "input's last dimension must be in_features, weight's second"
        )
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias: shape {tuple(bias.shape)}, weight has {tuple(shape)}; it takes (out_features,)")
    dtypes = DTYPES if autocast else (dtype,)
    if input.dtype not in dtypes:
        raise _wrong_dtype("input", input, dtype, autocast)
    if input.device != device:
        raise _wrong_device("input", input, "weight", device)
    if bias is not None:
        if bias.dtype not in dtypes:
            raise _wrong_dtype("bias", bias, dtype, autocast)
        if bias.device != device:
            raise _wrong_device("bias", bias, "weight", device)


def _select_backend(backend: str | None, device_type: str, distribution: str) -> ModuleType:
    if distribution == "bernoulli":
        return backends.select(backend, device_type)
    check_backend(backend, distribution)
    return reference


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != device:
            raise ValueError(
                f"seed: {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}; "
                f"it takes an int or a 0-d int64 tensor on {device}"
            )
        return seed
    if not isinstance(seed, int):
        raise TypeError(f"seed: {seed!r} of type {type(seed).__name__}; it takes an int or a 0-d int64 tensor")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: {seed}; it takes a signed 64-bit integer")
    return torch.full((), seed, dtype=torch.int64, device=device)  # no copy from the host, which a CUDA graph refuses


def _as_matrix(tensor: Tensor) -> Tensor:
    """(K,) -> (1, K); (N, K) as it is; (N, K, …) -> (N, K, R): a view wherever the strides allow one."""
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    return tensor if tensor.dim() == 2 else tensor.flatten(2)


def _factor(p: float, grad_scale: str) -> float:
    return reference.scale(p) if grad_scale == "exact" else 1.0
