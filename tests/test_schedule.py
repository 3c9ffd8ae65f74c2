"""MixoutScheduler: p over the steps, held masks, moving targets, and resuming."""

import copy
import itertools

import pytest
import torch
from torch import nn

from mixout_fast import MixoutScheduler, apply_mixout, remove_mixout, testing
from mixout_fast.apply import mixed_parameters


@pytest.fixture
def model(device):
    """Three linear layers, two of them siblings with one mask, and a convolution."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = nn.Linear(64, 8), nn.Linear(64, 8)
            self.conv = nn.Conv1d(1, 64, 1)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            x = self.conv(x.unsqueeze(1)).mean(1)
            return self.out(self.query(x) * self.key(x))

    model = Attention().to(device).train()
    return apply_mixout(model, lambda module, name: 0.8 if name == "out" else 0.4, share_masks=True)


@pytest.fixture
def x(device):
    return torch.randn(5, 64, device=device)


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def test_p_is_scaled_for_every_layer(model):
    scheduler = MixoutScheduler(model, p_factor=lambda step: min(1.0, step / 2))
    seen = []
    for _ in range(4):
        seen.append((model.query.p, model.out.p, model.conv.mixing_weight.p))
        scheduler.step()
    assert seen == [(0.0, 0.0, 0.0), (0.2, 0.4, 0.2), (0.4, 0.8, 0.4), (0.4, 0.8, 0.4)]


def test_masks_are_held(model, x):
    moved(model).query.register_forward_pre_hook(lambda *_: None)  # another's hook, which is left alone
    scheduler = MixoutScheduler(model, hold=3)
    outputs = []
    for _ in range(7):
        outputs.append(model(x).detach())
        assert torch.equal(model(x), outputs[-1]), "every forward pass of a step has the step's mask"
        assert model.query.seed is model.key.seed and model.query.seed != model.out.seed
        scheduler.step()
    same = [torch.equal(a, b) for a, b in itertools.pairwise(outputs)]
    assert same == [True, True, False, True, True, False]


def test_masks_are_held_on_the_weights_device_where_there_is_no_target():
    model = apply_mixout(nn.Sequential(nn.Conv1d(1, 4, 1)), 0.5)
    model[0].mixing_weight.target = None
    MixoutScheduler(model.to("meta"), hold=2)
    assert model(torch.empty(2, 1, 3, device="meta")).is_meta


def test_targets_move_and_the_source_does_not(model, x):
    source = {m.name: torch.randn_like(m.parameter) for m in mixed_parameters(model)}
    for m in mixed_parameters(model):
        m.mixing.target = source[m.name]
    kept = {name: tensor.clone() for name, tensor in source.items()}
    scheduler = MixoutScheduler(model, ema=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    model(x).sum().backward()
    optimizer.step()
    for m in mixed_parameters(model):
        testing.assert_same_bits(m.name, source[m.name], kept[m.name], model)
        want = torch.lerp(kept[m.name], m.parameter.detach(), 0.25)
        testing.assert_same_bits(f"target of {m.name}", m.mixing.target, want, model)


def test_a_tied_target_moves_once(device):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model = apply_mixout(Tied().to(device), 0.5)
    before = model.head.target.clone()
    moved(model)
    MixoutScheduler(model, ema=0.5).step()
    assert model.head.target is model.embed.target
    testing.assert_same_bits("target", model.head.target, torch.lerp(before, model.head.weight.detach(), 0.5), model)


def test_resumes_bit_for_bit(model, x):
    def make(model):
        return MixoutScheduler(model, p_factor=lambda step: 1 / (1 + step), hold=4, ema=0.9)

    other = copy.deepcopy(model)
    scheduler = make(model)
    for _ in range(6):
        moved(model)
        scheduler.step()
    state = copy.deepcopy(scheduler.state_dict())
    other.load_state_dict(model.state_dict())
    resumed = make(other)
    resumed.load_state_dict(state)
    for _ in range(4):
        torch.manual_seed(5)
        want = model(x)
        scheduler.step()
        torch.manual_seed(5)
        testing.assert_same_bits("output", other(x), want, model)
        resumed.step()


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"hold": 0}, "hold: 0"),
        ({"hold": 1.5}, "hold: 1.5"),
        ({"ema": 1.5}, "ema: 1.5"),
        ({"ema": "0.9"}, "ema: '0.9'"),
        ({"p_factor": lambda step: 2.0}, "p_factor: 2.0 at step 0 makes p = 1.6"),
    ),
)
def test_refuses(model, options, message):
    with pytest.raises(ValueError, match=message):
        MixoutScheduler(model, **options)


def test_refuses_to_move_targets_to_partitioned_weights(model):
    model.out.weight.data = torch.empty(0, device=model.out.weight.device)  # as DeepSpeed's ZeRO-3 leaves it
    with pytest.raises(ValueError, match=r"ema: out.weight has shape \(0,\).*DeepSpeed"):
        MixoutScheduler(model, ema=0.5)


def test_refuses_a_factor_in_place_of_a_function():
    with pytest.raises(TypeError, match="p_factor: float; it takes a function"):
        MixoutScheduler(apply_mixout(nn.Linear(3, 3)), p_factor=0.5)


def test_refuses_a_model_without_mixout_and_small_targets():
    with pytest.raises(ValueError, match="no weight of it is mixed"):
        MixoutScheduler(nn.Linear(3, 3))
    model = apply_mixout(nn.Linear(3, 3), target_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"ema: the target of weight is torch\.bfloat16"):
        MixoutScheduler(model, ema=0.9)


@pytest.mark.parametrize("layer", (nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)), ids=str)
def test_after_removal_its_steps_say_so(layer):
    model = apply_mixout(nn.Sequential(layer), 0.8)
    scheduler = MixoutScheduler(model, p_factor=lambda step: 1.0)
    scheduler.step()
    remove_mixout(model)
    for then in (None, lambda: apply_mixout(model, 0.3), lambda: MixoutScheduler(model)):
        if then is not None:
            then()
        with pytest.raises(RuntimeError, match=r"model: its mixout was removed.*make a new scheduler"):
            scheduler.step()
    assert mixed_parameters(model)[0].mixing.p == 0.3


@pytest.mark.parametrize("saved", ({}, {"hold": 2}, {"ema": 0.5}))
@pytest.mark.parametrize("loaded", ({}, {"hold": 2}, {"ema": 0.5}))
def test_a_state_of_other_options_is_refused(model, saved, loaded):
    state = MixoutScheduler(model, **saved).state_dict()
    state["steps"] = 5
    scheduler = MixoutScheduler(model, **loaded)
    if saved == loaded:
        scheduler.load_state_dict(state)
        assert scheduler.steps == 5
        return
    with pytest.raises(ValueError, match=r"state: it has \d+ seeds and \d+ moving targets"):
        scheduler.load_state_dict(state)
    assert scheduler.steps == 0


def test_a_further_scheduler_takes_the_place_of_the_one_before():
    """Neither a p scaled to 0 nor a held seed stays behind."""
    model = apply_mixout(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.8)
    first = MixoutScheduler(model, p_factor=lambda step: 0.0, hold=3)
    assert [mixed.mixing.p for mixed in mixed_parameters(model)] == [0.0, 0.0]
    MixoutScheduler(model)
    assert [(mixed.mixing.p, mixed.mixing.seed) for mixed in mixed_parameters(model)] == [(0.8, None)] * 2
    with pytest.raises(RuntimeError, match="a further scheduler has taken this one's place"):
        first.step()
    assert not hasattr(remove_mixout(model)[0], "base_p")
