"""Agreement of every backend with the reference, by the rules of CONTRIBUTING.md."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from parameters import masks, precisions
from torch.nn import functional as F

from mixout_fast import backends, mix_linear, reference, testing
from mixout_fast.backends import triton

shapes = pytest.mark.parametrize("shape", testing.SHAPES, ids=lambda shape: "x".join(map(str, shape)))


@pytest.fixture
def make(dtype, compute, mask, device, seed):
    def make(maker, *shape, **options):
        options = {"seed": seed} | options
        return maker(*shape, mask=mask, dtype=dtype, compute=compute, device=device, **options)

    return make


@shapes
@precisions
@masks
@pytest.mark.parametrize("p", (0.1, 0.9, 1.0))
def test_bits_of_mask_mixed_weight_and_gradient_layout(make, shape, p, mask, backend, path):
    for target in (True, False):
        case = make(testing.random_case, *shape, p=p, target=target)
        testing.check_mask(case, backend)
        testing.check_mixed_weight(case, backend)
        testing.check_mask_grad(case, backend)
        if mask == "input":
            testing.check_gather(case, backend)
            testing.check_grad_weight(case, backend)


@shapes
@precisions
@masks
@pytest.mark.parametrize("p", (0.1, 0.9))
def test_each_gradient_is_the_same_alone(make, shape, p, backend, path):
    testing.check_each_gradient_alone(make(testing.random_case, *shape, p=p), backend)


@precisions
@masks
@pytest.mark.parametrize("p", (0.0001, 0.3, 0.5, 0.9))
def test_bits_of_special_values(make, p, backend):
    case = make(testing.special_case, p=p)
    testing.check_mixed_weight(case, backend)
    testing.check_mixed_weight(dataclasses.replace(case, target=None), backend)

    mixed = backends.BACKENDS[backend].mix(case.weight, case.target, case.seed, p, case.mask, case.compute)
    dropped = ~reference.keep_mask(case.seed, case.weight.shape, p, case.mask).expand(case.weight.shape)
    testing.assert_same_bits("dropped entries", mixed[dropped], case.target[dropped].to(case.compute), case)


@pytest.mark.parametrize("compute", testing.AUTOCAST_DTYPES)
def test_fp32_is_rounded_to_nearest_even_once(compute, device, backend):
    """Every tie between neighbouring 16-bit values, and the fp32 values beside it, for dropped and for kept entries."""
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(compute)
    every = every[every.isfinite()].float()
    steps = (every.to(compute).view(torch.int16) + 1).view(compute).float() - every
    ties = every + steps / 2
    weight = torch.stack((every, ties, ties.nextafter(every), ties.nextafter(every + steps)))
    # With W == U an infinity gives inf - inf = NaN, and -0 gives u + 0 = +0.
    weight = torch.where((weight == 0) | weight.isinf(), 1.0, weight)
    seed = torch.tensor(3, device=device)
    for p in (0.5, 1.0):
        mixed = backends.BACKENDS[backend].mix(weight, weight, seed, p, "element", compute)
        testing.assert_same_bits("W' of W == U", mixed, weight.to(compute), f"{compute}, p={p}")


def test_one_entry_by_hand(device, backend):
    """u = 1, w = 1 + 2^-23, s = 1/(1 - 0.9): d·s = 10 · 2^-23 after rounding, so w' = 1 + 10 · 2^-23."""
    weight, target = torch.full((64,), 1 + 2**-23, device=device), torch.ones(64, device=device)
    mixed = backends.BACKENDS[backend].mix(
        weight[None], target[None], torch.tensor(0, device=device), 0.9, "element", torch.float32
    )
    assert set(mixed.unique().tolist()) == {1.0, 1 + 10 * 2**-23}


@shapes
@precisions
@masks
@pytest.mark.parametrize("p", (0.5, 0.75))
def test_exact_inputs_have_exact_results(make, shape, p, backend, path):
    for options in ({}, {"target": False}, {"bias": False}):
        testing.check_exact(make(testing.integer_case, *shape, p=p, **options), backend)


@shapes
@precisions
@masks
@pytest.mark.parametrize("p", (0.1, 0.9))
def test_products_after_mixing_have_the_bits_of_the_library_and_all_repeat(make, shape, p, backend, path):
    case = make(testing.random_case, *shape, p=p)
    assert testing.is_one_pass(case, backend) == (path == "one_pass",) * 2
    testing.check_output(case, backend)
    testing.check_repeatable(case, backend)


@shapes
@precisions
@masks
@pytest.mark.parametrize("p", (0.1, 0.9))
def test_error_is_at_most_twice_the_librarys(dtype, compute, mask, shape, p, device, backend, path, seed):
    options = {"p": p, "mask": mask, "dtype": dtype, "compute": compute, "device": device}
    testing.check_error(testing.error_cases(testing.random_case, shape, seed, **options), backend)


@shapes
@precisions
@masks
def test_weight_equal_to_target_changes_nothing(make, shape, backend, path):
    """So the first forward of a finetuning run is the pretrained model's."""
    for p in (0.1, 0.9):
        case = make(testing.random_case, *shape, p=p)
        # + 0 turns -0 into +0, as mixing does by u + 0.
        case = dataclasses.replace(case, weight=case.weight + 0, target=case.weight + 0)
        mixed = backends.BACKENDS[backend].mix(case.weight, case.target, case.seed, p, case.mask, case.compute)
        testing.assert_same_bits("W' of W == U", mixed, case.weight.to(case.compute), case)
        if path == "mixed_first":
            dtype = testing.product_dtype(case, backend)
            plain = F.linear(*(t.to(case.compute).to(dtype) for t in (case.input, case.weight, case.bias)))
            testing.assert_same_bits("y of W == U", testing.run(case, backend)["y"], plain.to(case.compute), case)


COLUMN_SHAPES = ((12, 70, 300), (130, 520, 72), (33, 1100, 17), (255, 33, 257))
"""With whole vectors and parts of them, with one block of outputs or of in_features and with several."""
if triton.INTERPRETS:
    # W is mixed first there, and y is the library's product. With 5, 9 or 11 rows and two threads MKL's has up to 2.6
    # times the error from a column-major weight that it has from a row-major one, with 13 the same.
    COLUMN_SHAPES = ((13, 17, 259),)

column_shapes = pytest.mark.parametrize("shape", COLUMN_SHAPES, ids=lambda shape: "x".join(map(str, shape)))


@column_shapes
@precisions
@masks
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_column_major_weights_are_mixed_as_row_major_ones(make, shape, p, mask, backend, path):
    """dW has the weight's layout too: otherwise autograd copies it into the layout of the parameter that W views."""
    case = testing.column_major(make(testing.random_case, *shape, p=p))
    if mask == "input":
        testing.check_grad_weight(case, backend)
    testing.check_mixed_weight(case, backend)
    testing.check_mask_grad(case, backend)
    testing.check_each_gradient_alone(case, backend)
    testing.check_repeatable(case, backend)
    identity = torch.eye(shape[1], dtype=case.input.dtype, device=case.weight.device)
    mixed = dataclasses.replace(case, input=identity, bias=None, grad_output=case.weight.t().to(case.compute))
    want = reference.mix(case.weight, case.target, case.seed, p, mask, case.compute).t()
    testing.assert_same_values("y of x = 1", testing.run(mixed, backend)["y"], want, case)
    if mask == "input" and backend != "reference":
        # Not from a leaf's grad, which autograd copies into the leaf's layout.
        draw, dW_alone = (case.seed, p, mask, 2.0), ((False, True, False), False)
        x, gradients = case.input.to(case.compute), backends.BACKENDS[backend].gradients
        for target, strides in ((case.target, case.weight.stride()), (case.target.contiguous(), (shape[1], 1))):
            _, dW, _ = gradients(case.grad_output, x, None, None, case.weight, target, *draw, *dW_alone)
            assert dW.stride() == strides
    if p == 0.5:
        case = testing.column_major(make(testing.integer_case, *shape, p=p))
        testing.check_exact(case, backend)
        testing.check_exact(dataclasses.replace(case, target=case.target.contiguous()), backend)


@column_shapes
@precisions
@masks
@pytest.mark.parametrize("p", (0.1, 0.9))
def test_error_of_column_major_weights(dtype, compute, mask, shape, p, device, backend, path, seed):
    options = {"p": p, "mask": mask, "dtype": dtype, "compute": compute, "device": device}
    cases = testing.error_cases(testing.random_case, shape, seed, **options)
    testing.check_error(map(testing.column_major, cases), backend)


@masks
def test_p_one_is_the_target_and_gives_no_gradient_to_the_weight(mask, device, backend, seed):
    case = testing.random_case(17, 255, 3, p=1.0, mask=mask, device=device, seed=seed)
    results = testing.run(case, backend)
    assert results["dW"].count_nonzero() == 0
    frozen = dataclasses.replace(case, weight=torch.full_like(case.weight, torch.inf))
    testing.assert_same_bits("y of infinite W", testing.run(frozen, backend)["y"], results["y"], case)


@masks
def test_p_of_almost_zero_and_almost_one(mask, device, backend, seed):
    """p below 2^-33 drops nothing, 1 - p below 2^-33 keeps nothing, and neither divides by zero."""
    for p, keeps in ((1e-12, True), (1 - 1e-12, False)):
        case = testing.random_case(17, 255, 3, p=p, mask=mask, device=device, seed=seed)
        testing.check_mixed_weight(case, backend)
        results = testing.run(case, backend)
        assert results["dW"].isfinite().all()
        assert (results["dW"] != 0).all() == keeps
        assert results["dW"].any() == keeps


def test_p_zero_and_eval_are_the_plain_linear(device, backend, seed):
    case = testing.random_case(17, 255, 3, p=0.0, device=device, seed=seed)
    want = F.linear(case.input, case.weight, case.bias)
    for p, training in ((0.0, True), (0, True), (0.5, False)):
        state = torch.get_rng_state()
        got = mix_linear(case.input, case.weight, case.target, case.bias, p, training, backend=backend)
        testing.assert_same_bits(f"y at p={p}, training={training}", got, want, case)
        assert torch.equal(torch.get_rng_state(), state), "no seed is drawn"


@masks
def test_infinite_inputs_of_dropped_neurons_do_not_reach_the_gradient(mask, device, backend, seed):
    """dW is zero, not NaN, where the mask is zero, whatever dYᵀX holds there."""
    case = testing.random_case(17, 255, 3, p=0.5, mask=mask, device=device, seed=seed)
    case.input.fill_(torch.inf)
    dropped = ~reference.keep_mask(case.seed, case.weight.shape, 0.5, mask).expand(case.weight.shape)
    assert not testing.run(case, backend)["dW"][dropped].any()


def test_accurate_product_is_exact_where_fp64_is_not():
    """The oracle of fp64: 2^60 + 1 - 2^60 = 1, and a product of 53-bit numbers rounded once."""
    row = torch.tensor([[2.0**30, 1.0, -(2.0**30)]], dtype=torch.float64)
    column = torch.tensor([[2.0**30], [1.0], [2.0**30]], dtype=torch.float64)
    assert testing.accurate_mm(row, column).item() == 1.0
    a, b = 1 + 2.0**-52, 1 - 2.0**-53
    x = torch.tensor([[a, -1.0]], dtype=torch.float64)
    y = torch.tensor([[b], [1.0]], dtype=torch.float64)
    assert testing.accurate_mm(x, y).item() == 2.0**-53 - 2.0**-105


def test_accurate_product_is_scaled_before_it_is_rounded():
    x, y = torch.randn(17, 1, dtype=torch.float64), torch.randn(1, 17, dtype=torch.float64)
    factor = reference.scale(0.1)
    exact = [[float(Fraction(a) * Fraction(b) * Fraction(factor)) for b in y[0].tolist()] for a in x[:, 0].tolist()]
    assert testing.accurate_mm(x, y, factor).tolist() == exact
