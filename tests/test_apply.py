"""apply_mixout and remove_mixout on PyTorch's own modules: what is mixed, what stays, what is refused."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from parameters import masks
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from mixout_fast import (
    MixoutScheduler,
    apply_mixout,
    mixout,
    mixout_report,
    reference,
    remove_mixout,
    target_state_dict,
    testing,
)
from mixout_fast.apply import mixed_parameters
from mixout_fast.embedding import MixEmbedding
from mixout_fast.mixed_weight import Mixing
from mixout_fast.uses import INPUT_DIMS, READ_PAST


class Transposed(nn.Module):
    """A user's own layer, which holds its weight as (in, out)."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(in_features, out_features))

    def forward(self, x):
        return x @ self.kernel


class Net(nn.Module):
    """A bit of everything; takes token numbers below 20, (B, 12)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.drop = nn.Dropout(0.0)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 20)

    def forward(self, tokens):
        x = self.drop(self.embed(tokens))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.head(self.frozen(self.query(x) * self.key(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens).tanh())


@pytest.fixture
def net(device):
    return Net().to(device).train()


@pytest.fixture
def tokens(device):
    return torch.randint(0, 20, (3, 12), device=device)


def train(model, tokens, steps=3, lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()


def output(model, tokens, manual_seed=3):
    torch.manual_seed(manual_seed)
    return model(tokens)


def reasons(model):
    return {row.name: row.reason for row in mixout_report(model).rows}


@masks
def test_first_output_is_the_plain_models(net, tokens, mask, backend, mixes_first):
    plain = net(tokens)
    assert apply_mixout(net, 0.9, mask=mask, backend=backend) is net
    testing.assert_same_bits("output before any step", net(tokens), plain, net)


@masks
def test_masks_change_the_output_once_the_weights_have_moved(net, tokens, mask):
    apply_mixout(net, 0.5, mask=mask)
    train(net, tokens)
    assert not torch.equal(net(tokens), net(tokens))
    testing.assert_same_bits("under one seed", output(net, tokens), output(net, tokens), net)


def test_every_parameter_is_mixed_or_has_a_reason(net):
    apply_mixout(net, 0.9)
    rows = mixout_report(net).rows
    assert [row.name for row in rows] == [name for name, _ in net.named_parameters(remove_duplicate=False)]
    unmixed = {name: reason for name, reason in reasons(net).items() if reason is not None}
    assert unmixed.pop("frozen.weight") == "frozen"
    assert set(unmixed.values()) == {"bias or normalisation"}
    assert all("bias" in name or "norm" in name for name in unmixed)
    assert {mixed.name for mixed in mixed_parameters(net)} == {row.name for row in rows if row.reason is None}
    assert all(row.p == 0.9 for row in rows if row.reason is None)


def test_report_is_a_table(net, capsys):
    apply_mixout(net, 0.25, dropout=0.0, verbose=True)
    printed = capsys.readouterr().out
    assert printed.strip() == str(mixout_report(net))
    lines = [line.split() for line in printed.splitlines()]
    assert ["attention.in_proj_weight", "MultiheadAttention", "0.25", "768", "mixed"] in lines
    assert ["frozen.weight", "Linear", "256", "frozen"] in lines
    assert "2,944 of 3,364 parameters mixed" in printed
    assert "Dropouts" not in printed, "their p was 0 already"


def test_objects_keys_and_an_optimizer_made_before_stay_valid(net, tokens):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    parameters, modules = dict(net.named_parameters()), dict(net.named_modules())
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    calls = []
    net.query.register_forward_hook(lambda *_: calls.append("hook"))
    apply_mixout(net, 0.5)
    assert dict(net.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    assert all(dict(net.named_modules())[name] is module for name, module in modules.items())
    assert type(net.conv).__name__ == "Conv1d", "transformers saves the names of classes"
    assert list(net.state_dict()) == list(state)
    for name, tensor in net.state_dict().items():
        testing.assert_same_bits(name, tensor, state[name], net)

    net(tokens).sum().backward()
    optimizer.step()
    assert calls == ["hook"]
    assert not torch.equal(net.query.weight, state["query.weight"])


def test_removal_restores_types_and_leaves_the_trained_weights(net, tokens):
    types = {name: type(module) for name, module in net.named_modules()}
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    parameters = dict(net.named_parameters())
    apply_mixout(net, 0.9, dropout=0.5, share_masks=True)
    assert net.drop.p == 0.5
    assert "Dropouts set to 0.5: drop (was 0)" in str(mixout_report(net))
    train(net, tokens)
    mixed = net.eval()(tokens)
    assert remove_mixout(net) is net
    assert {name: type(module) for name, module in net.named_modules()} == types
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    assert net.drop.p == 0.0
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert not list(net.buffers()), "the targets are freed"
    testing.assert_same_bits("eval", net.eval()(tokens), mixed, net)
    testing.assert_same_bits("training", net.train()(tokens), mixed, net)
    apply_mixout(net, 0.9)


def test_removal_through_a_module_around(net):
    net.drop.p = 0.1
    attributes = set(vars(net))
    apply_mixout(net, 0.9, dropout=0.0)
    net._ddp_params_and_buffers_to_ignore.append("a.users.own.target")
    around = nn.Sequential(net)
    assert mixout_report(around) == mixout_report(net)
    assert remove_mixout(around) is around
    assert net.drop.p == 0.1
    assert net._ddp_params_and_buffers_to_ignore == ["a.users.own.target"]
    assert set(vars(net)) - attributes == {"_ddp_params_and_buffers_to_ignore"}
    apply_mixout(around, 0.9)


def test_root(device):
    for root, x in (
        (nn.Linear(16, 8), torch.randn(3, 16)),
        (nn.Conv2d(16, 8, 3), torch.randn(1, 16, 5, 5)),
        (nn.Embedding(64, 8), torch.arange(64)),
    ):
        root, x, plain_type = root.to(device), x.to(device), type(root)
        assert apply_mixout(root, 0.5) is root
        assert [mixed.name for mixed in mixed_parameters(root)] == ["weight"]
        train(root, x)
        assert any(not torch.equal(root(x), root(x)) for _ in range(5))
        assert type(remove_mixout(root)) is plain_type


@pytest.mark.parametrize(
    ("module", "x", "name", "dims"),
    (
        (nn.Conv1d(6, 4, 3), (2, 6, 8), "weight", (1,)),
        (nn.Conv2d(6, 4, 3), (2, 6, 8, 8), "weight", (1,)),
        (Transposed(6, 4), (2, 6), "kernel", (0,)),
    ),
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_weights_read_by_other_modules(module, x, name, dims, device, backend, monkeypatch):
    """The mask has an entry per input neuron, whichever dimension numbers them; gradient and eval mode are mixout's."""
    monkeypatch.setitem(INPUT_DIMS, f"{__name__}.Transposed", {"kernel": (0,)})
    module, input = copy.deepcopy(module).to(device), torch.randn(x, device=device)
    apply_mixout(module, 0.5, target=dict.fromkeys((name,), torch.zeros_like(getattr(module, name))), backend=backend)
    parameter = module._parameters[name]
    read = getattr(module, name)
    others = [d for d in range(parameter.dim()) if d not in dims]
    kept = read != 0
    assert torch.equal(kept.any(dim=others), kept.all(dim=others)), "all of a neuron's weights or none"
    testing.assert_same_bits("kept weights", read[kept], parameter.detach()[kept] * 2.0, module)
    torch.manual_seed(1)
    read = getattr(module, name)
    torch.manual_seed(1)
    module(input).sum().backward()
    assert torch.equal(parameter.grad != 0, read != 0), "the gradient has forward's mask"
    assert getattr(module.eval(), name) is parameter


@pytest.mark.parametrize("dims", ((2,), (0, 1), (1, 2), (-1,), [0], 0, None))
def test_input_dims_that_cannot_be_mixed_are_refused(dims, monkeypatch):
    monkeypatch.setitem(INPUT_DIMS, f"{__name__}.Transposed", {"kernel": dims})
    model = nn.Sequential(nn.Linear(4, 4), Transposed(4, 4))
    with pytest.raises(ValueError) as caught:
        apply_mixout(model, 0.5)
    assert str(caught.value).startswith(f"INPUT_DIMS: {dims!r} for 1.kernel of shape (4, 4); it takes (0,), (1,)")
    assert type(model[0]) is nn.Linear
    model[1].kernel = nn.Parameter(torch.zeros(4, 4, 4))
    if dims not in ((2,), (1, 2)):
        with pytest.raises(ValueError, match=r"of shape \(4, 4, 4\); it takes"):
            apply_mixout(model, 0.5)


def test_input_dims_of_three_dimensions(monkeypatch):
    monkeypatch.setitem(INPUT_DIMS, f"{__name__}.Transposed", {"kernel": (1, 2)})
    module = Transposed(4, 4)
    module.kernel = nn.Parameter(torch.ones(5, 7, 9))
    kernel = apply_mixout(module, 0.5, target={"kernel": torch.zeros(5, 7, 9)}).kernel
    assert torch.equal(kernel, kernel[:1].expand(5, 7, 9)), "one draw for each pair of the last two"
    assert 0 < (kernel[0] != 0).sum() < 63


def test_a_forward_that_was_replaced_reads_the_mixed_weight(device):
    """As by the hooks of accelerate and others: a change of the module's class would not affect it."""
    linear = nn.Linear(16, 4, bias=False).to(device)
    linear.forward = lambda x: F.linear(x, linear.weight)
    apply_mixout(linear, 0.5, target={"weight": torch.zeros_like(linear.weight)})
    assert (linear(torch.eye(16, device=device)) == 0).all(dim=1).any()


def test_a_new_module_of_a_mixed_class_is_plain():
    """PEFT makes the A of a convolution this way."""
    convolution = apply_mixout(nn.Conv1d(4, 4, 1), 0.5)
    again = type(convolution)(4, 4, 1)
    assert again.weight is again._parameters["weight"]
    assert again(torch.ones(1, 4, 3)).shape == (1, 4, 3)


def test_a_module_pruned_since_is_named():
    model = apply_mixout(nn.Sequential(nn.Linear(4, 4)), 0.5)
    prune.random_unstructured(model[0], "weight", 0.5)
    for function in (target_state_dict, remove_mixout):
        with pytest.raises(ValueError, match=r"model: 0.weight was parametrized or pruned after apply_mixout"):
            function(model)


def test_a_weight_mixed_where_it_is_read_takes_parameters_alone():
    model = apply_mixout(nn.Sequential(nn.Conv1d(4, 4, 1)), 0.5)
    model[0].weight = parameter = nn.Parameter(torch.zeros(4, 4, 1))
    assert model[0]._parameters["weight"] is parameter
    replica = model[0]._replicate_for_data_parallel()
    with pytest.raises(AttributeError, match="weight: a Tensor in place of a Parameter that Conv1d mixes"):
        replica.weight = parameter * 1.0


@masks
@pytest.mark.parametrize("grad_scale", ("exact", "paper"))
def test_embedding_is_that_of_the_mixed_table(mask, grad_scale, device):
    table = nn.Embedding(50, 8, padding_idx=3).to(device)
    apply_mixout(table, 0.5, mask=mask, grad_scale=grad_scale)
    assert type(table) is MixEmbedding
    with torch.no_grad():
        table.weight.add_(torch.randn_like(table.weight))
    table.seed = torch.tensor(5, device=device)
    tokens = torch.tensor([[0, 7, 7, 49], [3, 3, 12, 0]], device=device)
    # For mixout input neurons are dimension 1 of a weight; here they are the table's rows.
    weight = table.weight.detach().requires_grad_()
    options = {"mask": mask, "grad_scale": grad_scale, "seed": table.seed}
    mixed = mixout(weight.unsqueeze(0), table.target.unsqueeze(0), 0.5, True, **options)[0]
    want = F.embedding(tokens, mixed, padding_idx=3)
    got = table(tokens)
    testing.assert_same_bits("rows", got, want, table)
    gradient = torch.randint(-4, 5, got.shape, device=device).float()
    grads = torch.autograd.grad(got, table.weight, gradient), torch.autograd.grad(want, weight, gradient)
    testing.assert_same_values("gradient", grads[0][0], grads[1][0], table)


def test_an_embedding_without_a_target_is_mixed_toward_zero(device):
    table, tokens = apply_mixout(nn.Embedding(50, 8).to(device), 0.5), torch.arange(50, device=device)
    table.seed = torch.tensor(5, device=device)
    table.target.zero_()
    want = table(tokens)
    table.target = None
    testing.assert_same_bits("rows", table(tokens), want, table)
    assert "target=zero" in repr(table)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_an_embeddings_gradient_as_published_is_not_rounded(dtype, device):
    """Scaled by 10 and divided again, this gradient would overflow in fp16, whose largest number is 65504."""
    table = apply_mixout(nn.Embedding(50, 8).to(device, dtype), 0.9, grad_scale="paper")
    table.seed = torch.tensor(5, device=device)
    gradient = (8000 * torch.rand(50, 8, device=device)).to(dtype)
    table(torch.arange(50, device=device)).backward(gradient)
    keep = table._kept(torch.arange(50, device=device))
    testing.assert_same_values("gradient", table.weight.grad, gradient * keep, table)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_embedding_in_other_dtypes(dtype, device):
    table = nn.Embedding(50, 8).to(device, dtype)
    plain = table(torch.arange(50, device=device))
    apply_mixout(table, 0.9)
    testing.assert_same_bits("W == U", table(torch.arange(50, device=device)), plain, table)
    with torch.no_grad():
        table.weight.add_(torch.randn_like(table.weight))
    table.seed = torch.tensor(5, device=device)
    want = mixout(table.weight[None].detach(), table.target[None], 0.9, True, seed=table.seed)[0]
    testing.assert_same_bits("rows", table(torch.arange(50, device=device)), want, table)


def test_an_element_masks_index_in_a_large_table_exceeds_int32():
    table = apply_mixout(nn.Embedding(2**20, 2, dtype=torch.bfloat16), 0.5, mask="element")
    table.seed = torch.tensor(5)
    table.embedding_dim = 4096  # stands in for a table of 8 GB
    tokens = torch.tensor([0, 2**19, 2**20 - 1])
    kept = table._kept(tokens)
    assert torch.equal(table._kept(tokens.int()), kept)
    words = reference.philox4x32((2**30 - 2**10, 0, 0, 0), (5, 0))  # of entry (2^20 - 1) * 4096 and the next three
    assert kept[2, :4].tolist() == [word >= reference.threshold(0.5) for word in words]


@pytest.mark.parametrize("p", (-0.5, 1.5))
def test_an_embeddings_p_outside_0_to_1_is_refused(p):
    table = apply_mixout(nn.Embedding(5, 4), 0.5)
    table.p = p
    with pytest.raises(ValueError, match=r"p: .*\[0, 1\]"):
        table(torch.tensor([1]))


def test_a_table_resized_since_is_refused(device):
    """As transformers' resize_token_embeddings does, which gives the same module another weight."""
    table = apply_mixout(nn.Embedding(20, 8).to(device), 0.5)
    table.weight.data, table.num_embeddings = torch.randn(23, 8, device=device), 23
    tokens = torch.tensor([3, 22], device=device)
    with pytest.raises(ValueError, match=r"target: shape \(20, 8\), weight has \(23, 8\).*before apply_mixout"):
        table(tokens)
    assert table.eval()(tokens).shape == (2, 8)


@masks
def test_tied_weights_are_mixed_once(mask, device, tokens):
    model = Tied().to(device)
    apply_mixout(model, 0.5, mask=mask)
    assert model.head.weight is model.embed.weight
    assert model.head.target is model.embed.target
    assert set(reasons(model)) == {"embed.weight", "head.weight"}
    with torch.no_grad():
        model.head.weight.zero_()
    model.head.target.fill_(1.0)
    seen = []
    for _ in range(4):
        model(tokens)
        read_by_head = model.head(torch.eye(16, device=device)).t()  # W' (20, 16)
        read_by_embedding = model.embed(torch.arange(20, device=device))
        testing.assert_same_bits("the table that both read", read_by_embedding, read_by_head, model)
        assert read_by_head.unique().tolist() == [-1.0, 1.0]
        seen.append(read_by_head[0])
    assert len(torch.stack(seen).unique(dim=0)) == 4, "a mask for every forward pass"
    model(tokens).sum().backward()


def test_tied_weights_are_mixed_everywhere_or_nowhere(device):
    model = Tied().to(device)
    with pytest.raises(ValueError, match="filter_fn: it matches no layer"):
        apply_mixout(model, 0.5, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    model.other = nn.Linear(4, 4)
    apply_mixout(model, 0.5, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    assert reasons(model)["head.weight"] == "tied to embed.weight: filter_fn"
    assert reasons(model)["embed.weight"] == "filter_fn"
    assert type(model.embed) is nn.Embedding


def test_shared_seed_of_tied_weights_survives_activation_checkpointing(device, tokens):
    """Recomputing the whole module, which draws the seed, gives the gradients of the plain pass."""
    from torch.utils.checkpoint import checkpoint

    model = apply_mixout(Tied().to(device), 0.5)
    train(model, tokens)
    gradients = []
    for call in (model, lambda t: checkpoint(model, t, use_reentrant=False)):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(call(tokens).square().sum(), model.head.weight)[0])
    testing.assert_same_bits("gradient", gradients[1], gradients[0], model)


def test_targets(net, tokens, mixes_first):
    reference = copy.deepcopy(net).requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(1.0)
    apply_mixout(net, 1.0, target=reference)
    for mixed in mixed_parameters(net):
        assert mixed.mixing.target.data_ptr() == reference.get_parameter(mixed.name).data_ptr(), "in place"
    # At p = 1 the mixed weights are the target's, the others the model's own. All require grad as in the model: that
    # decides whether torch.matmul takes mm or bmm, whose bits differ on AMD's processors.
    plain = dict(net.named_parameters())
    targets = {mixed.name: reference.get_parameter(mixed.name) for mixed in mixed_parameters(net)}
    plain |= {name: target.clone().requires_grad_() for name, target in targets.items()}
    remove_mixout(net)
    want = torch.func.functional_call(net, plain, (tokens,))
    apply_mixout(net, 1.0, target={name: t for name, t in reference.state_dict().items() if "norm" not in name})
    testing.assert_same_bits("output at p = 1", net(tokens), want, net)


def test_the_models_own_weights_as_target_are_copied(net):
    aliases = {name: torch.from_dlpack(tensor) for name, tensor in net.state_dict().items()}
    for target in (None, net, net.state_dict(), aliases):
        apply_mixout(net, 0.9, target=target)
        for mixed in mixed_parameters(net):
            assert mixed.mixing.target.data_ptr() != mixed.parameter.data_ptr()
            assert torch.equal(mixed.mixing.target, mixed.parameter)
        remove_mixout(net)


def test_a_tied_target_serves_a_model_whose_weights_are_no_longer_tied():
    model, target = Tied(), Tied()
    model.head.weight = nn.Parameter(model.embed.weight.detach() + 1.0)
    apply_mixout(model, 0.5, target=target)
    assert model.head.target.data_ptr() == model.embed.target.data_ptr() == target.embed.weight.data_ptr()


def test_a_target_that_lacks_a_parameter_leaves_it_unmixed_and_says_so(net):
    state = net.state_dict()
    del state["head.weight"]
    with pytest.warns(UserWarning, match=r"target: it has no head\.weight: not mixed"):
        apply_mixout(net, 0.9, target=state)
    assert reasons(net)["head.weight"] == "the target has no such parameter"


def test_targets_in_a_smaller_dtype(net, tokens):
    """Targets are widened where they are used: the step equals one with wide targets."""
    apply_mixout(net, 0.5, target_dtype=torch.bfloat16)
    small = copy.deepcopy(net)
    for mixed in mixed_parameters(net):
        assert mixed.mixing.target.dtype == torch.bfloat16
        mixed.mixing.target = mixed.mixing.target.float()
    for model in (small, net):
        output(model, tokens).square().sum().backward()
    for (name, ours), theirs in zip(small.named_parameters(), net.parameters(), strict=True):
        if ours.requires_grad:
            testing.assert_same_bits(name, ours.grad, theirs.grad, net)


def test_no_widened_target_waits_for_backward(device):
    linear, saved = nn.Linear(33, 17).to(device), []
    apply_mixout(linear, 0.5, target_dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear(torch.randn(5, 33, device=device))
    weights = [tensor for tensor in saved if tensor.shape == (17, 33)]
    assert {tensor.data_ptr() for tensor in weights} == {linear.weight.data_ptr(), linear.target.data_ptr()}


@pytest.mark.parametrize("weight", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("target", (torch.float16, torch.bfloat16, torch.float64))
def test_targets_of_any_dtype(weight, target, device):
    linear = nn.Linear(16, 4).to(device, weight)
    apply_mixout(linear, 0.5, target={"weight": linear.weight.detach().to(target)})
    assert linear.target.dtype == (target if target.itemsize < weight.itemsize else weight)
    linear(torch.randn(3, 16, device=device, dtype=weight)).sum().backward()


def test_saved_targets_resume(net, tokens):
    apply_mixout(net, 0.9)
    train(net, tokens)
    buffer = io.BytesIO()
    torch.save({"model": net.state_dict(), "targets": target_state_dict(net)}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again = Net().to(tokens.device)
    again.load_state_dict(saved["model"])
    apply_mixout(again, 0.9, target=saved["targets"])
    testing.assert_same_bits("output", output(again, tokens), output(net, tokens), net)


def test_copies_and_pickles_are_whole_and_independent(net, tokens):
    apply_mixout(net, 0.9, share_masks=True)
    train(net, tokens)
    want = output(net, tokens)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)]
    for other in copies:
        testing.assert_same_bits("output", output(other, tokens), want, net)
    remove_mixout(copies[0])
    train(copies[1], tokens)
    testing.assert_same_bits("the original afterwards", output(net, tokens), want, net)
    testing.assert_same_bits("another copy", output(copies[2], tokens), want, net)
    assert isinstance(net.conv.mixing_weight, Mixing)


def test_p_is_held_as_a_python_float(net):
    apply_mixout(net, lambda module, name: np.float64(0.25))
    assert {type(mixed.mixing.p) for mixed in mixed_parameters(net)} == {float}


def test_p_of_each_layer_and_the_filter(net):
    apply_mixout(net, lambda module, name: 0.0 if name == "key" else 0.3 if name == "query" else 0.6)
    assert (net.query.p, net.head.p) == (0.3, 0.6)
    assert reasons(net)["key.weight"] == "p = 0"
    remove_mixout(net)
    apply_mixout(net, 0.4, filter_fn=lambda module, name: name in ("query", "conv"))
    assert {mixed.name for mixed in mixed_parameters(net)} == {"query.weight", "conv.weight"}
    assert reasons(net)["embed.weight"] == "filter_fn"


def test_with_p_0_a_model_trains_as_a_plain_one(net, tokens):
    plain = copy.deepcopy(net)
    apply_mixout(net, 0.0)
    for model in (plain, net):
        train(model, tokens)
    testing.assert_same_bits("output", output(net, tokens), output(plain, tokens), net)
    remove_mixout(net)


def test_with_p_0_a_tied_weight_draws_no_seed(tokens, device):
    """Dropout beside it draws what it draws in the plain model."""
    net = apply_mixout(Tied().to(device).train(), 0.0)
    torch.manual_seed(3)
    want = torch.rand(4, device=device)
    torch.manual_seed(3)
    net(tokens)
    testing.assert_same_bits("the next random numbers", torch.rand(4, device=device), want, net)


def test_frozen_layers_when_asked(net):
    apply_mixout(net, 0.5, frozen=True)
    assert net.frozen.p == 0.5


@pytest.mark.parametrize("rule", (None, ("mixout", 0.3), ("dropout", 0.3)))
def test_head_rules(net, tokens, rule):
    initial = net.head.weight.detach().clone()
    reference = {name: tensor + 1.0 for name, tensor in net.state_dict().items()}
    apply_mixout(net, 0.9, target=reference, head={"head": rule})
    train(net, tokens)
    if rule is None:
        assert reasons(net)["head.weight"] == "head, left alone"
        assert type(net.head) is nn.Linear
    elif rule[0] == "mixout":
        assert net.head.p == 0.3
        testing.assert_same_bits("w_0", net.head.target, initial, net)
        assert not net.head._forward_pre_hooks
    else:
        assert reasons(net)["head.weight"] == "head, dropout(0.3)"
        x = torch.randn(50, 16, device=tokens.device)
        torch.manual_seed(1)
        want = F.linear(F.dropout(x, 0.3), net.head.weight, net.head.bias)
        testing.assert_same_bits("head", output(net.head, x, 1), want, net)
        testing.assert_same_bits("head, eval", net.eval().head(x), F.linear(x, net.head.weight, net.head.bias), net)
    remove_mixout(net)
    assert not net.head._forward_pre_hooks


def test_a_head_without_a_linear_layer_is_mixed(net):
    apply_mixout(net, 0.9, head={"conv": ("mixout", 0.3)})
    assert net.conv.mixing_weight.p == 0.3


def test_dropout_of_a_head_called_by_keyword_and_named_by_its_second_name(device):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last, self.pool = nn.Linear(16, 16), nn.Linear(16, 4), nn.TransformerEncoderLayer(16, 2)
            self.alias = self.last

        def forward(self, x):
            return self.alias(input=x)

    net, x = Head().to(device).train(), torch.randn(50, 16, device=device)
    apply_mixout(net, 0.5, head={"alias": ("dropout", 0.3), "pool": ("dropout", 0.3)})
    why = reasons(net)
    assert why["last.weight"] == why["pool.linear1.weight"] == "head, dropout(0.3)"
    assert why["pool.self_attn.in_proj_weight"] == why["pool.self_attn.out_proj.weight"] == "head, left alone"
    torch.manual_seed(1)
    want = F.linear(F.dropout(x, 0.3), net.last.weight, net.last.bias)
    testing.assert_same_bits("head", output(net, x, 1), want, net)
    remove_mixout(net)
    assert not net.last._forward_pre_hooks and not net.last._forward_pre_hooks_with_kwargs
    with pytest.raises(ValueError, match=r"'pool.self_attn'.*needs an nn.Linear"):
        apply_mixout(net, 0.5, head={"pool.self_attn": ("dropout", 0.3)})


@pytest.mark.parametrize("name", ("embed", "attention", "query"))
def test_a_forward_replaced_after_mixout_must_be_put_back_before_it_is_removed(net, tokens, name):
    layer = getattr(apply_mixout(net, 0.5), name)
    ours = layer.forward
    layer.forward = lambda *arguments, **keywords: ours(*arguments, **keywords)
    net(tokens)
    with pytest.raises(ValueError, match=f"the forward of {name} was replaced after apply_mixout"):
        remove_mixout(net)
    assert len(mixed_parameters(net)) == 7
    layer.forward = ours  # as accelerate's remove_hook_from_module does
    remove_mixout(net)
    net(tokens)


@pytest.mark.parametrize(("first", "second"), (("embed", "head"), ("head", "embed")))
def test_parts_are_removed_one_by_one(first, second, device, tokens):
    model = nn.Sequential(Tied(), nn.Dropout(0.3), nn.Linear(20, 4)).to(device).train()
    apply_mixout(model, 0.5, dropout=0.0)
    for name in (first, second):
        remove_mixout(getattr(model[0], name))
        train(model, tokens)
        assert type(getattr(model[0], name)) in (nn.Linear, nn.Embedding)
        assert "seed" not in vars(getattr(model[0], name))
    MixoutScheduler(model, hold=1).step()
    remove_mixout(model)
    assert model[1].p == 0.3
    assert not model[0]._forward_pre_hooks


def test_what_the_removal_of_parts_leaves_is_removed_with_the_model():
    model = apply_mixout(nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 4)), 0.5, dropout=0.0)
    remove_mixout(model[1])
    assert model[0].p == 0.0
    remove_mixout(model)
    assert model[0].p == 0.3
    assert "mixout_report" not in vars(model)


@pytest.mark.parametrize("head", (nn.Linear(4, 2), nn.Sequential(nn.Identity(), nn.Linear(4, 2))))
def test_removal_passes_over_dropouts_that_are_gone(head):
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 2)))
    apply_mixout(model, 0.9, dropout=0.0)
    model[2] = head
    remove_mixout(model)
    assert model[0].p == 0.3
    assert not any(hasattr(module, "p") for module in head.modules())


def test_paper_layers(device):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
            self.drop, self.unused_drop = nn.Dropout(0.1), nn.Dropout(0.2)
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            h = self.first(x)
            return self.unused_drop(self.third(F.gelu(self.second(self.norm(x + self.drop(h)))) + h))

    model = Block().to(device).train()
    x = torch.randn(2, 8, device=device)
    state = torch.get_rng_state()
    apply_mixout(model, 0.9, layers="paper", example=x)
    assert torch.equal(torch.get_rng_state(), state), "in eval mode"
    assert {mixed.name for mixed in mixed_parameters(model)} == {"second.weight"}
    assert reasons(model)["first.weight"] == reasons(model)["third.weight"] == "no Dropout module feeds it"
    assert (model.drop.p, model.unused_drop.p) == (0.0, 0.2)
    assert "Dropouts set to 0: drop (was 0.1)" in str(mixout_report(model))
    assert model.training and model.drop.training
    assert not model.drop._forward_hooks
    remove_mixout(model)
    # A head is mixed though no Dropout module feeds it.
    apply_mixout(model, 0.9, layers="paper", example=(x,), head={"first": ("mixout", 0.5)})
    assert model.first.p == 0.5
    remove_mixout(model)
    assert model.drop.p == 0.1


def test_siblings_share_a_mask(net, device, tokens):
    apply_mixout(net, 0.5, share_masks=True, target={n: torch.zeros_like(t) for n, t in net.state_dict().items()})
    eye, seen = torch.eye(16, device=device), []
    for _ in range(4):
        net(tokens)
        kept = [(layer(eye) - (0 if layer.bias is None else layer.bias)).any(dim=1) for layer in (net.query, net.key)]
        assert torch.equal(*kept)
        seen.append(kept[0])
    assert len(torch.stack(seen).unique(dim=0)) > 1


def test_who_shares_a_mask(device, tokens):
    """Tied weights and siblings; groups with a weight in common are one; nobody else."""

    class Groups(Tied):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.gate_proj, self.up_proj, self.other = (nn.Linear(16, 16) for _ in range(5))
            self.up_proj.weight = self.key.weight
            self.never_called = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "k_proj": nn.Linear(16, 16)})

    model = apply_mixout(Groups().to(device).train(), 0.5, share_masks=True)
    model(tokens)
    assert model.embed.seed is model.head.seed
    assert model.query.seed is model.key.seed is model.gate_proj.seed is model.up_proj.seed
    assert model.never_called["q_proj"].seed is model.never_called["k_proj"].seed
    groups = model.embed, model.query, model.never_called["q_proj"], model.other
    assert len({id(layer.seed) for layer in groups}) == 4
    assert model.other.seed is None


def test_eval_mode_draws_no_random_numbers(net, tokens):
    apply_mixout(net, 0.5, share_masks=True).eval()
    state = torch.get_rng_state()
    net(tokens)
    assert torch.equal(torch.get_rng_state(), state)


def test_targets_are_left_out_of_ddps_broadcasts(net):
    apply_mixout(net, 0.5)
    buffers = {name for name, _ in net.named_buffers() if name.endswith("target")}
    assert set(net._ddp_params_and_buffers_to_ignore) == buffers
    assert len(buffers) == len(mixed_parameters(net)) == 7


def test_moves_and_casts(net, tokens):
    apply_mixout(net, 0.9)
    net.to(torch.bfloat16)
    assert net(tokens).dtype == torch.bfloat16
    net.double()
    net(tokens).sum().backward()


def test_a_weight_of_a_class_of_its_own_is_left_alone():
    """As quantised ones are: their class multiplies by them, also where they pass for fp32."""

    class Quantised(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].weight = Quantised(model[0].weight.detach())
    rows = {row.name: row.reason for row in mixout_report(apply_mixout(model, 0.9, frozen=True)).rows}
    assert rows["0.weight"] == "Quantised, no plain Parameter"
    assert rows["1.weight"] is None and type(model[0]) is nn.Linear


def test_a_partitioned_model_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    weight = model[1].weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)  # as DeepSpeed's ZeRO-3 leaves it
    with pytest.raises(ValueError, match=r"1\.weight is partitioned by DeepSpeed's ZeRO-3; call apply_mixout before"):
        apply_mixout(model, 0.9)


def test_unmixable_modules_are_listed(device):
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv1d(4, 4, 3, groups=2),
            "renormed": nn.Embedding(5, 4, max_norm=1.0),
            "sparse": nn.EmbeddingBag(5, 4, sparse=True),
            "hooked": nn.Embedding(5, 4, sparse=True),
            "table": nn.Embedding(5, 4, sparse=True),
            "rnn": nn.LSTM(4, 4),
            "raw": Transposed(4, 4),
            "eighths": nn.Linear(4, 4, dtype=torch.float8_e4m3fn, device="meta").to_empty(device=device),
            "linear": nn.Linear(4, 4),
        }
    ).to(device)
    model.hooked.forward = model.hooked.forward
    apply_mixout(model, 0.5)
    got = reasons(model)
    assert got["grouped.weight"] == "grouped convolution"
    assert got["renormed.weight"] == "max_norm changes it in place"
    for name in ("sparse", "hooked"):
        assert got[f"{name}.weight"] == "sparse gradient of a module that is no plain nn.Embedding"
    assert got["table.weight"] is None
    assert got["rnn.weight_ih_l0"] == "raw parameter: INPUT_DIMS has no 'weight_ih_l0' of torch.nn.modules.rnn.LSTM"
    assert got["raw.kernel"] == f"raw parameter: INPUT_DIMS has no 'kernel' of {__name__}.Transposed"
    assert got["eighths.weight"] == "dtype float8_e4m3fn"
    assert got["linear.weight"] is None


BAD = (
    ({"p": 1.5}, ValueError, ("p: 1.5", "[0, 1]")),
    ({"p": lambda module, name: -1.0}, ValueError, ("p: -1.0", "[0, 1]")),
    ({"p": "0.9"}, TypeError, ("p: '0.9'",)),
    ({"layers": "some"}, ValueError, ("layers: 'some'", "paper")),
    ({"layers": "paper"}, ValueError, ("example: None",)),
    ({"mask": "row"}, ValueError, ("mask: 'row'",)),
    ({"dropout": 2.0}, ValueError, ("dropout: 2.0",)),
    ({"dropout": "x"}, TypeError, ("dropout: 'x'", "str", "[0, 1]")),
    ({"dropout": True}, TypeError, ("dropout: True", "bool", "[0, 1]")),
    ({"filter_fn": "bert"}, TypeError, ("filter_fn: str", "(module, name)")),
    ({"target": 0}, TypeError, ("target: int",)),
    ({"target": {"query.weight": torch.zeros(3)}}, ValueError, ("target: query.weight", "(3,)", "(16, 16)")),
    ({"target": {"query.weight": torch.zeros(16, 16).int()}}, TypeError, ("target: query.weight", "int32")),
    ({"target": {"query.weight": [0.0]}}, TypeError, ("target: query.weight is list",)),
    ({"target": {"bert.key.weight": torch.zeros(3)}}, ValueError, ("no embed.weight", "keys are 'bert.key.weight'")),
    ({"target": {}, "filter_fn": lambda module, name: name == "key"}, ValueError, ("no key.weight", "keys are none")),
    ({"target_dtype": torch.int8}, TypeError, ("target_dtype: torch.int8",)),
    ({"filter_fn": lambda module, name: False}, ValueError, ("filter_fn", "embed", "query")),
    ({"head": "head"}, TypeError, ("head: str",)),
    ({"backend": "cppu"}, ValueError, ("backend: 'cppu'",)),
    ({"head": {"classifier": None}}, ValueError, ("head: 'classifier'", "no such module")),
    ({"head": {"head": ("mixup", 0.1)}}, ValueError, ("head: 'head'", "mixup", "dropout")),
    ({"head": {"head": ("mixout",)}}, ValueError, ("head: 'head'", "it takes None")),
    ({"head": {"head": ["mixout", 0.1]}}, ValueError, ("head: 'head'", "it takes None")),
    ({"head": {"head": ("mixout", 1.1)}}, ValueError, ("1.1",)),
    ({"head": {"head": ("dropout", 1.1)}}, ValueError, ("1.1",)),
    ({"head": {"norm": ("dropout", 0.1)}}, ValueError, ("head: 'norm'", "nn.Linear")),
)


@pytest.mark.parametrize(("options", "error", "fragments"), BAD)
def test_bad_arguments_change_nothing(options, error, fragments):
    net = Net()
    types, attributes = [type(m) for m in net.modules()], [set(vars(m)) for m in net.modules()]
    with pytest.raises(error) as caught:
        apply_mixout(net, **options)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
    assert [type(m) for m in net.modules()] == types
    assert [set(vars(m)) for m in net.modules()] == attributes
    apply_mixout(net)


def test_applying_twice_and_removing_nothing():
    net = apply_mixout(Net())
    with pytest.raises(ValueError, match=r"mixed already \(embed.weight, …\); call remove_mixout"):
        apply_mixout(net)
    remove_mixout(net)
    with pytest.raises(ValueError, match="no weight of it is mixed"):
        remove_mixout(net)
    with pytest.raises(ValueError, match="apply_mixout has not been applied"):
        mixout_report(net)
    with pytest.raises(ValueError, match="meta device"):
        apply_mixout(nn.Linear(3, 3, device="meta"))
    with pytest.raises(TypeError, match="model: list"):
        apply_mixout([nn.Linear(3, 3)])
    with pytest.raises(ValueError, match="no weight matrix"):
        apply_mixout(nn.LayerNorm(3))


@pytest.mark.slow
def test_compiles_to_one_graph_with_fresh_masks(net, tokens):
    torch.compiler.reset()
    apply_mixout(net, 0.5, share_masks=True)
    train(net, tokens)
    compiled = torch.compile(net, fullgraph=True)
    outputs = [compiled(tokens) for _ in range(6)]
    outputs[-1].sum().backward()
    assert len(torch.stack([o.detach().flatten() for o in outputs]).unique(dim=0)) == 6


@pytest.mark.slow
def test_eval_model_exports(net, tokens):
    apply_mixout(net, 0.5)
    train(net, tokens)
    net.eval()
    exported = torch.export.export(net, (tokens,))
    testing.assert_same_bits("exported", exported.module()(tokens), net(tokens), net)
    assert not any("mixout_fast" in str(node.target) for node in exported.graph.nodes)


def test_a_modules_own_attributes_stay(device):
    """A layer that already has attributes of our names is mixed where its weight is read."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(5, 4)).to(device)
    model[0].register_buffer("mask", torch.ones(4))
    model[1].p, model[2].seed = "own", "own"
    attributes = [dir(module) for module in model]
    apply_mixout(model, 1.0)
    assert [type(module) for module in model] != [nn.Linear, nn.Linear, nn.Embedding]
    (
        model[1](model[0](torch.ones(2, 4, device=device))).sum() + model[2](torch.tensor([3], device=device)).sum()
    ).backward()
    assert not any(module.weight.grad.any() for module in remove_mixout(model))
    assert [dir(module) for module in model] == attributes
    assert (model[1].p, model[2].seed) == ("own", "own")


class ReadsItsChildren(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.table = nn.Linear(4, 12), nn.Embedding(5, 4)

    def forward(self, x):
        return F.linear(x + self.table.weight[3], self.qkv.weight, self.qkv.bias)


@pytest.mark.parametrize("listed", (True, False))
def test_weights_that_their_parents_read(listed, monkeypatch, device):
    """At p = 1 a weight that gets a gradient has been read past its layer."""
    if listed:
        monkeypatch.setitem(READ_PAST, f"{__name__}.ReadsItsChildren", ("qkv", "table"))
    model = apply_mixout(type("Subclass", (ReadsItsChildren,), {})().to(device), 1.0)
    model(torch.ones(2, 4, device=device)).sum().backward()
    read_past = [m.name for m in mixed_parameters(model) if m.parameter.grad is not None and m.parameter.grad.any()]
    assert read_past == ([] if listed else ["qkv.weight", "table.weight"])


def test_the_report_of_parts_has_the_rows_of_all():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2)), "b": nn.Linear(4, 4)})
    apply_mixout(model["a"], 0.9, dropout=0.0)
    apply_mixout(model["b"], 0.5)
    report = mixout_report(model)
    mixed = [(row.name, row.p) for row in report.rows if row.reason is None]
    assert mixed == [("a.0.weight", 0.9), ("b.weight", 0.5)]
    assert report.dropouts == {"a.1": 0.2}


@pytest.mark.parametrize("module", (nn.Linear(6, 4), nn.Embedding(9, 4), nn.Conv1d(6, 4, 1)), ids=str)
def test_a_seed_is_an_int_or_a_tensor(module, device):
    module = apply_mixout(copy.deepcopy(module).to(device), 0.5, mask="element")
    (mixed,) = mixed_parameters(module)
    with torch.no_grad():
        mixed.parameter.add_(1.0)
    x = torch.arange(9, device=device) if isinstance(module, nn.Embedding) else torch.ones(3, 6, 6, device=device)
    mixed.mixing.seed = torch.tensor(5, device=device)
    want = module(x)
    mixed.mixing.seed = 5
    testing.assert_same_bits("output", module(x), want, module)


def test_the_report_names_layers_that_were_replaced_since():
    model = apply_mixout(nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 8)), 0.9)
    model[0], model[1] = nn.Linear(8, 8), nn.Conv1d(8, 8, 1)
    model[2] = nn.Sequential(model[2])  # as PEFT wraps layers
    model = copy.deepcopy(model)
    prune.l1_unstructured(model[3], "weight", 0.5)
    now = reasons(model)
    assert now["0.weight"] == now["1.weight"] == "no longer mixed: its layer was replaced since, or its mixout removed"
    assert now["2.weight"] is now["3.weight"] is None
    assert "128 of" in str(mixout_report(model))
    prune.remove(model[3], "weight")
    remove_mixout(model)
    assert "report_row" not in vars(model[2][0])


def test_an_attribute_error_in_mixing_does_not_leave_the_plain_weight():
    """After such an error Python would ask nn.Module.__getattr__, which has the plain Parameter of that name."""
    model = apply_mixout(nn.Sequential(nn.Conv1d(4, 4, 1)), 0.5).train()
    del model[0].mixing_weight.p
    with pytest.raises(RuntimeError, match="mixing_weight"):
        model(torch.zeros(1, 4, 3))
