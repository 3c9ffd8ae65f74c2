"""mixout(): the mixed weight alone, for vectors, matrices and convolutions, in place or not."""

import pytest
import torch
from parameters import masks
from torch.nn import functional as F

from mixout_fast import mixout, reference, testing
from mixout_fast.functional import DTYPES

SHAPES = ((17,), (1,), (5, 17), (5, 17, 3), (5, 17, 3, 2), (5, 1, 3, 3), (1, 17, 1, 2, 3))
SHAPES += ((1, 70, 300), (2, 9, 300))  # many neighbours in memory share a mask entry


def operands(shape, dtype, device):
    weight, target = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return weight, target, torch.randint(2**62, (), device=device)


def expected_keep(shape, seed, p, mask):
    """One draw per element; with the input mask per entry of a vector, else per input channel (dimension 1)."""
    if mask == "element" or len(shape) == 1:
        return (reference.mask_words(seed, torch.Size(shape).numel()) >= round(p * 2**32)).view(shape)
    keep = reference.mask_words(seed, shape[1]) >= round(p * 2**32)
    return keep.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)


@masks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kept_entries_are_rescaled_and_others_are_the_targets(shape, dtype, mask, device, backend):
    weight, target, seed = operands(shape, dtype, device)
    p = 0.6
    mixed = mixout(weight, target, p, True, mask=mask, seed=seed, backend=backend)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rescaled = target.to(compute) + (weight.to(compute) - target.to(compute)) * (1 / (1 - p))
    want = torch.where(expected_keep(shape, seed, p, mask), rescaled.to(dtype), target)
    testing.assert_same_bits("mixout", mixed, want, f"{shape}, {dtype}, mask={mask!r}")
    assert mixed.is_contiguous()


@masks
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_is_the_mask_over_one_minus_p(shape, mask, device, backend):
    weight, target, seed = operands(shape, torch.float32, device)
    mixed = mixout(weight.requires_grad_(), target, 0.75, True, mask=mask, seed=seed, backend=backend)
    grad = torch.randn(shape, device=device)
    mixed.backward(grad)
    want = torch.where(expected_keep(shape, seed, 0.75, mask), 4 * grad, 0.0)
    testing.assert_same_bits("gradient", weight.grad, want, f"{shape}, mask={mask!r}")


@masks
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_strides_number_the_entries_the_same(shape, mask, device, backend):
    weight, target, seed = operands(shape, torch.float32, device)
    options = {"mask": mask, "seed": seed, "backend": backend}
    want = mixout(weight, target, 0.5, True, **options)
    reverse = tuple(reversed(range(len(shape))))
    strided = [t.permute(reverse).contiguous().permute(reverse) for t in (weight, target)]
    for w, u in ((strided[0], target), (weight, strided[1]), strided):
        testing.assert_same_bits("mixout", mixout(w, u, 0.5, True, **options), want, f"{shape}, mask={mask!r}")
    weight = strided[0].requires_grad_()
    (grad,) = torch.autograd.grad(mixout(weight, None, 0.5, True, **options).sum(), weight)
    keep = expected_keep(shape, seed, 0.5, mask)
    testing.assert_same_bits("gradient", grad, 2.0 * keep, f"{shape}, mask={mask!r}")


@masks
def test_one_by_one_convolution_in_channels_last(mask, device, backend):
    """The last dimensions have size 1, so their strides may be anything."""
    weight, _, seed = operands((5, 17, 1, 1), torch.float32, device)
    options = {"mask": mask, "seed": seed, "backend": backend}
    want = mixout(weight, None, 0.5, True, **options)
    weight = weight.to(memory_format=torch.channels_last).requires_grad_()
    mixed = mixout(weight, None, 0.5, True, **options)
    testing.assert_same_bits("mixout", mixed, want, mask)
    ones = torch.ones_like(mixed).to(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(mixed, weight, ones)
    testing.assert_same_bits("gradient", grad, 2.0 * expected_keep(weight.shape, seed, 0.5, mask), mask)


@masks
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inplace_writes_the_same_into_its_input(shape, mask, device, backend):
    weight, target, seed = operands(shape, torch.float32, device)
    options = {"mask": mask, "seed": seed, "backend": backend}
    want = mixout(weight, target, 0.5, True, **options)
    parameter = torch.nn.Parameter(weight.clone())
    with torch.no_grad():
        assert mixout(parameter, target, 0.5, True, True, **options) is parameter
    assert mixout(weight, target, 0.5, True, True, **options) is weight
    for written in (weight, parameter.detach()):
        testing.assert_same_bits("mixout in place", written, want, f"{shape}, mask={mask!r}")


def test_eval_and_p_zero_return_the_input_itself(device, backend):
    weight, target, _ = operands((5, 17), torch.float32, device)
    assert mixout(weight, target, 0.5, backend=backend) is weight, "training is False by default, as published"
    assert mixout(weight, target, 0.0, True, backend=backend) is weight
    assert mixout(weight[:0], target[:0], 0.5, True, backend=backend).shape == (0, 17)


@masks
def test_p_one_is_the_target(mask, device, backend):
    weight, target, _ = operands((5, 17), torch.float32, device)
    mixed = mixout(weight.requires_grad_(), target, 1.0, True, mask=mask, backend=backend)
    assert torch.equal(mixed, target)
    mixed.sum().backward()
    assert not weight.grad.any()


@masks
def test_a_convolution_trains_through_it(mask, device, backend):
    """No weight of a dropped input channel gets a gradient; every weight of a kept channel does."""
    x, weight = torch.randn(2, 17, 8, 8, device=device), torch.randn(5, 17, 3, 3, device=device, requires_grad=True)
    mixed = mixout(weight, None, 0.5, True, mask=mask, seed=1, backend=backend)
    F.conv2d(x, mixed).sum().backward()
    dropped = ~expected_keep(weight.shape, torch.tensor(1, device=device), 0.5, mask)
    assert not weight.grad[dropped].any()
    assert weight.grad[~dropped].all()


def test_an_int_seed_is_the_tensor_seed(device, backend):
    weight, target, _ = operands((5, 17), torch.float32, device)
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        as_int = mixout(weight, target, 0.5, True, seed=seed, backend=backend)
        tensor = torch.tensor(seed, device=device)
        assert torch.equal(as_int, mixout(weight, target, 0.5, True, seed=tensor, backend=backend))


@masks
@pytest.mark.parametrize("p", (0.2, 0.7))
def test_gaussian_has_mean_one_and_bernoullis_variance(mask, p, device):
    """m / mean is normal, with a kurtosis of 3: its squared deviation from 1 has the variance 2 σ⁴."""
    count = 100_000
    weight = torch.ones((1, count) if mask == "input" else (100, count // 100), dtype=torch.float64, device=device)
    mixed = mixout(weight, None, p, True, mask=mask, distribution="gaussian", seed=3)
    variance = p / (1 - p)
    testing.assert_normal("mean", mixed.sum().cpu(), count, count * variance, f"p={p}")
    testing.assert_normal(
        "variance", (mixed - 1).square().sum().cpu(), count * variance, 2 * count * variance**2, f"p={p}"
    )


def test_gaussian_result_of_a_transposed_weight_is_contiguous(device):
    assert mixout(torch.ones(5, 17, device=device).t(), None, 0.5, True, distribution="gaussian").is_contiguous()


@masks
def test_gaussian_gradient(mask, device, seed):
    case = testing.random_case(3, 7, 5, p=0.5, mask=mask, dtype=torch.float64, device=device, seed=seed)
    torch.autograd.gradcheck(
        lambda weight: mixout(weight, case.target, 0.5, True, mask=mask, distribution="gaussian", seed=case.seed),
        case.weight.requires_grad_(),
    )
