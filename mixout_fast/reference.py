"""Mixout in readable PyTorch: the specification, the oracle of every test, and the backend that works everywhere.

Mixout (Lee, Cho, Kang, ICLR 2020, arXiv 1909.11299, equation 4 and section 3) replaces the trained weight w by the
pretrained value u wherever the mask m is 0, and rescales so that the expectation is w:

    w' = u + m (w - u) / (1 - p)                                                                       E[w'] = w

Shapes: weight and target (N, K), or (N, K, R) for a convolution with R offsets per input channel; mask entries are one
per k for mask="input" and one per element, row-major, for mask="element".
"""

import math

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
LOW32 = 0xFFFFFFFF

# With fewer outputs dW is a full product, masked afterwards: reading x bounds it, so that the compact product would
# save nothing, and with few outputs and few columns MKL adds one by one, with up to 2.5 times its usual error (255
# rows, 1 output). Fewer kept columns than this are padded with zeros: with 3 to 10 columns MKL has 2 to 5 times its
# usual error at 2000 rows, and 4 to 12 times at 20000 (AMD, a dY of mean 1).
THIN_OUTPUT = 16


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device; None: it can."""
    return None


def threshold(p: float) -> int:
    """T in [0, 2**32]: an entry is kept iff its 32-bit word is at least T, so with probability 1 - p."""
    return round(p * 2**32)


def scale(p: float) -> float:
    """s = 1/(1-p) in fp64; 1 at p = 1, where no entry is kept and nothing is scaled."""
    return 1.0 / (1.0 - p) if p < 1.0 else 1.0


def capacity(count: int, p: float) -> int:
    """Most entries that an input mask of `count` entries keeps: the mean plus 8 standard deviations, rounded up to 16.

    Entries past it are dropped even if drawn as kept (probability below 1e-8 a draw). The capacity gives backends that
    cannot wait for the device, and compiled graphs, a static shape.
    """
    bound = math.ceil((1.0 - p) * count + 8.0 * math.sqrt(count * p * (1.0 - p)))
    return min(count, -(-bound // 16) * 16)


def philox4x32(counter: tuple, key: tuple, rounds: int = 10) -> tuple:
    """Philox4x32 (Salmon et al., SC 2011): four counter words and two key words -> four output words.

    Each word is an int64 tensor or int that holds an unsigned 32-bit value.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0 = c0 * PHILOX_MULTIPLIERS[0]
        product1 = c2 * PHILOX_MULTIPLIERS[1]
        # int64 products wrap modulo 2**64 and the shift is arithmetic: masking leaves the unsigned high word.
        high0, low0 = (product0 >> 32) & LOW32, product0 & LOW32
        high1, low1 = (product1 >> 32) & LOW32, product1 & LOW32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & LOW32, (k1 + PHILOX_WEYL[1]) & LOW32
    return c0, c1, c2, c3


def mask_words(seed: Tensor, count: int) -> Tensor:
    """The words of entries 0 … count-1, int64 (count,), each in [0, 2**32), on the seed's device.

    Entry i is word i & 3 of counter i >> 2 under the 64-bit key `seed` (0-d int64).
    """
    return counter_words(seed, torch.arange((count + 3) // 4, device=seed.device)).view(-1)[:count]


def counter_words(seed: Tensor, counter: Tensor) -> Tensor:
    """The four words of each counter, int64 (…) -> (…, 4)."""
    zero = torch.zeros_like(counter)
    words = philox4x32((counter & LOW32, counter >> 32, zero, zero), (seed & LOW32, (seed >> 32) & LOW32))
    return torch.stack(words, dim=-1)


def keep_mask(seed: Tensor, shape: tuple, p: float, mask: str) -> Tensor:
    """The kept entries as bool, shaped to broadcast against a weight of `shape`: (N, K) or (N, K, R)."""
    if mask == "element":
        return (mask_words(seed, math.prod(shape)) >= threshold(p)).view(shape)
    keep = mask_words(seed, shape[1]) >= threshold(p)
    keep &= keep.cumsum(0) <= capacity(shape[1], p)
    return keep.view(1, -1, *(1,) * (len(shape) - 2))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _result(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, contiguous.

    Skips calls with nothing to do: torch 2.11's compiler takes their result for an alias, and an autograd function that
    returns an alias silently gets a zero gradient (fixed in 2.12).
    """
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def mix(weight: Tensor, target: Tensor | None, seed: Tensor, p: float, mask: str, dtype: torch.dtype) -> Tensor:
    """The mixed weight w' in `dtype`, contiguous, of the weight's shape."""
    keep = keep_mask(seed, weight.shape, p, mask)
    w = weight.to(compute_dtype(weight.dtype))
    u = torch.zeros_like(w) if target is None else target.to(w.dtype)
    return _result(torch.where(keep, u + (w - u) * scale(p), u), dtype)


def mask_grad(grad: Tensor, seed: Tensor, p: float, mask: str, factor: float, dtype: torch.dtype) -> Tensor:
    """The weight's gradient from the mixed weight's: m ⊙ grad · factor, in `dtype`."""
    keep = keep_mask(seed, grad.shape, p, mask)
    scaled = grad.to(compute_dtype(grad.dtype)) * factor
    return _result(torch.where(keep, scaled, torch.zeros_like(scaled)), dtype)


def kept_indices(seed: Tensor, count: int, p: float, static: bool) -> Tensor:
    """Kept entries of an input mask, ascending, int32; with `static`, padded with -1 to capacity(count, p)."""
    keep = keep_mask(seed, (1, count), p, "input").view(-1)
    if not static:
        return keep.nonzero().view(-1).to(torch.int32)
    slots = torch.where(keep, keep.cumsum(0) - 1, capacity(count, p))
    index = torch.full((capacity(count, p) + 1,), -1, dtype=torch.int32, device=seed.device)
    entries = torch.arange(count, dtype=torch.int32, device=seed.device)
    return index.scatter(0, slots, entries)[:-1]


def gather(rows: Tensor, seed: Tensor, p: float, static: bool) -> tuple[Tensor, Tensor]:
    """Kept indices (C,) and the kept columns of rows (M, K) as (M, C); padded columns are 0."""
    index = kept_indices(seed, rows.shape[1], p, static)
    columns = rows.index_select(1, index.clamp_min(0))
    return index, columns.masked_fill(index < 0, 0) if static else columns


def is_column_major(weight: Tensor, target: Tensor | None) -> bool:
    """Whether W and U (N, K) are column-major, as GPT-2's Conv1D has them.

    With an input mask, the other backends then work in this layout and give dW the strides of W: otherwise autograd
    would copy dW into the parameter's layout.
    """
    return all(t is None or (t.stride(0) == 1 and t.stride(1) != 1) for t in (weight, target))


def shaped(output: Tensor, shape: tuple) -> Tensor:
    """`output` in `shape` and not as a view: a view that an autograd function returns cannot be changed in place."""
    return output if len(shape) == 2 else torch.ops.aten._unsafe_view(output, shape)


def linear(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    seed: Tensor,
    p: float,
    mask: str,
    gathers: bool,
    static: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = x W'ᵀ + b for input (…, K), in the input's dtype, and with `gathers` the kept indices and columns of x."""
    output = torch.nn.functional.linear(input, mix(weight, target, seed, p, mask, input.dtype), bias)
    rows = input.reshape(-1, input.shape[-1])
    return shaped(output, output.shape), *(gather(rows, seed, p, static) if gathers else (None, None))


def grad_input(grad: Tensor, weight: Tensor, target: Tensor | None, seed: Tensor, p: float, mask: str) -> Tensor:
    """dX = dY W' for grad (M, N)."""
    return grad.mm(mix(weight, target, seed, p, mask, grad.dtype))


def grad_weight(
    columns: Tensor, grad: Tensor, index: Tensor, in_features: int, factor: float, dtype: torch.dtype
) -> Tensor:
    """The dense weight gradient (N, K) of an input mask: (columnsᵀ grad)ᵀ · factor in the kept columns, 0 elsewhere."""
    kept = columns.shape[1]
    filled = torch.nn.functional.pad(columns, (0, THIN_OUTPUT - kept)) if 0 < kept < THIN_OUTPUT else columns
    compact = filled.t().mm(grad)[:kept]
    scaled = (compact.to(compute_dtype(compact.dtype)) * factor).to(dtype)
    slots = torch.where(index < 0, in_features, index).long()
    rows = scaled.new_zeros(in_features + 1, compact.shape[1]).index_copy(0, slots, scaled)
    return rows[:in_features].t().contiguous()


def gradients(
    grad: Tensor,
    input: Tensor | None,
    index: Tensor | None,
    columns: Tensor | None,
    weight: Tensor,
    target: Tensor | None,
    seed: Tensor,
    p: float,
    mask: str,
    factor: float,
    needs: tuple[bool, bool, bool],
    static: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX (…, K), dW (N, K) and db (N,) of `linear` for grad (…, N); None for those that `needs` does not ask for.

    dW is computed from input (…, K) where given, else from the index and columns that `linear` gathered. `target`, in
    the weight's dtype, is needed for dX alone. `static` is as for gather.
    """
    out_features, in_features = weight.shape
    rows = grad.reshape(-1, out_features)
    dX = dW = db = None
    if needs[0]:
        dX = grad_input(rows, weight, target, seed, p, mask).view(*grad.shape[:-1], in_features)
    if needs[1] and (mask == "element" or (input is not None and out_features < THIN_OUTPUT)):
        dW = mask_grad(rows.t().mm(input.reshape(-1, in_features)), seed, p, mask, factor, weight.dtype)
    elif needs[1]:
        if input is not None:
            index, columns = gather(input.reshape(-1, in_features), seed, p, static)
        dW = grad_weight(columns, rows, index, in_features, factor, weight.dtype)
    if needs[2]:
        db = rows.sum(0)
    return dX, dW, db


def gaussian_multiplier(seed: Tensor, count: int, p: float) -> Tensor:
    """m / mean of Gaussian mixout, fp64 (count,): normal with mean 1 and Bernoulli's variance p / (1 - p).

    Entries 2j and 2j+1 are the two Box-Muller values of words 2j and 2j+1.
    """
    words = mask_words(seed, count + count % 2).view(-1, 2).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((words[:, 0] + 1.0) / 2**32))
    angle = words[:, 1] * (2.0 * math.pi / 2**32)
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1).view(-1)[:count]
    return 1.0 + normal * math.sqrt(p / (1.0 - p))


def mix_gaussian(weight: Tensor, target: Tensor | None, seed: Tensor, p: float, mask: str) -> Tensor:
    """Equation 4 of the paper with Gaussian m: w' = u + (m / mean)(w - u), differentiable in weight, any p < 1."""
    compute = compute_dtype(weight.dtype)
    if mask == "element":
        multiplier = gaussian_multiplier(seed, weight.numel(), p).view(weight.shape)
    else:
        multiplier = gaussian_multiplier(seed, weight.shape[1], p).view(1, -1, *(1,) * (weight.dim() - 2))
    u = torch.zeros((), dtype=compute, device=weight.device) if target is None else target.to(compute)
    return _result(u + (weight.to(compute) - u) * multiplier.to(compute), weight.dtype)
