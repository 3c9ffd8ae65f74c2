"""MixLinear as a module: a drop-in nn.Linear to everything around it."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
from parameters import masks
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mixout_fast import MixLinear, mix_linear, testing


@pytest.fixture
def linear(device):
    return nn.Linear(17, 5, device=device)


def mixed_layer(linear, p=0.5, **options):
    """A MixLinear from the linear, with its weight moved away from the target."""
    layer = MixLinear.from_linear(linear, p, **options)
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))
    return layer


def gradients(module, x, manual_seed=7):
    """y, dx and every parameter's gradient of one step under the seed."""
    x = x.detach().requires_grad_()
    torch.manual_seed(manual_seed)
    output = module(x)
    return output, *torch.autograd.grad(output.square().sum(), (x, *module.parameters()))


def assert_same_step(first, second, x):
    for i, (ours, theirs) in enumerate(zip(gradients(first, x), gradients(second, x), strict=True)):
        testing.assert_same_bits(f"result {i}", ours, theirs, first)


def test_signature_begins_with_the_published_codes():
    parameters = inspect.signature(MixLinear).parameters
    assert list(parameters)[:5] == ["in_features", "out_features", "bias", "target", "p"]
    assert (parameters["bias"].default, parameters["target"].default, parameters["p"].default) == (True, None, 0.0)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in list(parameters.values())[5:])


def test_positional_arguments(device):
    target = torch.randn(5, 17, device=device)
    layer = MixLinear(17, 5, False, target, 0.3, device=device)
    assert (layer.in_features, layer.out_features, layer.bias, layer.p) == (17, 5, None, 0.3)
    assert torch.equal(layer.target, target)
    assert isinstance(layer, nn.Linear)


def test_forward_is_mix_linear_of_its_tensors(linear, backend):
    layer = mixed_layer(linear, 0.7, mask="element", grad_scale="paper", backend=backend)
    x = torch.randn(2, 3, 17, device=linear.weight.device)
    options = {"mask": "element", "grad_scale": "paper", "backend": backend}
    output, dx, dw, db = gradients(layer, x)
    leaves = [t.detach().requires_grad_() for t in (x, layer.weight, layer.bias)]
    torch.manual_seed(7)
    want = mix_linear(leaves[0], leaves[1], layer.target, leaves[2], 0.7, **options)
    want_grads = torch.autograd.grad(want.square().sum(), leaves)
    for ours, theirs in zip((output, dx, dw, db), (want, *want_grads), strict=True):
        testing.assert_same_bits("result", ours, theirs, layer)


@pytest.mark.parametrize("bias", (True, False))
def test_state_dict_is_that_of_a_linear_and_loads_both_ways(bias, device):
    linear = nn.Linear(17, 5, bias, device=device)
    layer = MixLinear(17, 5, bias, torch.zeros(5, 17), 0.5, device=device)
    assert list(layer.state_dict()) == list(linear.state_dict())
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(layer.weight, linear.weight)
    assert not layer.target.any()
    nn.init.zeros_(linear.weight)
    linear.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer.weight, linear.weight)


def test_initialisation_is_that_of_a_linear(device):
    torch.manual_seed(3)
    linear = nn.Linear(17, 5, device=device)
    torch.manual_seed(3)
    layer = MixLinear(17, 5, p=0.5, device=device)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)
    assert layer.target is None


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("training", (True, False))
def test_from_linear_and_back_keep_parameters_and_mode(bias, training, device):
    linear = nn.Linear(17, 5, bias, device=device).train(training)
    layer = MixLinear.from_linear(linear, 0.5)
    back = layer.to_linear()
    assert type(back) is nn.Linear
    for module in (layer, back):
        assert module.weight is linear.weight
        assert module.bias is linear.bias
        assert module.training == training
        assert (module.in_features, module.out_features) == (17, 5)


def test_a_forward_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(TypeError, match="linear: Scaled, which has a forward of its own"):
        MixLinear.from_linear(Scaled(3, 4), 0.5)
    assert MixLinear.from_linear(MixLinear(3, 4, p=0.1), 0.5).p == 0.5


def test_a_target_in_the_place_of_bias_is_refused():
    with pytest.raises(TypeError, match=r"bias: Tensor.*target is the fourth"):
        MixLinear(3, 4, torch.zeros(4, 3))


def test_from_linear_takes_a_copy_of_the_weight_as_target(linear):
    layer = MixLinear.from_linear(linear, 1.0)
    pretrained = linear.weight.detach().clone()
    nn.init.zeros_(linear.weight)
    assert torch.equal(layer.target, pretrained)
    assert not layer.target.requires_grad
    given = torch.ones_like(pretrained)
    assert MixLinear.from_linear(linear, 1.0, given).target.data_ptr() == given.data_ptr()


def test_the_optimizer_of_the_linear_trains_the_layer(linear, backend):
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    layer = MixLinear.from_linear(linear, 0.5, backend=backend)
    before = layer.weight.detach().clone()
    layer(torch.randn(3, 17, device=before.device)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.target, before)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_the_target_follows_the_module(dtype, linear, backend):
    layer = MixLinear.from_linear(linear, 0.5, backend=backend).to(dtype)
    assert layer.target.dtype == layer.weight.dtype == dtype
    assert layer(torch.randn(3, 17, dtype=dtype, device=linear.weight.device)).dtype == dtype
    assert layer.to("meta").target.device.type == "meta"


def test_a_target_on_the_meta_device_is_refused():
    """from_pretrained of transformers makes a model there, and then gives its buffers memory with no values."""
    linear = nn.Linear(17, 5, device="meta")
    for make in (
        lambda: MixLinear(17, 5, target=torch.zeros(5, 17), device="meta"),
        lambda: MixLinear.from_linear(linear, 0.5),
    ):
        with pytest.raises(ValueError, match="target: the layer is on the meta device"):
            make()


def test_a_target_of_another_dtype_is_converted(device):
    layer = MixLinear(17, 5, target=torch.zeros(5, 17, dtype=torch.float64), device=device, dtype=torch.bfloat16)
    assert layer.target.dtype == torch.bfloat16


def deep_copied(layer):
    return copy.deepcopy(layer)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", (deep_copied, pickled, saved_and_loaded))
@pytest.mark.parametrize("target", (None, "zero"))
def test_a_duplicate_does_the_same(duplicate, target, linear, backend):
    layer = mixed_layer(linear, target=None if target is None else torch.zeros_like(linear.weight), backend=backend)
    other = duplicate(layer)
    assert other.weight is not layer.weight
    assert repr(other) == repr(layer)
    assert_same_step(other, layer, torch.randn(3, 17, device=linear.weight.device))


def test_eval_and_p_zero_are_the_linear(linear, backend):
    x = torch.randn(3, 17, device=linear.weight.device)
    plain = nn.Linear(17, 5, device=x.device)
    for p, training in ((0.5, False), (1.0, False), (0.0, True)):
        layer = mixed_layer(linear, p, backend=backend).train(training)
        plain.load_state_dict(layer.state_dict())
        assert_same_step(layer, plain, x)


@masks
def test_p_one_is_the_target(mask, linear, backend, mixes_first):
    layer = mixed_layer(linear, 1.0, mask=mask, backend=backend)
    x = torch.randn(300, 17, device=linear.weight.device)
    output, dx, dw, _ = gradients(layer, x)
    testing.assert_same_bits("y", output, F.linear(x, layer.target, layer.bias), layer)
    testing.assert_same_bits("dX", dx, (2 * output).mm(layer.target), layer)
    assert not dw.any()


def test_p_may_be_reassigned(linear, backend, mixes_first):
    layer = mixed_layer(linear, 0.0, backend=backend)
    layer.p = 1.0
    x = torch.randn(300, 17, device=linear.weight.device)
    testing.assert_same_bits("y", layer(x), F.linear(x, layer.target, layer.bias), layer)


def test_no_target_is_a_target_of_zero(linear, backend):
    layer = MixLinear(17, 5, p=0.5, device=linear.weight.device, backend=backend)
    zero = MixLinear.from_linear(layer, 0.5, torch.zeros_like(layer.weight), backend=backend)
    assert_same_step(layer, zero, torch.randn(3, 17, device=linear.weight.device))


def test_the_first_forward_of_a_pretrained_model_is_its_own(linear, backend, mixes_first):
    layer = MixLinear.from_linear(linear, 0.9, backend=backend)
    x = torch.randn(300, 17, device=linear.weight.device)
    testing.assert_same_bits("y", layer(x), linear(x), layer)


@masks
@pytest.mark.parametrize("dtype", testing.AUTOCAST_DTYPES, ids=str)
@pytest.mark.parametrize("rows", (3, 300))
def test_autocast(dtype, rows, mask, linear, backend):
    """W and U are mixed in fp32 and rounded once; gradients come back in the parameters' dtype."""
    device = linear.weight.device
    layer = mixed_layer(linear, mask=mask, backend=backend)
    with torch.autocast(device.type, dtype):
        output, dx, *grads = gradients(layer, torch.randn(rows, 17, device=device))
        assert nn.Sequential(layer, nn.ReLU(), MixLinear(5, 3, device=device, p=0.1))(dx).dtype == dtype
        assert layer.eval()(dx).dtype == dtype
    assert output.dtype == dtype
    assert [grad.dtype for grad in (dx, *grads)] == [torch.float32] * 3


def test_autocast_of_a_module_in_half_precision_and_in_fp64(linear, device, backend):
    for dtype, output_dtype in ((torch.float16, torch.bfloat16), (torch.float64, torch.float64)):
        layer = mixed_layer(copy.deepcopy(linear).to(dtype), backend=backend)
        with torch.autocast(device, torch.bfloat16):
            output, dx, dw, db = gradients(layer, torch.randn(3, 17, device=device, dtype=dtype))
        assert output.dtype == output_dtype
        assert {dx.dtype, dw.dtype, db.dtype} == {dtype}


class Checkpointed(nn.Module):
    def __init__(self, module, use_reentrant):
        super().__init__()
        self.module = module
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


@masks
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_activation_checkpointing_recomputes_the_same_mask(use_reentrant, mask, linear, backend):
    second = nn.Linear(5, 17, device=linear.weight.device)
    module = nn.Sequential(
        mixed_layer(linear, mask=mask, backend=backend), nn.GELU(), mixed_layer(second, mask=mask, backend=backend)
    )
    x = torch.randn(2, 150, 17, device=linear.weight.device)

    def step(module):
        module.zero_grad()
        leaf = x.detach().requires_grad_()
        torch.manual_seed(7)
        module(leaf).square().sum().backward()
        return leaf.grad, *(parameter.grad.clone() for parameter in module.parameters())

    for ours, plain in zip(step(Checkpointed(module, use_reentrant)), step(module), strict=True):
        testing.assert_same_bits("gradient", ours, plain, module)


def test_hooks_and_functional_call_work(linear, backend):
    """W' is computed in forward from whatever the parameters are then."""
    layer, other = mixed_layer(linear, backend=backend), mixed_layer(linear, backend=backend)
    other.target, other.weight = layer.target, nn.Parameter(layer.weight.detach() + 1)
    shapes = []
    layer.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    x = torch.randn(3, 17, device=linear.weight.device)
    torch.manual_seed(7)
    output = torch.func.functional_call(layer, dict(other.named_parameters()), x)
    torch.manual_seed(7)
    testing.assert_same_bits("y", output, other(x), layer)
    assert shapes == [(3, 5)]


def test_seed_of_the_call_is_the_next_draw_of_the_default_generator(linear, backend):
    """One draw a call: the generator's next numbers do not depend on the mask, p or shape."""
    x = torch.randn(3, 17, device=linear.weight.device)
    for p, mask in ((0.1, "input"), (0.9, "element")):
        layer = mixed_layer(linear, p, mask=mask, backend=backend)
        torch.manual_seed(5)
        output, after = layer(x), torch.rand(3, device=x.device)
        torch.manual_seed(5)
        layer.seed = torch.randint(-(2**63), 2**63 - 1, (), device=x.device)
        testing.assert_same_bits("y", output, layer(x), layer)
        assert torch.equal(after, torch.rand(3, device=x.device)), "one draw a call"


def test_its_own_weight_as_target_is_copied(linear):
    alias = torch.from_dlpack(linear.weight.detach())
    for own in (linear.weight.detach(), linear.state_dict()["weight"], alias):
        layer, before = MixLinear.from_linear(linear, 0.5, own), linear.weight.detach().clone()
        with torch.no_grad():
            layer.weight.add_(1.0)
        assert torch.equal(layer.target, before)


def test_in_eval_mode_it_is_traced_as_a_linear(linear):
    layer, x = MixLinear.from_linear(linear, 0.5).eval(), torch.randn(3, 17, device=linear.weight.device)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), linear(x))


def test_p_is_a_python_float(linear):
    """A NumPy float would be an array under torch.compile."""
    assert type(MixLinear.from_linear(linear, np.float64(0.5)).p) is float


def test_repr(linear):
    layer = MixLinear.from_linear(linear, 0.9, mask="element")
    assert repr(layer) == "MixLinear(in_features=17, out_features=5, bias=True, p=0.9, mask='element', target=tensor)"
    assert "bias=False, p=0.0, mask='input', target=zero)" in repr(MixLinear(17, 5, False))
    chosen = MixLinear(17, 5, grad_scale="paper", backend="reference")
    assert repr(chosen).endswith("target=zero, grad_scale='paper', backend='reference')")
    assert repr(MixLinear(17, 5, distribution="gaussian")).endswith("target=zero, distribution='gaussian')")


@masks
def test_gradient_accumulation_adds_masks_of_both_steps(mask, linear, backend):
    device = linear.weight.device
    layer = MixLinear(17, 1, False, None, 0.75, mask=mask, device=device, backend=backend)
    kept = torch.zeros_like(layer.weight)
    for step in range(2):
        torch.manual_seed(step)
        layer(torch.ones(1, 17, device=device)).sum().backward()
        torch.manual_seed(step)
        kept += 4.0 * (layer(torch.eye(17, device=device)).t() != 0)
    testing.assert_same_bits("dW", layer.weight.grad, kept, layer)
