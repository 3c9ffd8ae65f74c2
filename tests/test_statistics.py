"""Masks are Bernoulli(1 - p) and independent, over entries, steps and layers."""

import math

import pytest
import torch
from parameters import masks

from mixout_fast import MixLinear, mixout, testing


def mask_of_a_step(layer):
    """The kept entries that one forward draws: y of the unit vectors is W'ᵀ, and W is 1 and U is 0."""
    return layer(torch.eye(layer.in_features, device=layer.weight.device)).t() != 0


def layer_of_ones(in_features, out_features, p, mask, device, backend):
    layer = MixLinear(in_features, out_features, False, None, p, mask=mask, device=device, backend=backend)
    torch.nn.init.ones_(layer.weight)
    return layer.requires_grad_(False)


@masks
@pytest.mark.parametrize("p", (0.05, 0.1, 0.5, 0.7, 0.9))
def test_mean_variance_and_independence(mask, p, device, backend):
    testing.check_mask_statistics(mask, p, device, backend)


@masks
def test_neighbouring_seeds_are_independent(mask, device, backend):
    shape, p = (1, 4096) if mask == "input" else (64, 64), 0.5
    kept = [testing.mask_of(shape, torch.tensor(s, device=device), p, mask, backend).view(-1) for s in range(-16, 16)]
    kept = torch.stack(kept).cpu().double()
    testing.assert_patterns(
        "eight neighbouring seeds", kept.view(-1, 8, 4096).transpose(1, 2).reshape(-1, 8), 0.5, mask
    )


@masks
def test_layers_and_steps_draw_their_own_masks(mask, device, backend):
    """With a fixed seed: a check of likelihood must not fail by chance."""
    torch.manual_seed(0)
    p, size, steps = 0.5, 64, 50
    layers = [layer_of_ones(size, size, p, mask, device, backend) for _ in range(2)]
    rows = 1 if mask == "input" else size
    kept = torch.stack([torch.stack([mask_of_a_step(layer)[:rows] for layer in layers]) for _ in range(steps)])
    kept = kept.view(steps, 2, -1).cpu()
    assert len(kept.view(2 * steps, -1).unique(dim=0)) == 2 * steps
    testing.assert_patterns("two layers", kept.transpose(1, 2).reshape(-1, 2).double(), 1 - p, mask)
    testing.assert_patterns("two steps", torch.stack((kept[:-1], kept[1:]), -1).view(-1, 2).double(), 1 - p, mask)


@masks
@pytest.mark.parametrize("p", (0.001, 0.999))
def test_extreme_p(mask, p, device, backend):
    shape, draws = (1, 4096) if mask == "input" else (64, 64), 64
    kept = sum(
        int(testing.mask_of(shape, torch.tensor(s, device=device), p, mask, backend).sum()) for s in range(draws)
    )
    trials = 4096 * draws
    testing.assert_normal("kept", kept, trials * (1 - p), trials * p * (1 - p), f"mask={mask!r}, p={p}")


@masks
@pytest.mark.parametrize("p", (0.3, 0.9))
def test_the_mixed_weight_is_the_weight_on_average(mask, p, device, backend):
    """E[W'] = W and Var[W'] = (W - U)² p / (1 - p), so the means of independently drawn entries give a χ²."""
    draws = 400
    case = testing.random_case(1, 257, 1, p=p, mask=mask, dtype=torch.float64, device=device, seed=1)
    seeds = torch.arange(draws, device=device)
    mixed = torch.stack([
        mixout(case.weight, case.target, p, True, mask=mask, seed=seed, backend=backend) for seed in seeds
    ])  # fmt: skip
    variance = (case.weight - case.target) ** 2 * p / (1 - p)
    squares = (mixed.mean(0) - case.weight) ** 2 / (variance / draws)
    testing.assert_chi_square("E[W'] = W", squares.sum().cpu(), squares.numel(), case)
    ratio = (mixed - case.weight).square().sum(0) / variance
    spread = math.sqrt(draws * squares.numel() * (p**3 + (1 - p) ** 3) / (p * (1 - p)))
    testing.assert_normal("Var[W']", ratio.sum().cpu(), draws * squares.numel(), spread**2, case)


@masks
def test_manual_seed_governs_masks(mask, device, backend):
    layer = layer_of_ones(64, 64, 0.5, mask, device, backend)
    torch.manual_seed(1)
    first, second = mask_of_a_step(layer), mask_of_a_step(layer)
    torch.manual_seed(1)
    assert torch.equal(mask_of_a_step(layer), first)
    assert torch.equal(mask_of_a_step(layer), second)
    torch.manual_seed(2)
    assert not torch.equal(mask_of_a_step(layer), first)
