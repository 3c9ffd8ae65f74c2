"""Checks of mixout for anyone's CI: input makers, an fp64 oracle, agreement, gradients, mask statistics.

    from mixout_fast import testing
    for name, check in testing.checks("cpu"):
        check()

Every check raises AssertionError naming what was wrong, where, and the shape, dtype, p, mask and seed; none has a
tolerance chosen by hand:

    bits        every entry is the reference's, bit for bit (NaN equals NaN)
    exact       on small integers at p = 1/2 or 3/4 nothing rounds, so every summation order gives the fp64 result
    error       max |ours - fp64| is at most twice max |library - fp64|, the library being F.linear and mm in the same
                dtype on the reference's mixed weight; a result as close as the rounding to its dtype always passes
    statistics  the probability of a mask at least this unlikely is above one in a million

`python -m mixout_fast check` runs them all.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from mixout_fast import backends, reference
from mixout_fast.functional import DTYPES, MASKS, mix_linear, mixout

SHAPES = ((1, 255, 1023), (3, 1023, 255), (17, 3, 1023), (255, 1023, 17), (1023, 255, 3), (255, 1, 255), (255, 255, 1))
"""Odd (rows, in_features, out_features), small and large in each place, that no block or vector divides."""

AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)
PRECISIONS = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, dtype) for dtype in AUTOCAST_DTYPES]
"""(dtype of the operands, compute dtype)"""

INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
RESULTS = ("y", "dX", "dW", "db")
ERROR_RATIO = 2
SIGNIFICANCE = 1e-6


@dataclass(frozen=True)
class Case:
    """One call: y = mix_linear(input, weight, target, bias, p) and a gradient of y.

    input (*leading, K), weight and target (N, K), bias (N,) in the weight's dtype; grad_output (*leading, N) in
    `compute`, which differs from the weight's dtype under autocast only.
    """

    input: Tensor
    weight: Tensor
    target: Tensor | None
    bias: Tensor | None
    grad_output: Tensor
    seed: Tensor
    p: float
    mask: str
    compute: torch.dtype
    origin: str

    @property
    def rows(self) -> Tensor:
        return self.input.reshape(-1, self.weight.shape[1])

    @property
    def autocast(self) -> bool:
        return self.compute != self.weight.dtype

    def __str__(self) -> str:
        dtype = f"{self.weight.dtype} autocast to {self.compute}" if self.autocast else f"{self.compute}"
        return (
            f"input {tuple(self.input.shape)}, weight {tuple(self.weight.shape)}, {dtype} on {self.weight.device}, "
            f"p={self.p}, mask={self.mask!r}, target={'zero' if self.target is None else 'tensor'}, "
            f"bias={self.bias is not None}, seed={self.seed.item()}, {self.origin}"
        )


def random_case(
    leading: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    *,
    p: float,
    mask: str = "input",
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    target: bool = True,
    bias: bool = True,
    seed: int = 0,
) -> Case:
    """Normal x, U, b and dY, and a W near U, as after finetuning. All of it, and the mask, is a function of `seed`."""
    leading = (leading,) if isinstance(leading, int) else leading
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pretrained = normal(out_features, in_features) / math.sqrt(in_features)
    weight = pretrained + 0.1 * normal(out_features, in_features) / math.sqrt(in_features)
    tensors = (
        normal(*leading, in_features),
        weight,
        pretrained if target else None,
        normal(out_features) if bias else None,
        normal(*leading, out_features),
    )
    return _case(tensors, generator, p, mask, dtype, compute, device, f"random_case(seed={seed})")


def integer_case(
    leading: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    *,
    p: float,
    mask: str = "input",
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    target: bool = True,
    bias: bool = True,
    seed: int = 0,
) -> Case:
    """Integers so small and sparse that at p = 1/2 or 3/4 every sum, in every order, is exact even in bf16.

    Raises ValueError for a shape too large for that.
    """
    leading = (leading,) if isinstance(leading, int) else leading
    rows = math.prod(leading)
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape, summed_over=1):
        values = torch.randint(-1, 2, shape, generator=generator, dtype=torch.float64)
        dense = torch.rand(shape, generator=generator, dtype=torch.float64) < 8 / max(summed_over, 1)
        return values * dense

    tensors = (
        integers(*leading, in_features, summed_over=max(in_features, rows)),
        integers(out_features, in_features),
        integers(out_features, in_features) if target else None,
        integers(out_features) if bias else None,
        integers(*leading, out_features, summed_over=max(out_features, rows)),
    )
    case = _case(tensors, generator, p, mask, dtype, compute, device, f"integer_case(seed={seed})")
    largest_exact_integer = 2 / torch.finfo(case.compute).eps
    for name, bound in _absolute_sums(case).items():
        if bound.numel() and bound.max() > largest_exact_integer:
            raise ValueError(f"integer_case: {name} may reach {bound.max()}, inexact in {case.compute}: {case}")
    return case


def special_case(
    *,
    p: float,
    mask: str = "input",
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Case:
    """W and U hold every pair of zeros, infinities, NaN, subnormals, extremes, ties of the rounding and random bits.

    For checks of the mixed weight only: products with it are mostly NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    bits = 8 * dtype.itemsize
    integer = INT_OF_SIZE[dtype.itemsize]
    finest = torch.finfo(dtype)
    coarsest = torch.finfo(dtype if compute is None else compute)
    values = [0.0, 1.0, math.inf, math.nan, finest.tiny, finest.smallest_normal / 4, finest.max, finest.max / 2]
    values += [coarsest.max, coarsest.tiny, coarsest.tiny / 4, coarsest.smallest_normal * (0.5 + coarsest.eps / 4)]
    values += [1 + i * coarsest.eps / 2 for i in range(-3, 6)]
    special = torch.tensor(values, dtype=torch.float64).to(dtype)
    random = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, (64,), generator=generator).to(integer).view(dtype)
    values = torch.cat((special, -special, random))
    weight = values.expand(len(values), -1)
    x = torch.zeros(1, len(values))
    tensors = (x, weight, weight.t(), None, x)
    return _case(tensors, generator, p, mask, dtype, compute, device, f"special_case(seed={seed})")


def _case(tensors, generator, p, mask, dtype, compute, device, origin) -> Case:
    compute = dtype if compute is None else compute
    dtypes = (dtype, dtype, dtype, dtype, compute)
    moved = (None if t is None else t.to(device, d) for t, d in zip(tensors, dtypes, strict=True))
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator)
    return Case(*moved, seed.to(device), p, mask, compute, origin)


def column_major(case: Case) -> Case:
    """The case with column-major W and U, as GPT-2's Conv1D has them."""
    weight, target = (None if t is None else t.t().contiguous().t() for t in (case.weight, case.target))
    return replace(case, weight=weight, target=target, origin=f"{case.origin}, column-major")


def run(case: Case, backend: str | None = None, grad_scale: str = "exact") -> dict[str, Tensor]:
    """y and its gradients dX, dW, db from mix_linear."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (case.input, case.weight, case.bias)]
    input, weight, bias = leaves
    with torch.autocast(case.input.device.type, case.compute, enabled=case.autocast):
        output = mix_linear(
            input, weight, case.target, bias, case.p,
            mask=case.mask, grad_scale=grad_scale, seed=case.seed, backend=backend,
        )  # fmt: skip
    output.backward(case.grad_output)
    grads = (None if leaf is None else leaf.grad for leaf in leaves)
    return _named(output.detach(), *grads)


def library(case: Case) -> dict[str, Tensor]:
    """y, dX, dW and db by the library's F.linear and mm of the reference's mixed weight, in the compute dtype."""
    input, weight, target, seed, p, mask = case.input, case.weight, case.target, case.seed, case.p, case.mask
    input = input.to(case.compute)
    bias = None if case.bias is None else case.bias.to(case.compute)
    output, _, _ = reference.linear(input, weight, target, bias, seed, p, mask, gathers=False, static=False)
    dY = case.grad_output.reshape(-1, weight.shape[0])
    dX = reference.grad_input(dY, weight, target, seed, p, mask).view(input.shape)
    full = dY.t() @ input.reshape(-1, weight.shape[1])
    dW = reference.mask_grad(full, seed, p, mask, reference.scale(p), weight.dtype)
    return _named(output, dX, dW, None if bias is None else dY.sum(0))


def oracle(case: Case) -> dict[str, Tensor]:
    """y, dX, dW and db on the CPU in fp64, by accurate_mm, so correct to fp64's last places for every dtype."""
    keep, mixed, dY, X = _oracle_operands(case)
    output = accurate_mm(X, mixed.t()) + (0 if case.bias is None else case.bias.cpu().double())
    grad_weight = torch.where(keep, accurate_mm(dY.t(), X, reference.scale(case.p)), 0.0)
    grad_bias = None if case.bias is None else accurate_mm(torch.ones(1, len(dY), dtype=torch.float64), dY)[0]
    output = output.view(case.grad_output.shape)
    return _named(output, accurate_mm(dY, mixed).view(case.input.shape), grad_weight, grad_bias)


def _oracle_operands(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = case.weight.cpu().double()
    target = torch.zeros_like(weight) if case.target is None else case.target.cpu().double()
    keep = reference.keep_mask(case.seed.cpu(), tuple(weight.shape), case.p, case.mask)
    mixed = torch.where(keep, target + (weight - target) * reference.scale(case.p), target)
    grad = case.grad_output.cpu().double().reshape(-1, weight.shape[0])
    return keep, mixed, grad, case.rows.to(case.compute).cpu().double()


def _absolute_sums(case: Case) -> dict[str, Tensor]:
    _, mixed, dY, X = _oracle_operands(case)
    mixed, dY, X = mixed.abs(), dY.abs(), X.abs()
    return _named(X @ mixed.t() + 1, dY @ mixed, dY.t() @ X * reference.scale(case.p), dY.sum(0))


def _named(*results: Tensor | None) -> dict[str, Tensor]:
    return {name: result for name, result in zip(RESULTS, results, strict=True) if result is not None}


def accurate_mm(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """a @ b · factor for fp64 matrices, with an error of about one rounding, so that fp64 results have an oracle too.

    Each matrix is cut into slices of so few bits that the slices' products sum without rounding (Ozaki et al.,
    "Error-free transformations of matrix multiplication", 2012).
    """
    bits = (53 - max(a.shape[1] - 1, 1).bit_length()) // 2
    slices_a = _slices(a, bits, dim=1)
    slices_b = _slices(b, bits, dim=0)
    order = sorted((i + j, i, j) for i in range(len(slices_a)) for j in range(len(slices_b)))
    *products, largest = (slices_a[i] @ slices_b[j] for _, i, j in reversed(order))
    if factor != 1.0:
        # The other products are small: rounding them times the factor errs far less than rounding the sum.
        *products, largest = (*(product * factor for product in products), *_exact_product(largest, factor))
    return sum(products, torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)) + largest


def _exact_product(matrix: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The rounding error of matrix · factor, and matrix · factor (Dekker, 1971)."""
    product = matrix * factor
    (high, low), (factor_high, factor_low) = _halves(matrix), _halves(factor)
    return ((high * factor_high - product) + high * factor_low + low * factor_high) + low * factor_low, product


def _halves(value: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
    """value as a sum of two numbers of at most 26 bits, whose products are exact."""
    shifted = value * (2.0**27 + 1)
    high = shifted - (shifted - value)
    return high, value - high


def _slices(matrix: Tensor, bits: int, dim: int) -> list[Tensor]:
    slices = []
    for _ in range(math.ceil(53 / bits)):
        largest = matrix.abs().amax(dim, keepdim=True) if matrix.numel() else matrix.sum(dim, keepdim=True)
        _, exponent = torch.frexp(largest)
        # Adding and subtracting 2^(53 - bits) times the largest rounds away all but `bits` bits.
        shift = torch.ldexp(torch.full_like(largest, 0.75), exponent + 53 - bits)
        slices.append((matrix + shift) - shift)
        matrix = matrix - slices[-1]
    return slices


def assert_same_bits(what: str, got: Tensor, want: Tensor, where: object) -> None:
    """Shape, dtype and every entry are equal, bit for bit; any NaN equals any NaN: payloads differ by platform."""
    _assert_same_form(what, got, want, where)
    integer = INT_OF_SIZE[got.element_size()]
    got, want = got.contiguous(), want.contiguous().to(got.device)
    differs = got.view(integer) != want.view(integer)
    if got.is_floating_point():
        differs &= ~(got.isnan() & want.isnan())
    _assert_none(what, "bit for bit", differs, got, want, where)


def assert_same_values(what: str, got: Tensor, want: Tensor, where: object) -> None:
    """Shape, dtype and every value are equal, with +0 equal to -0: sums of zeros leave the sign open."""
    _assert_same_form(what, got, want, where)
    want = want.to(got.device)
    _assert_none(what, "in value", got != want, got, want, where)


def _assert_same_form(what, got, want, where):
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(
            f"{what}: {got.dtype} {tuple(got.shape)}, it should be {want.dtype} {tuple(want.shape)}: {where}"
        )


def _assert_none(what, how, differs, got, want, where):
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what} does not agree {how} in {int(differs.sum())} of {differs.numel()} entries, first at {first}: "
            f"{got[first].item()!r}, it should be {want[first].item()!r}: {where}"
        )


def mask_of(shape: tuple, seed: Tensor, p: float, mask: str, backend: str | None) -> Tensor:
    """The kept entries, bool of `shape`, as mixout of ones toward zero shows them; p < 1."""
    ones = torch.ones(shape, device=seed.device)
    return mixout(ones, None, p, True, mask=mask, seed=seed, backend=backend) != 0


def check_mask(case: Case, backend: str | None) -> None:
    """The kept entries are the reference's."""
    if case.p == 1.0:
        return
    shape = tuple(case.weight.shape)
    want = reference.keep_mask(case.seed, shape, case.p, case.mask).expand(shape)
    assert_same_bits("mask", mask_of(shape, case.seed, case.p, case.mask, backend), want, case)


def check_threshold(mask: str, device: str | torch.device, backend: str | None) -> None:
    """An entry is kept at the p whose threshold is its word, and dropped at the next threshold."""
    seed = torch.tensor(11, device=device)
    for i, word in enumerate(reference.mask_words(seed, 16).tolist()):
        for threshold, keep in ((word, True), (word + 1, False)):
            if mask_of((1, 16), seed, threshold / 2**32, mask, backend)[0, i].item() != keep:
                raise AssertionError(
                    f"threshold: entry {i} with word {word} is {'dropped' if keep else 'kept'} at p = {threshold} / "
                    f"2^32: mask={mask!r}, seed={seed.item()} on {device}"
                )


def check_mixed_weight(case: Case, backend: str | None) -> None:
    """W' is the reference's, bit for bit, in the compute dtype."""
    module = _module(backend, case)
    arguments = (case.weight, case.target, case.seed, case.p, case.mask, case.compute)
    assert_same_bits("W'", module.mix(*arguments), reference.mix(*arguments), case)


def check_mask_grad(case: Case, backend: str | None) -> None:
    """The element-wise gradient m ⊙ dW' · factor is the reference's, bit for bit, from the compute dtype to W's."""
    module = _module(backend, case)
    grad = case.weight.to(case.compute)
    for factor in (1.0, reference.scale(case.p)):
        arguments = (grad, case.seed, case.p, case.mask, factor, case.weight.dtype)
        assert_same_bits(
            f"mask_grad (factor {factor})", module.mask_grad(*arguments), reference.mask_grad(*arguments), case
        )


def check_gather(case: Case, backend: str | None) -> None:
    """Kept indices and columns beside y, with a dynamic and a static shape, are the reference's.

    A backend that cannot wait for the device always has the static shape. Gathering does not change y.
    """
    module, operands = _module(backend, case), _linear_operands(case)
    for static in (False, True):
        output, *got = module.linear(*operands, True, static)
        is_static = static or len(got[0]) == reference.capacity(case.weight.shape[1], case.p)
        want = reference.gather(case.rows.to(case.compute), case.seed, case.p, is_static)
        for name, ours, theirs in zip(("kept indices", "kept columns"), got, want, strict=True):
            assert_same_bits(f"{name} (static={static})", ours, theirs, case)
        plain_output, _, _ = module.linear(*operands, False, static)
        assert_same_bits(f"y beside kept columns (static={static})", output, plain_output, case)


def check_grad_weight(case: Case, backend: str | None) -> None:
    """dW of an input mask, from kept columns and from x, is the reference's, zeros included.

    This holds whatever the padding's columns contain. Operands are small positive integers, whose sums are exact in any
    order and never -0. From x the factor is 1, since a backend may apply it before it sums.
    """
    module = _module(backend, case)
    in_features = case.weight.shape[1]

    def integers(tensor: Tensor) -> Tensor:
        return (1 + (2 * tensor.abs()).floor().clamp(max=7)).to(case.compute)

    for static in (False, True):
        index = reference.kept_indices(case.seed, in_features, case.p, static)
        # Any columns will do, so the padding of a static shape is not 0 here.
        columns = integers(case.rows[:, : len(index)]).contiguous()
        none = index[:0], columns[:0, :0]
        for source, x, gathered, factor in (
            ("kept columns", None, (index, columns), reference.scale(case.p)),
            ("x", integers(case.input), none, 1.0),
        ):
            arguments = (integers(case.grad_output), x, *gathered, case.weight, None, case.seed, case.p, case.mask)
            arguments += (factor, (False, True, False), static)
            (_, got, _), (_, want, _) = module.gradients(*arguments), reference.gradients(*arguments)
            assert_same_bits(f"dW from {source} (static={static})", got, want, case)


def check_each_gradient_alone(case: Case, backend: str | None) -> None:
    """dX, dW and db have the same bits when asked for alone and together, from kept columns and from x.

    dY is integers, whose sums are exact: a backend may sum db in another order beside dW than alone.
    """
    module, operands = _module(backend, case), _linear_operands(case)
    grad_output = (2 * case.grad_output).round()
    input, weight, target, _, *draw = operands
    for gathers in (True, False) if case.mask == "input" else (False,):
        _, *gathered = module.linear(*operands, gathers, False)
        arguments = (grad_output, None if gathers else input, *gathered, weight, target, *draw)
        arguments += (reference.scale(case.p),)
        together = module.gradients(*arguments, (True, True, True), False)
        for i, name in enumerate(RESULTS[1:]):
            needs = tuple(i == j for j in range(3))
            results = module.gradients(*arguments, needs, False)
            if [result is not None for result in results] != list(needs):
                raise AssertionError(f"gradients: more or less than {name}, which alone was wanted: {case}")
            assert_same_bits(f"{name} alone (kept columns: {gathers})", results[i], together[i], case)


def _linear_operands(case: Case) -> tuple:
    """The operands of a backend's linear, cast as autocast casts them."""
    bias = None if case.bias is None else case.bias.to(case.compute)
    return case.input.to(case.compute), case.weight, case.target, bias, case.seed, case.p, case.mask


@contextlib.contextmanager
def sums_in_fp32() -> Iterator[None]:
    """Have cuBLAS add up the parts of a split sum of bf16 or fp16 products in fp32, not in that dtype, its default."""
    products = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(products, name) for name in names]
    for name in names:
        setattr(products, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(products, name, value)


def check_exact(case: Case, backend: str | None) -> None:
    """y, dX, dW and db of an integer_case are the fp64 results."""
    want = oracle(case)
    with sums_in_fp32():
        results = run(case, backend)
    for name, result in results.items():
        assert_same_values(name, result, want[name].to(result.dtype), case)


def check_output(case: Case, backend: str | None) -> None:
    """Where W' is mixed first, y and dX are F.linear(x, W', b) and mm(dY, W') with the reference's W', bit for bit."""
    ours = run(case, backend)
    dtype = product_dtype(case, backend)
    mixed = reference.mix(case.weight, case.target, case.seed, case.p, case.mask, case.compute).to(dtype)
    x, bias = (None if tensor is None else tensor.to(case.compute).to(dtype) for tensor in (case.input, case.bias))
    dY = case.grad_output.reshape(-1, len(mixed)).to(dtype)
    y, dX = torch.nn.functional.linear(x, mixed, bias), dY.mm(mixed).view(case.input.shape)
    for name, theirs, one_pass in zip(("y", "dX"), (y, dX), is_one_pass(case, backend), strict=True):
        if not one_pass:
            # dX has x's dtype, which is not the compute dtype under autocast.
            want = theirs.to(case.compute).to(ours[name].dtype)
            assert_same_bits(f"{name} (mixed first)", ours[name], want, case)


def product_dtype(case: Case, backend: str | None) -> torch.dtype:
    """The dtype of the operands of the library's products: the compute dtype, or fp32 where the backend widens them."""
    module = _module(backend, case)
    widens = hasattr(module, "multiplies_in_fp32") and module.multiplies_in_fp32(case.compute)
    return torch.float32 if widens else case.compute


def check_repeatable(case: Case, backend: str | None) -> None:
    """The same call twice gives the same bits."""
    first, second = run(case, backend), run(case, backend)
    for name in first:
        assert_same_bits(f"{name} (second call)", second[name], first[name], case)


def check_all_bits(case: Case, backend: str | None) -> None:
    """Every check above that demands equal bits, of one random_case."""
    functions = [check_mask, check_mixed_weight, check_mask_grad, check_output, check_repeatable]
    functions += [check_each_gradient_alone]
    if case.mask == "input":
        functions += [check_gather, check_grad_weight]
    for function in functions:
        function(case, backend)


def check_error(cases: Iterable[Case], backend: str | None, truth_of: Callable[[Case], dict] = oracle) -> None:
    """Over the cases, each result's largest error against `truth_of(case)` is at most twice the library's.

    Pass cases with a thousand results between them: the largest of a few errors is luck.
    """
    worst = {}
    for case in cases:
        with sums_in_fp32():
            ours, theirs, truth = run(case, backend), library(case), truth_of(case)
        for name, want in truth.items():
            if want.numel() == 0:
                continue
            errors = [(result[name].to(want.device).double() - want).abs().max().item() for result in (ours, theirs)]
            # Correctly rounded results differ from fp64 by this much: the library's own error can be 0 by luck.
            rounding = torch.finfo(case.compute).eps / 2 * want.abs().max().item()
            seen = worst.get(name, (0.0, 0.0, 0.0))
            worst[name] = tuple(map(max, seen, (*errors, rounding)))
    for name, (our_error, library_error, rounding) in worst.items():
        if not our_error <= max(ERROR_RATIO * library_error, rounding):
            raise AssertionError(
                f"{name}: error {our_error:.3g} against fp64, the library's is {library_error:.3g} "
                f"(one rounding {rounding:.3g}): {case}"
            )


def error_cases(
    make: Callable[..., Case], shape: tuple[int, int, int], seed: int, *, sums: int = 250, **options
) -> list[Case]:
    """Cases of one shape, enough for 1000 entries each of y, dX and dW (at most 8 cases) and `sums` of db (at most 16).

    With 34 sums the largest error is twice an equally exact kernel's for one seed in 30, with 250 sums for none in 200.
    """
    rows, in_features, out_features = shape
    kept = max(1.0, (1 - options["p"]) * in_features)
    fewest = min(rows * out_features, rows * in_features, out_features * kept)
    count = max(min(8, math.ceil(1000 / fewest)), min(16, math.ceil(sums / out_features)))
    return [make(*shape, seed=seed + i, **options) for i in range(count)]


def check_gradients(mask: str, device: str | torch.device, backend: str | None) -> None:
    """torch.autograd.gradcheck of mix_linear and mixout, and gradgradcheck of mixout, in fp64 with odd sizes."""
    case = random_case((2, 3), 5, 7, p=0.5, mask=mask, dtype=torch.float64, device=device)
    options = {"mask": mask, "seed": case.seed, "backend": backend}
    leaves = [tensor.requires_grad_() for tensor in (case.input, case.weight, case.bias)]

    def linear(input, weight, bias):
        return mix_linear(input, weight, case.target, bias, case.p, **options)

    def mixed(weight):
        return mixout(weight, case.target, case.p, True, **options)

    for what, function, inputs, check in (
        ("mix_linear", linear, leaves, torch.autograd.gradcheck),
        ("mixout", mixed, leaves[1:2], torch.autograd.gradcheck),
        ("mixout, second derivative", mixed, leaves[1:2], torch.autograd.gradgradcheck),
    ):
        try:
            check(function, inputs)
        except RuntimeError as error:
            raise AssertionError(f"gradient of {what}: {error}: {case}") from error


def check_mask_statistics(mask: str, p: float, device: str | torch.device, backend: str | None) -> None:
    """Over 256 steps: the kept fraction, its variance, and independence of entries, of steps and of layers.

    A step draws two layers' seeds from a generator, as two layers of a model do.
    """
    steps, length = 256, 1024
    shape = (1, length) if mask == "input" else (32, length // 32)
    generator = torch.Generator().manual_seed(20)
    seeds = torch.randint(-(2**63), 2**63 - 1, (2, steps), generator=generator).to(device)
    layers = torch.stack([
        torch.stack([mask_of(shape, seed, p, mask, backend).view(-1) for seed in layer_seeds]) for layer_seeds in seeds
    ])  # fmt: skip
    layers = layers.cpu().double()
    where = f"mask={mask!r}, p={p}, weight {shape}, {steps} steps of 2 layers on {device}"
    q = 1 - reference.threshold(p) / 2**32
    first, second = layers

    assert_normal("kept fraction", layers.sum(), layers.numel() * q, layers.numel() * p * q, where)
    for name, counts in (("a step", layers.sum(-1)), ("an entry", layers.sum(1))):
        trials = layers.numel() / counts.numel()
        squares = ((counts - trials * q) ** 2 / (trials * p * q)).sum()
        assert_chi_square(f"variance of the number kept by {name}", squares, counts.numel(), where)
    assert_patterns("four neighbours", layers.view(-1, 4), q, where)
    pairs = {f"entries {lag} apart": (layers[..., :-lag], layers[..., lag:]) for lag in (1, 2, 4, 8, 16, 32)}
    pairs["steps"] = (layers[:, :-1], layers[:, 1:])
    pairs["layers"] = (first, second)
    for name, (a, b) in pairs.items():
        covariance = ((a - q) * (b - q)).sum()
        assert_normal(f"independence of {name}", covariance, 0.0, a.numel() * (p * q) ** 2, where)


def assert_patterns(what: str, groups: Tensor, q: float, where: object) -> None:
    """χ² test of the 2^n patterns of kept entries in groups (G, n), where entries are kept with probability q."""
    size = groups.shape[1]
    codes = (groups.long() * (2 ** torch.arange(size))).sum(1)
    seen = torch.bincount(codes, minlength=2**size).double()
    kept = torch.tensor([bin(code).count("1") for code in range(2**size)], dtype=torch.float64)
    expected = len(groups) * q**kept * (1 - q) ** (size - kept)
    assert_chi_square(f"patterns of {what}", ((seen - expected) ** 2 / expected).sum(), 2**size - 1, where)


def assert_normal(what: str, value: Tensor, mean: float, variance: float, where: object) -> None:
    z = (float(value) - mean) / math.sqrt(variance)
    _assert_likely(what, f"{z:.2f} standard deviations off", math.erfc(abs(z) / math.sqrt(2)), where)


def assert_chi_square(what: str, value: Tensor, degrees: int, where: object) -> None:
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    above = torch.special.gammaincc(half, value.double() / 2).item()
    _assert_likely(what, f"χ² {float(value):.1f} for {degrees} degrees", 2 * min(above, 1 - above), where)


def _assert_likely(what, how, probability, where):
    if not probability > SIGNIFICANCE:
        raise AssertionError(f"{what}: {how}, which has probability {probability:.1e}: {where}")


def is_one_pass(case: Case, backend: str | None) -> tuple[bool, bool]:
    """Whether the backend computes y, and whether dX, in one pass, whose summation order is its own."""
    module = _module(backend, case)
    if not hasattr(module, "one_pass_rows"):
        return False, False
    forward, backward = module.one_pass_rows(case.compute, len(case.weight))
    return len(case.rows) <= forward, len(case.rows) <= backward


def _module(backend: str | None, case: Case) -> ModuleType:
    return backends.select(backend, case.weight.device.type)


def checks(
    device: str | torch.device = "cpu", backend: str | None = None, seed: int = 0
) -> Iterator[tuple[str, Callable]]:
    """(name, function without arguments) of every check, for one device and backend. `seed` chooses the inputs."""
    for mask in MASKS:
        yield f"gradcheck, float64, {mask} mask", functools.partial(check_gradients, mask, device, backend)
        yield f"threshold, {mask} mask", functools.partial(check_threshold, mask, device, backend)
    for dtype, compute in PRECISIONS:
        name = f"{dtype}" if dtype == compute else f"{dtype} -> {compute}"
        for mask in MASKS:
            options = {"mask": mask, "dtype": dtype, "compute": compute, "device": device}
            for kind, function in (("bits", _check_bits), ("exact", _check_exact), ("error", _check_error)):
                yield (
                    f"{kind}, {name.replace('torch.', '')}, {mask} mask",
                    functools.partial(function, backend, seed, options),
                )
    for mask in MASKS:
        for p in (0.1, 0.5, 0.9):
            name = f"mask statistics, {mask} mask, p={p}"
            yield name, functools.partial(check_mask_statistics, mask, p, device, backend)


def _check_bits(backend: str | None, seed: int, options: dict) -> None:
    for p in (0.1, 0.9, 1.0):
        check_mixed_weight(special_case(p=p, seed=seed, **options), backend)
    for shape in SHAPES:
        for p in (0.1, 0.9, 1.0):
            check_all_bits(random_case(*shape, p=p, seed=seed, **options), backend)


def _check_exact(backend: str | None, seed: int, options: dict) -> None:
    for shape in SHAPES:
        for p in (0.5, 0.75):
            check_exact(integer_case(*shape, p=p, seed=seed, **options), backend)


def _check_error(backend: str | None, seed: int, options: dict) -> None:
    for shape in SHAPES:
        for p in (0.1, 0.9):
            check_error(error_cases(random_case, shape, seed, p=p, **options), backend)
