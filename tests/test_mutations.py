"""The checks find broken backends: each mistake that a kernel could make fails at least one of them."""

import inspect
import itertools

import pytest
import torch

from mixout_fast import reference, testing


def failures():
    for name, check in testing.checks("cpu", "broken"):
        try:
            check()
        except AssertionError:
            yield name


def column_major(seed, shape, p, mask):
    if mask == "input":
        return reference.keep_mask(seed, shape, p, mask)
    return reference.keep_mask(seed, (shape[1], shape[0]), p, mask).t()


def mix_with_fewer_roundings(weight, target, seed, p, mask, dtype):
    return reference.mix(weight.double(), None if target is None else target.double(), seed, p, mask, dtype)


def mix_cast_first(weight, target, seed, p, mask, dtype):
    return reference.mix(weight.to(dtype), None if target is None else target.to(dtype), seed, p, mask, dtype)


def mix_by_multiplication(weight, target, seed, p, mask, dtype):
    keep = reference.keep_mask(seed, weight.shape, p, mask).to(reference.compute_dtype(weight.dtype))
    w, u = weight.to(keep.dtype), torch.zeros_like(keep) if target is None else target.to(keep.dtype)
    return (u + (w - u) * keep * reference.scale(p)).to(dtype).contiguous()


def mix_swapped(weight, target, seed, p, mask, dtype):
    target = torch.zeros_like(weight) if target is None else target
    return reference.mix(target, weight, seed, p, mask, dtype)


def mix_without_last_column(weight, target, seed, p, mask, dtype):
    mixed = reference.mix(weight, target, seed, p, mask, dtype)
    mixed[..., -1] = torch.nan
    return mixed


def linear_with(**replaced):
    """The reference's linear with the arguments named in `replaced` changed."""

    def linear(*arguments):
        named = inspect.signature(reference.linear).bind(*arguments).arguments
        return reference.linear(**named | {name: change(named[name]) for name, change in replaced.items()})

    return linear


def linear_gathering_shifted(input, *arguments):
    output, index, columns = reference.linear(input, *arguments)
    return output, index, None if columns is None else columns.roll(1, 0)


def grad_input_unmixed(grad, weight, target, seed, p, mask):
    return grad.mm(weight.to(grad.dtype))


def grad_input_rounding_w_first(grad, weight, target, seed, p, mask):
    target = None if target is None else target.to(grad.dtype)
    return reference.grad_input(grad, weight.to(grad.dtype), target, seed, p, mask)


def grad_weight_uncleared(columns, grad, index, in_features, factor, dtype):
    dense = reference.grad_weight(columns, grad, index, in_features, factor, dtype)
    dropped = torch.ones(in_features, dtype=torch.bool).index_fill(0, index[index >= 0].long(), False)
    dense[:, dropped] = torch.nan
    return dense


def gradients_with_db_always(*arguments):
    *arguments, (dX, dW, _), static = arguments
    return reference.gradients(*arguments, (dX, dW, True), static)


def gradients_losing_the_last_row_of_dx_beside_dw(*arguments):
    dX, dW, db = reference.gradients(*arguments)
    if dX is not None and dW is not None:
        dX[-1:] = 0
    return dX, dW, db


# the mistake, the function of the reference that makes it, that function's broken form
MUTATIONS = (
    ("p is off by a thousandth", "threshold", lambda p: reference.threshold(max(0.0, p - 0.001))),
    ("1 - p for p", "threshold", lambda p: reference.threshold(1 - p)),
    ("threshold off by 2^-24", "threshold", lambda p: reference.threshold(p) + 2**8),
    ("seed ignored", "mask_words", lambda seed, count: reference.mask_words(seed * 0, count)),
    ("high half of the seed ignored", "mask_words", lambda seed, n: reference.mask_words(seed & reference.LOW32, n)),
    ("mask shifted by one", "mask_words", lambda seed, count: reference.mask_words(seed, count + 1)[1:]),
    ("words in reverse", "mask_words", lambda seed, count: reference.mask_words(seed, count).flip(0)),
    ("counter stuck", "mask_words", lambda seed, n: reference.mask_words(seed, 4).repeat(n // 4 + 1)[:n]),
    ("nine rounds", "philox4x32", lambda counter, key: reference.philox4x32(counter, key, rounds=9)),
    ("element mask column-major", "keep_mask", column_major),
    ("no rescale", "scale", lambda p: 1.0),
    ("rescale by 1/p", "scale", lambda p: 1 / p),
    ("W and U swapped", "mix", mix_swapped),
    ("cast before mixing", "mix", mix_cast_first),
    ("fused multiply-add", "mix", mix_with_fewer_roundings),
    ("0 · inf where dropped", "mix", mix_by_multiplication),
    ("last column not written", "mix", mix_without_last_column),
    ("bias left out", "linear", linear_with(bias=lambda bias: None)),
    ("y of the next seed", "linear", linear_with(seed=lambda seed: seed + 1)),
    ("y rounds W first", "linear", linear_with(weight=lambda weight: weight.bfloat16().to(weight.dtype))),
    ("columns beside y shifted", "linear", linear_gathering_shifted),
    ("dX of W", "grad_input", grad_input_unmixed),
    ("dX rounds W and U first", "grad_input", grad_input_rounding_w_first),
    ("compact gradient not scaled", "grad_weight", lambda c, g, i, k, _, d: reference.grad_weight(c, g, i, k, 1.0, d)),
    ("compact gradient not cleared", "grad_weight", grad_weight_uncleared),
    ("compact gradient shifted", "grad_weight", lambda *arguments: reference.grad_weight(*arguments).roll(1, 1)),
    ("compact gradient of other rows", "grad_weight", lambda c, *a: reference.grad_weight(c.flip(0), *a)),
    ("dense gradient not scaled", "mask_grad", lambda g, s, p, m, _, d: reference.mask_grad(g, s, p, m, 1.0, d)),
    ("dense gradient not masked", "mask_grad", lambda g, s, p, m, f, d: (g * f).to(d)),
    ("indices of int64", "kept_indices", lambda *arguments: reference.kept_indices(*arguments).long()),
    ("db though it is not needed", "gradients", gradients_with_db_always),
    ("the last row of dX lost beside dW", "gradients", gradients_losing_the_last_row_of_dx_beside_dw),
    ("columns of x shifted", "gather", lambda x, *arguments: reference.gather(x.roll(1, 1), *arguments)),
)


def test_the_copy_without_a_mistake_passes(broken):
    assert not list(failures())


@pytest.mark.parametrize(("function", "mistake"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_mistake_fails_a_check(function, mistake, broken, monkeypatch):
    monkeypatch.setattr(broken, function, mistake)
    assert next(failures(), None)


def test_a_mask_drawn_afresh_in_backward_fails_a_check(broken, monkeypatch):
    calls = itertools.count()

    def words(seed, count):
        return reference.mask_words(seed + next(calls), count)

    monkeypatch.setattr(broken, "mask_words", words)
    assert next(failures(), None)
