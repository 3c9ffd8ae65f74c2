"""wdecay: decay toward a target as a hook of the optimizer."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mixout_fast import apply_mixout, testing, wdecay


@pytest.fixture
def model(device):
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(device)


@pytest.fixture
def x(device):
    return torch.randn(4, 7, device=device)


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model):
    """The model with small integers as weights, on which a step of a power of two is exact."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-8, 9, parameter.shape))
    return model


def test_toward_zero_decoupled_is_adamws(model, x):
    other = copy.deepcopy(model)
    plain = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.3)
    ours = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    wdecay(ours, model, 0.3, target=0, include=lambda name, parameter: True)
    for _ in range(3):
        step(other, plain, x)
        step(model, ours, x)
    for name, want in parameters(other).items():
        testing.assert_same_bits(name, parameters(model)[name], want, "3 steps of AdamW")


@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.Adam))
def test_toward_zero_coupled_is_weight_decay(model, x, optimizer):
    other = copy.deepcopy(model)
    plain = optimizer(other.parameters(), lr=0.1, weight_decay=0.3)
    ours = optimizer(model.parameters(), lr=0.1)
    wdecay(ours, model, 0.3, target=0, decoupled=False, include=lambda name, parameter: True)
    for _ in range(3):
        step(other, plain, x)
        step(model, ours, x)
    for name, want in parameters(other).items():
        testing.assert_same_bits(name, parameters(model)[name], want, f"3 steps of {optimizer.__name__}")


@pytest.mark.parametrize("decoupled", (True, False))
def test_gradient_is_that_of_the_penalty(model, decoupled):
    """With SGD both forms are a step along λ (w - u), the gradient of λ/2 ‖w - u‖²; u is the mixout target."""
    apply_mixout(moved(model), 0.9, filter_fn=lambda module, name: name == "0")
    targets = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    # "2" is not mixed: its target is its present value, already moved.
    targets["2.weight"] = model[2].weight.detach().clone()
    handle = wdecay(optimizer, model, 0.5, decoupled=decoupled)
    before = parameters(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, w in before.items():
        leaf = w.clone().requires_grad_()
        (0.25 * (leaf - targets[name]).square().sum()).backward()
        want = w - 0.25 * leaf.grad if name.endswith("weight") and w.dim() == 2 else w
        testing.assert_same_values(name, parameters(model)[name], want, f"decoupled={decoupled}")
    assert not torch.equal(before["0.weight"], parameters(model)["0.weight"])
    testing.assert_same_bits("2.weight, at its target", parameters(model)["2.weight"], before["2.weight"], model)

    handle.remove()
    before = parameters(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    testing.assert_same_bits("without the hook", parameters(model)["0.weight"], before["0.weight"], model)


def test_target_of_another_model_and_of_a_state_dict(model):
    reference = moved(copy.deepcopy(model))
    for target in (reference, reference.state_dict()):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
        wdecay(optimizer, trained, 1.0, target=target)
        for parameter in trained.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        testing.assert_same_bits("at lr · decay = 1", trained[0].weight, reference[0].weight, trained)
        testing.assert_same_bits("bias", trained[0].bias, model[0].bias, trained)


def test_parameters_without_a_gradient_and_groups_rates(model):
    moved_copy = moved(copy.deepcopy(model))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}], lr=0.1
    )
    wdecay(optimizer, model, 1.0, target=moved_copy)
    before = parameters(model)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    want = torch.lerp(before["0.weight"], moved_copy[0].weight.detach(), 0.5)
    testing.assert_same_bits("group's rate", model[0].weight, want, model)
    testing.assert_same_bits("no gradient", model[2].weight, before["2.weight"], model)


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("decoupled", (True, False))
def test_with_grad_scaler(model, x, fused, decoupled):
    """Scaling by a power of two changes no rounding: the same bits, and a skipped step decays nothing."""
    device = x.device.type
    other = copy.deepcopy(model)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=1000)
    plain = torch.optim.Adam(other.parameters(), lr=0.1, fused=fused)
    scaled = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    target = {name: parameter + 1.0 for name, parameter in parameters(model).items()}
    wdecay(plain, other, 0.3, target=target, decoupled=decoupled)
    wdecay(scaled, model, 0.3, target=target, decoupled=decoupled)
    for _ in range(3):
        step(other, plain, x)
        scaled.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        scaler.step(scaled)
        scaler.update()
    for name, want in parameters(other).items():
        testing.assert_same_bits(name, parameters(model)[name], want, f"fused={fused}, decoupled={decoupled}")
    before = parameters(model)
    scaler.scale(model(x * torch.inf).square().sum()).backward()
    scaler.step(scaled)
    testing.assert_same_bits("skipped step", model[0].weight, before["0.weight"], model)


@pytest.mark.parametrize("decoupled", (True, False))
@pytest.mark.parametrize("by_name", (True, False))
def test_with_a_closure(model, x, decoupled, by_name):
    """The closure computes the gradients within the step, as Lightning does with every optimizer."""
    model = moved(apply_mixout(model, 0.0))
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.25) for m in (model, other)]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        wdecay(optimizer, m, 0.5, decoupled=decoupled)

    def closure():
        optimizers[0].zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        want = other(x).square().mean()
        optimizers[1].zero_grad()
        want.backward()
        optimizers[1].step()
        got = optimizers[0].step(closure=closure) if by_name else optimizers[0].step(closure)
        assert torch.equal(got, want)
        for name, parameter in parameters(other).items():
            testing.assert_same_bits(name, parameters(model)[name], parameter, "a step with a closure")


@pytest.mark.parametrize("decoupled", (True, False))
@pytest.mark.parametrize("by_name", (True, False))
def test_with_a_closure_that_is_called_twice(model, decoupled, by_name):
    """The weights decay once a step, the penalty's gradient is added at each call; other arguments are passed on."""

    class Twice(torch.optim.Optimizer):
        def step(self, closure=None, factor=1.0):
            self.seen = [(closure(), self.gradient())[1] for _ in range(2)] + [factor]

        def gradient(self):
            return self.param_groups[0]["params"][0].grad.clone()

    weight = moved(model)[0].weight
    optimizer, before = Twice(model.parameters(), {"lr": 0.25}), weight.detach().clone()
    wdecay(optimizer, model, 0.5, target=0, decoupled=decoupled)

    def closure():
        weight.grad = torch.ones_like(weight)

    _ = optimizer.step(factor=2.0, closure=closure) if by_name else optimizer.step(closure, 2.0)
    *gradients, factor = optimizer.seen
    assert factor == 2.0
    testing.assert_same_bits("w", weight.detach(), before * (0.875 if decoupled else 1.0), "after two calls")
    for gradient in gradients:
        testing.assert_same_bits("dw", gradient, 1.0 + (0.0 if decoupled else 0.5) * before, "of a call")


def test_an_argument_of_step_that_is_no_closure_passes(model):
    class Scaled(torch.optim.Optimizer):
        def step(self, scale, closure=None):
            self.seen = scale, closure

    weight = moved(model)[0].weight
    optimizer, before = Scaled(model.parameters(), {"lr": 0.25}), weight.detach().clone()
    wdecay(optimizer, model, 0.5, target=0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step(2.0)
    assert optimizer.seen == (2.0, None)
    testing.assert_same_bits("w", weight.detach(), before * 0.875, "a step")


def test_the_models_own_weights_as_target_are_copied(model):
    for target in (model, model.state_dict()):
        before = parameters(moved(model))["0.weight"]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        wdecay(optimizer, model, 0.5, target=target)
        with torch.no_grad():
            model[0].weight.add_(4.0)
        model[0].weight.grad = torch.zeros_like(before)
        optimizer.step()
        testing.assert_same_bits("w", model[0].weight.detach(), before + 3.0, type(target).__name__)


def test_weights_at_their_target_keep_their_gradients_bits(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wdecay(optimizer, model, 0.3, decoupled=False)
    model(x).sum().backward()
    before = model[0].weight.grad.clone()
    optimizer.step()
    testing.assert_same_bits("gradient", model[0].weight.grad, before, model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"decay": -1.0}, ValueError, "decay: -1.0"),
        ({"target": 1.0}, ValueError, "target: 1.0; the only number it takes is 0"),
        ({"target": {}}, ValueError, "target: it has no 0.weight"),
        (
            {"target": {"0.weight": torch.zeros(3), "2.weight": torch.zeros(3)}},
            ValueError,
            r"target: 0.weight has shape \(3,\)",
        ),
        ({"target": torch.zeros(5, 7)}, TypeError, "target: Tensor"),
        (
            {"target": {"0.weight": np.zeros((5, 7)), "2.weight": torch.zeros(3, 5)}},
            TypeError,
            "target: 0.weight is float64",
        ),
        ({"include": lambda name, parameter: False}, ValueError, "include: no parameter"),
    ),
)
def test_refuses(options, error, message):
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        wdecay(optimizer, model, **{"decay": 0.1} | options)
    with pytest.raises(ValueError, match="optimizer: none of its parameters"):
        wdecay(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), model, 0.1)


def test_an_optimizer_that_was_given_other_parameters_since_is_refused(model, x):
    """As FSDP2 and DeepSpeed's ZeRO do: the decay would silently stop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wdecay(optimizer, model, 0.1)
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"no longer holds the model's parameters.*FSDP2.*DeepSpeed"):
        step(model, optimizer, x)


def test_refuses_swapped_arguments_and_warns_of_two_decays():
    model = nn.Linear(7, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="optimizer: Linear"):
        wdecay(model, optimizer, 0.1)
    with pytest.raises(TypeError, match="optimizer: StepLR"):
        wdecay(torch.optim.lr_scheduler.StepLR(optimizer, 1), model, 0.1)
    with pytest.raises(TypeError, match="model: AdamW"):
        wdecay(optimizer, optimizer, 0.1)
    with pytest.warns(UserWarning, match=r"its own weight_decay, 0\.01,"):
        wdecay(optimizer, model, 0.1)


@pytest.mark.parametrize(
    ("own", "decay"), (("weight", 0.0), ("bias", 0.1), ("frozen", 0.1)), ids=("decay of 0", "other", "frozen")
)
def test_does_not_warn_where_only_one_decays(own, decay, recwarn):
    model = nn.Linear(7, 5)
    model.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    groups = [{"params": [p], "weight_decay": 0.01 * (name == own)} for name, p in model.named_parameters()]
    wdecay(torch.optim.AdamW(groups), model, decay)
    assert not recwarn.list


@pytest.mark.parametrize("decay", (None, "0.1", True))
def test_refuses_a_decay_that_is_no_number(decay):
    model = nn.Linear(7, 5)
    with pytest.raises(TypeError, match=f"decay: {decay!r} of type {type(decay).__name__}; it takes a number"):
        wdecay(torch.optim.SGD(model.parameters(), lr=0.1), model, decay)
