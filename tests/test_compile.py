"""torch.compile: one graph, forward and backward, with fresh masks at every call."""

import pytest
import torch
from parameters import masks
from torch import nn

from mixout_fast import MixLinear, mix_linear, mixout, testing

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@masks
def test_compiled_results_are_the_eager_ones(mask, device, backend, seed):
    """On exact inputs: a compiler may sum in any order. The second number of rows compiles a dynamic shape."""

    def step(x, weight, target, bias, mask_seed, grad):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = compiled(*leaves[:2], target, leaves[2], mask_seed)
        return (y.detach(), *torch.autograd.grad(y, leaves, grad))

    compiled = torch.compile(
        lambda x, weight, target, bias, mask_seed: mix_linear(
            x, weight, target, bias, 0.75, mask=mask, seed=mask_seed, backend=backend
        ),
        fullgraph=True,
    )
    for shape in ((3, 33, 17), (255, 33, 17), (256, 33, 17)):
        case = testing.integer_case(*shape, p=0.75, mask=mask, device=device, seed=seed)
        got = step(case.input, case.weight, case.target, case.bias, case.seed, case.grad_output)
        for (name, want), result in zip(testing.oracle(case).items(), got, strict=True):
            testing.assert_same_values(f"{name}, compiled", result, want.float(), case)


@masks
def test_every_call_draws_a_fresh_mask_that_backward_shares(mask, device, backend):
    layer = MixLinear(64, 64, False, None, 0.5, mask=mask, device=device, backend=backend)
    nn.init.ones_(layer.weight)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.eye(64, device=device)
    seen = []
    for _ in range(20):
        mixed = compiled(x)
        (grad,) = torch.autograd.grad(mixed.sum(), layer.weight)
        assert torch.equal(grad, mixed.t()), "W = 1 and x = 1: both are m / (1 - p)"
        seen.append(mixed.detach().flatten())
    assert len(torch.stack(seen).unique(dim=0)) == len(seen)


@masks
def test_mixout_compiles(mask, device, backend):
    weight, target = (torch.randn(5, 17, 3, device=device) for _ in range(2))
    compiled = torch.compile(
        lambda weight, seed: mixout(weight, target, 0.5, True, mask=mask, seed=seed, backend=backend), fullgraph=True
    )
    weight.requires_grad_()
    for seed in torch.arange(3, device=device):
        results = []
        for function in (compiled, lambda w, s: mixout(w, target, 0.5, True, mask=mask, seed=s, backend=backend)):
            mixed = function(weight, seed)
            results.append((mixed, *torch.autograd.grad(mixed.sum(), weight)))
        for ours, eager in zip(*results, strict=True):
            testing.assert_same_bits("compiled", ours, eager, f"mask={mask!r}, seed={seed}")


def test_a_seed_that_is_given_survives_recomputation_under_a_memory_budget(device, backend):
    """With a budget below 1 torch may draw the graph's random numbers again in backward; a given seed is an input."""
    weight = torch.ones(64, 64, device=device, requires_grad=True)
    x = torch.eye(64, device=device)

    def step(weight, first, second):
        hidden = mix_linear(x, weight, p=0.5, seed=first, backend=backend).sin()
        return mix_linear(hidden, weight, p=0.5, seed=second, backend=backend).cos()

    seeds = torch.arange(2, device=device)
    gradients = []
    with torch._functorch.config.patch(activation_memory_budget=0.1):
        for function in (step, torch.compile(step, fullgraph=True)):
            gradients.append(torch.autograd.grad(function(weight, *seeds).sum(), weight)[0])
    testing.assert_same_bits("zeros of the gradient", gradients[1] == 0, gradients[0] == 0, "budget 0.1")
