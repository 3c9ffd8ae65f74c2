"""Gradients for every layout and any frozen operands, and what is computed and saved for them."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from parameters import masks
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mixout_fast import autograd, backends, mix_linear, mixout, reference, testing
from mixout_fast.autograd import is_in_cpp
from mixout_fast.backends import cpu, operators
from mixout_fast.functional import DTYPES

few_and_many_rows = pytest.mark.parametrize("rows", (3, 255))


@masks
def test_gradcheck(mask, device, backend):
    testing.check_gradients(mask, device, backend)


def transposed(tensor):
    """The same values with the last two dimensions' strides swapped."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other(tensor):
    """The same values two apart in memory, with NaN between."""
    spread = torch.full((*tensor.shape, 2), torch.nan, dtype=tensor.dtype, device=tensor.device)
    spread[..., 0] = tensor
    return spread[..., 0]


def offset(tensor):
    """The same values, contiguous, at an address that is not aligned for vector loads."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    flat[1:] = tensor.flatten()
    return flat[1:].view(tensor.shape)


@masks
@few_and_many_rows
@pytest.mark.parametrize("layout", (transposed, every_other, offset))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(layout, rows, mask, dtype, device, backend, path, seed):
    some = ("weight", "target"), ("input", "weight", "target")
    for operands in (("input",), ("weight",), ("target",), ("grad_output",), *some):
        case = testing.integer_case(rows, 33, 17, p=0.75, mask=mask, dtype=dtype, device=device, seed=seed)
        strided = {name: layout(getattr(case, name)) for name in operands}
        testing.check_exact(dataclasses.replace(case, **strided, origin=f"{layout.__name__} {operands}"), backend)


@masks
@few_and_many_rows
def test_expanded_operands_and_bias_layouts(rows, mask, device, backend, path, seed):
    case = testing.integer_case(rows, 17, 33, p=0.5, mask=mask, device=device, seed=seed)
    one = torch.ones((), device=device)
    for changed in (
        {"grad_output": one.expand(rows, 33)},
        {"input": case.input[:1].expand(rows, 17)},
        {"target": one.expand(33, 17)},
        {"bias": one.expand(33)},
        {"bias": every_other(case.bias)},
        {"bias": offset(case.bias)},
    ):
        testing.check_exact(dataclasses.replace(case, **changed, origin=f"expanded {list(changed)}"), backend)


@masks
@pytest.mark.parametrize("leading", ((), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0, 3), (150, 2)), ids=str)
def test_leading_dimensions(leading, mask, device, backend, path, seed):
    for dtype, compute in ((torch.float64, torch.float64), (torch.float32, torch.bfloat16)):
        case = testing.integer_case(
            leading, 17, 5, p=0.75, mask=mask, dtype=dtype, compute=compute, device=device, seed=seed
        )
        testing.check_exact(case, backend)


@masks
@pytest.mark.parametrize("leading", ((5,), (2, 3), (150, 2)), ids=str)
def test_output_can_be_changed_in_place(leading, mask, device, backend, path, seed):
    """As nn.ReLU(inplace=True) or a residual's addition does."""
    case = testing.random_case(leading, 17, 5, p=0.5, mask=mask, device=device, seed=seed)
    weight = case.weight.requires_grad_()
    results = []
    for change in (torch.relu, torch.relu_):
        output = mix_linear(case.input, weight, case.target, case.bias, 0.5, mask=mask, seed=case.seed, backend=backend)
        results.append(torch.autograd.grad(change(output), weight, case.grad_output)[0])
    testing.assert_same_bits("dW", *results, case)


@masks
def test_no_rows(mask, device, backend, path, seed):
    """dW and db are zeros, which a kernel still has to write; at p = 0.9 forward gathers the kept of 255 columns."""
    for p in (0.1, 0.3, 0.9):
        results = testing.run(testing.random_case(0, 255, 33, p=p, mask=mask, device=device, seed=seed), backend)
        assert not any(results[name].any() for name in ("dW", "db"))


@masks
@pytest.mark.parametrize("shape", ((3, 0, 5), (3, 5, 0), (0, 0, 0)), ids=str)
def test_no_features(shape, mask, device, backend, path):
    rows, in_features, out_features = shape
    x = torch.randn(rows, in_features, device=device, requires_grad=True)
    weight = torch.randn(out_features, in_features, device=device, requires_grad=True)
    output = mix_linear(x, weight, p=0.5, mask=mask, backend=backend)
    assert output.shape == (rows, out_features)
    assert not output.any()
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape


@masks
@few_and_many_rows
@pytest.mark.parametrize("target", (True, False))
@pytest.mark.parametrize("bias", (True, False))
def test_frozen_operands_get_no_gradient_and_the_others_the_same(target, bias, rows, mask, device, backend, seed):
    case = testing.integer_case(rows, 33, 17, p=0.75, mask=mask, target=target, bias=bias, device=device, seed=seed)
    want = testing.oracle(case)
    leaves = {"dX": case.input, "dW": case.weight, "db": case.bias}
    names = [name for name, leaf in leaves.items() if leaf is not None]
    for count in range(1, len(names) + 1):
        for trained in itertools.combinations(names, count):
            x, weight, b = (
                None if leaf is None else leaf.detach().requires_grad_(name in trained) for name, leaf in leaves.items()
            )
            options = {"mask": mask, "seed": case.seed, "backend": backend}
            mix_linear(x, weight, case.target, b, case.p, **options).backward(case.grad_output)
            for name, leaf in zip(leaves, (x, weight, b), strict=True):
                if name in trained:
                    testing.assert_same_values(f"{name} with {trained}", leaf.grad, want[name].float(), case)
                else:
                    assert leaf is None or leaf.grad is None


def counted_backward_products(case, backend, trained):
    """Multiply-adds of the library's matrix products in backward, those called by a backend's operators included."""
    leaves = [t.detach().requires_grad_(name in trained) for name, t in (("x", case.input), ("w", case.weight))]
    output = mix_linear(*leaves, case.target, None, case.p, mask=case.mask, seed=case.seed, backend=backend)
    with torch.profiler.profile(record_shapes=True, with_flops=True) as profile:
        output.backward(case.grad_output)
    return sum(event.flops or 0 for event in profile.events() if event.name in ("aten::mm", "aten::addmm")) // 2


def test_only_the_needed_products_are_computed(device, backend, seed):
    """dX costs the dense product; dW, with the input mask, its kept columns alone; a frozen operand nothing."""
    rows, in_features, out_features = 512, 255, 64
    # In fp32 and bf16 the CPU backend computes dW itself, if the processor can; in fp16 the library does.
    dtype = torch.float16 if backend == "cpu" else torch.float32
    case = testing.random_case(rows, in_features, out_features, p=0.9, dtype=dtype, device=device, seed=seed)
    assert not any(testing.is_one_pass(case, backend))
    kept = int(reference.keep_mask(case.seed, case.weight.shape, case.p, "input").sum())
    kept = max(kept, reference.THIN_OUTPUT)  # padded to THIN_OUTPUT: one seed in 80 keeps fewer
    if backends.BACKENDS[backend] not in (cpu, reference):
        kept = reference.capacity(in_features, case.p)  # padded to the static size: these cannot wait for the device
    dense, compact = rows * in_features * out_features, rows * kept * out_features
    assert counted_backward_products(case, backend, "w") == compact
    assert counted_backward_products(case, backend, "x") == dense
    assert counted_backward_products(case, backend, "xw") == dense + compact


@masks
@pytest.mark.parametrize("p", (0.1, 0.6, 0.9))
def test_torch_counts_the_operations(p, mask, device, backend, seed, mixes_first):
    """FlopCounterMode sees no product inside an operator, so the operators register their counts."""
    rows, in_features, out_features = 3 * 64, 255, 64
    case = testing.random_case(rows, in_features, out_features, p=p, mask=mask, device=device, seed=seed)
    leaves = [t.detach().requires_grad_() for t in (case.input.view(3, 64, in_features), case.weight)]
    with FlopCounterMode(display=False) as forward:
        output = mix_linear(*leaves, case.target, None, p, mask=mask, seed=case.seed, backend=backend)
    with FlopCounterMode(display=False) as backward:
        output.backward(case.grad_output.view_as(output))
    product = 2 * rows * in_features * out_features
    assert forward.get_total_flops() == product
    width = in_features * (backward.get_total_flops() - product) / product
    if mask == "element" or (p == 0.1 and backend != "reference"):
        assert width == in_features
    else:  # the number of kept columns, its mean or its bound
        kept = int(reference.keep_mask(case.seed, case.weight.shape, p, mask).sum())
        bound = reference.capacity(in_features, p)
        known = kept, max(kept, reference.THIN_OUTPUT), (1 - p) * in_features, bound
        assert min(abs(width - count) for count in known) < 0.6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_weight_gradient_of_few_outputs_is_the_librarys_masked(p, dtype, device, backend, seed):
    """At p = 0.9 too, where with more outputs forward gathers the kept columns."""
    case = testing.random_case(255, 513, reference.THIN_OUTPUT - 1, p=p, dtype=dtype, device=device, seed=seed)
    operands = (tensor.to(testing.product_dtype(case, backend)) for tensor in (case.grad_output.t(), case.input))
    product = torch.mm(*operands).to(dtype)
    want = reference.mask_grad(product, case.seed, p, "input", reference.scale(p), dtype)
    testing.assert_same_bits("dW", testing.run(case, backend)["dW"], want, case)


@pytest.mark.parametrize("shape", ((255, 255, 17), (255, 255, 8), (1, 64, 8)), ids=str)
@pytest.mark.parametrize("p", (0.1, 0.9))
def test_dropped_columns_of_the_gradient_are_positive_zero(p, shape, device, backend, seed):
    """Even if dY is not finite."""
    case = testing.random_case(*shape, p=p, device=device, seed=seed)
    case.grad_output[0, 1] = torch.inf
    dW = testing.run(case, backend)["dW"]
    dropped = ~reference.keep_mask(case.seed, case.weight.shape, case.p, "input").view(-1)
    testing.assert_same_bits("dropped columns", dW[:, dropped], torch.zeros_like(dW[:, dropped]), case)


@masks
@pytest.mark.parametrize("rows", (17, 255))
def test_grad_scale_paper_leaves_out_the_scale(rows, mask, device, backend, seed):
    case = testing.integer_case(rows, 33, 17, p=0.75, mask=mask, device=device, seed=seed)
    exact, paper = testing.run(case, backend, "exact"), testing.run(case, backend, "paper")
    assert exact["dW"].any()
    for name, ratio in (("y", 1), ("dX", 1), ("dW", 4), ("db", 1)):
        testing.assert_same_values(f"{name}, exact against paper", exact[name], paper[name] * ratio, case)
    weight = case.weight.requires_grad_()
    for grad_scale, ratio in (("exact", 4), ("paper", 1)):
        mixed = mixout(weight, None, 0.75, True, mask=mask, grad_scale=grad_scale, seed=case.seed, backend=backend)
        (grad,) = torch.autograd.grad(mixed.sum(), weight)
        keep = reference.keep_mask(case.seed, weight.shape, 0.75, mask).expand_as(weight)
        testing.assert_same_bits(f"mixout, {grad_scale}", grad, ratio * keep.float(), case)


@masks
@few_and_many_rows
def test_second_derivative_of_mix_linear_is_refused(rows, mask, device, backend, seed):
    case = testing.random_case(rows, 17, 5, p=0.5, mask=mask, device=device, seed=seed)
    weight = case.weight.requires_grad_()
    output = mix_linear(case.input, weight, case.target, None, case.p, mask=mask, backend=backend)
    for loss in (output.square().sum(), output.sum()):
        with pytest.raises(RuntimeError, match="differentiates once"):
            torch.autograd.grad(loss, weight, create_graph=True)


@masks
def test_second_derivative_through_mixout(mask, device, backend, seed):
    """mix_linear's docstring names F.linear(x, mixout(w)) for a second derivative; that of ‖x W'‖² is exact."""
    case = testing.integer_case(3, 17, 5, p=0.75, mask=mask, device=device, seed=seed)
    weight = case.weight.requires_grad_()
    mixed = mixout(weight, case.target, case.p, True, mask=mask, seed=case.seed, backend=backend)
    energy = F.linear(case.input, mixed).square().sum() / 2
    (grad,) = torch.autograd.grad(energy, weight, create_graph=True)
    (product,) = torch.autograd.grad(grad.sum(), weight)
    scaled = 4 * reference.keep_mask(case.seed, weight.shape, case.p, mask).expand_as(weight)
    want = scaled * F.linear(scaled.float(), case.input.t() @ case.input)
    testing.assert_same_values("second derivative", product, want, case)


def skip_without_cpp(backend):
    if not is_in_cpp(backends.BACKENDS[backend]):
        pytest.skip(f"no autograd function in C++ for {backend}: {operators.AUTOGRAD_ERROR}")


@masks
@pytest.mark.parametrize("p", (0.1, 0.9))
@pytest.mark.parametrize("trained", ("x", "w", "b", "xw", "wb", "xwb", ""))
def test_autograd_function_in_python_is_the_same(trained, p, mask, device, backend, path, seed, monkeypatch):
    """The Python function is what a compiler traces, and serves if the one in C++ was not built for this torch."""
    skip_without_cpp(backend)

    def results_and_bytes_saved(case):
        leaves = {"x": case.input, "w": case.weight, "b": case.bias}
        leaves = {name: leaf.detach().requires_grad_(name in trained) for name, leaf in leaves.items()}
        results = []

        def forward():
            operands = leaves["x"], leaves["w"], case.target, leaves["b"]
            with torch.autocast(case.input.device.type, case.compute, enabled=case.autocast):
                results.append(mix_linear(*operands, p, mask=mask, seed=case.seed, backend=backend))

        saved = saved_bytes(forward, (*leaves.values(), case.target))
        assert results[0].requires_grad == bool(trained)
        if trained:
            results += torch.autograd.grad(results[0], [leaves[name] for name in trained], case.grad_output)
        return results, saved

    for dtype, compute, narrow in (
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ):
        case = testing.random_case(
            (3, 25), 255, 33, p=p, mask=mask, dtype=dtype, compute=compute, device=device, seed=seed
        )
        case = dataclasses.replace(case, target=case.target.to(narrow))
        results, saved = results_and_bytes_saved(case)
        with monkeypatch.context() as patch:
            patch.setattr(operators, "AUTOGRAD_ERROR", "left out")
            results_in_python, saved_in_python = results_and_bytes_saved(case)
        assert saved == saved_in_python
        for name, result, want in zip(("y", *trained), results, results_in_python, strict=True):
            testing.assert_same_bits(name, result, want, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_usual_calls_go_through_cpp(dtype, device, backend, seed, monkeypatch):
    """From the checks on: what C++ leaves to Python takes the host longer, and no other test would notice."""
    skip_without_cpp(backend)
    monkeypatch.setattr(autograd, "mix_linear", None)
    case = testing.random_case((2, 3), 40, 17, p=0.9, dtype=dtype, compute=dtype, device=device, seed=seed)
    operands = {"input": case.input, "weight": case.weight, "target": case.target, "bias": case.bias}
    operands |= {"p": 0.9, "backend": backend}
    usual = (
        {},
        {"target": None, "bias": None},
        {"target": case.target.to(torch.float16 if dtype.itemsize > 2 else dtype)},
        {"seed": 3},
        {"seed": case.seed},
        {"input": case.input[0, 0]},
        {"input": case.input.mT.contiguous().mT, "bias": torch.stack((case.bias, case.bias), 1)[:, 0]},
    )
    for changed in usual:
        assert mix_linear(**operands | changed).dtype == dtype
    of_other_dtypes = {"input": case.input.double(), "bias": case.bias.half()}
    for changed in (*usual, *([] if dtype == torch.float64 else [of_other_dtypes])):
        with torch.autocast(device, torch.bfloat16):
            output = mix_linear(**operands | changed)
        assert output.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)


@masks
@pytest.mark.parametrize("p", (0.1, 0.9))
def test_saved_tensors_that_a_hook_casts_are_refused(p, mask, device, backend, seed):
    """As float32, the seed and the kept index would be read past their ends, and as other numbers."""
    skip_without_cpp(backend)
    x = torch.randn(64, 1024, device=device, requires_grad=True)
    weight = torch.randn(48, 1024, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.float(), lambda saved: saved):
        output = mix_linear(x, weight, p=p, mask=mask, seed=seed, backend=backend)
    with pytest.raises(RuntimeError, match="seed: takes a 0-d int64 tensor"):
        output.sum().backward()


def test_a_weight_replaced_by_a_larger_one_is_refused(device, backend, seed):
    skip_without_cpp(backend)
    x = torch.randn(9, 24, device=device, requires_grad=True)
    weight = torch.randn(40, 24, device=device, requires_grad=True)
    output = mix_linear(x, weight, p=0.5, seed=seed, backend=backend)
    weight.data = torch.randn(4000, 24, device=device)
    with pytest.raises(RuntimeError, match="grad: takes"):
        output.sum().backward()


def test_a_target_without_memory_is_refused(device, backend, seed):
    """It would be taken for a target of zeros."""
    skip_without_cpp(backend)
    x, weight, target = (torch.randn(48, 24, device=device) for _ in range(3))
    target.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="target: its storage is empty"):
        mix_linear(x, weight, target, p=0.5, seed=seed, backend=backend)


@pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason=str(cpu.LOAD_ERROR))
@pytest.mark.parametrize("index", ((0, 0, 0), (2, 1, 0), (0, 1, 24), (-1, 0, 1)), ids=str)
def test_an_index_that_does_not_ascend_is_refused(index, seed):
    """Gradients would be written beside the kept columns, or beside dW."""
    index, columns = torch.tensor(index, dtype=torch.int32), torch.ones(9, 3)
    operands = torch.ones(9, 40), None, index, columns, torch.ones(40, 24), None, torch.tensor(seed), 0.9, "input", 10.0
    with pytest.raises(RuntimeError, match="index: takes ascending numbers"):
        cpu.gradients(*operands, (False, True, False), False)


def test_operators_refuse_operands_that_do_not_fit(device, backend, seed):
    skip_without_cpp(backend)
    module = backends.BACKENDS[backend]
    case = testing.random_case(9, 24, 40, p=0.9, device=device, seed=seed)
    operands = {name: getattr(case, name) for name in ("input", "weight", "target", "bias", "seed")}
    operands = {name: tensor.detach() for name, tensor in operands.items()} | {"grad": case.grad_output}
    gathered = torch.arange(3, dtype=torch.int32, device=device), torch.zeros(9, 3, device=device)
    operands |= dict(zip(("index", "columns"), gathered, strict=True))

    def call(operator, **changed):
        given = operands | changed
        weight, target, draw = given["weight"], given["target"], (given["seed"], 0.9, "input")
        grad, index, columns, needs = given["grad"], given["index"], given["columns"], (True, True, True)
        if operator == "mix":
            module.mix(weight, target, *draw, torch.float32)
        elif operator == "mask_grad":
            module.mask_grad(weight, *draw, 10.0, torch.float32)
        elif operator == "linear":
            module.linear(given["input"], weight, target, given["bias"], *draw, True, False)
        elif operator == "from input":
            module.gradients(grad, given["input"], None, None, weight, target, *draw, 10.0, needs, False)
        else:
            module.gradients(grad, None, index, columns, weight, target, *draw, 10.0, needs, False)

    forward, backward = ("mix", "linear"), ("from input", "from columns")
    misfits = {
        "seed": ((*forward, *backward, "mask_grad"), (case.seed.int(), case.seed.view(1), case.seed.double())),
        "target": ((*forward, *backward), (case.target[:3], case.target[:, :3], case.target.bfloat16())),
        "input": (("linear", "from input"), (case.input[:, :3], torch.ones((), device=device))),
        "bias": (("linear",), (case.bias[:3], case.bias.double(), case.weight)),
        "grad": (backward, (case.grad_output[:, :3], torch.ones((), device=device))),
        "index": (("from columns",), (gathered[0].long(), gathered[0].view(1, 3), gathered[0][:1].expand(3))),
        "columns": (("from columns",), (gathered[1][:, :2], gathered[1][:8], gathered[1].double())),
    }
    for name, (names, tensors) in misfits.items():
        for operator, tensor in itertools.product(names, tensors):
            call(operator)
            with pytest.raises(RuntimeError, match=f"{name}: takes"):
                call(operator, **{name: tensor.detach()})
    for tensor in (case.input[:8], case.input.double()):
        with pytest.raises(RuntimeError, match="input: takes as many rows as grad"):
            call("from input", input=tensor.detach())


def saved_bytes(function, held):
    """Bytes saved for backward, each storage once, without those of `held` and of 0-d tensors (the seed)."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in held if tensor is not None}
    sizes = []

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in seen and tensor.dim():
            seen.add(memory.data_ptr())
            sizes.append(memory.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes)


@masks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (17, 2048))
@pytest.mark.parametrize(
    ("p", "trained", "ratio"),
    ((0.9, "xwb", 0.2), (0.9, "wb", 0.2), (0.9, "xb", 0), (0.7, "xwb", 1), (0.5, "xwb", 1), (0.1, "xwb", 1)),
)
def test_bytes_saved_for_backward(p, trained, ratio, rows, mask, dtype, device, backend, seed):
    """nn.Linear saves x where the weight is trained and nothing but parameters where it is not."""
    ratio = max(ratio, 1) if mask == "element" and "w" in trained else ratio
    case = testing.random_case(rows, 768, 32, p=p, mask=mask, dtype=dtype, device=device, seed=seed)
    x, weight, bias = (
        t.detach().requires_grad_(name in trained)
        for name, t in (("x", case.input), ("w", case.weight), ("b", case.bias))
    )
    held = (weight, bias, case.target)
    linear = saved_bytes(lambda: F.linear(x, weight, bias), held)
    ours = saved_bytes(lambda: mix_linear(x, weight, case.target, bias, p, mask=mask, backend=backend), held)
    assert linear == (x.nbytes if "w" in trained else 0)
    # 0.2 is X[:, kept] at its static width, 144 of 768 columns; with few rows the indices add noticeably.
    indices = 4 * reference.capacity(768, p) if 0 < ratio < 1 else 0
    assert ours <= ratio * x.nbytes + indices


@few_and_many_rows
@pytest.mark.parametrize("changed", ("weight", "target"))
def test_a_weight_changed_between_forward_and_backward_raises(changed, rows, device, backend, seed):
    """As with nn.Linear: W' is mixed again in backward."""
    case = testing.random_case(rows, 17, 5, p=0.5, device=device, seed=seed)
    x, weight = case.input.requires_grad_(), case.weight.requires_grad_()
    output = mix_linear(x, weight, case.target, None, case.p, backend=backend)
    with torch.no_grad():
        getattr(case, changed).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@masks
def test_draws_between_forward_and_backward_do_not_change_the_mask(mask, device, backend):
    weight = torch.ones(64, 64, device=device, requires_grad=True)
    outputs = [mix_linear(torch.eye(64, device=device), weight, p=0.5, mask=mask, backend=backend) for _ in range(3)]
    for output in outputs:
        torch.rand(7, device=device)
        (grad,) = torch.autograd.grad(output.sum(), weight)
        assert torch.equal(grad, output.t())


@masks
def test_a_tensor_left_behind_by_a_transform_gets_its_gradient(mask, device, backend):
    """As with nn.functional.linear: a tensor that outlives a transform is a wrapper whose own graph has ended."""
    operands = {"input": torch.eye(64), "weight": torch.ones(64, 64), "bias": torch.ones(64)}
    operands = {name: tensor.to(device).requires_grad_() for name, tensor in operands.items()}
    seed = torch.tensor(0, device=device)

    def gradient(operand, **changed):
        output = mix_linear(**operands | changed, p=0.5, mask=mask, seed=seed, backend=backend)
        return torch.autograd.grad(output.sum(), operand)[0]

    for name, operand in operands.items():
        left = []
        torch.func.grad(lambda tensor, left=left: (left.append(tensor), tensor.sum())[1])(operand)
        assert torch.equal(gradient(operand, **{name: left[0]}), gradient(operand)), name


def test_transforms_are_refused(device, backend):
    """A Function without a separate setup_context cannot be transformed; torch says so."""
    x, weight = torch.eye(64, device=device), torch.ones(64, 64, device=device)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda weight: mix_linear(x, weight, p=0.5, backend=backend).sum())(weight)


@masks
def test_vmap_is_refused_or_right(mask, device, backend):
    x, weight = torch.randn(3, 5, 64, device=device), torch.ones(64, 64, device=device)
    seed = torch.tensor(1, device=device)
    calls = partial(mix_linear, weight=weight, p=0.5, mask=mask, seed=seed, backend=backend)
    try:
        mapped = torch.vmap(calls)(x)
    except RuntimeError as error:
        assert "functorch transforms" in str(error)
    else:
        assert torch.equal(mapped, torch.stack([calls(one) for one in x]))


@pytest.mark.parametrize("mapped", (False, True))
def test_vmap_sees_the_seed_drawn(mapped, device, backend):
    """With randomness="different" each entry has a mask of its own, also where no operand is mapped over."""
    skip_without_cpp(backend)
    x, weight = torch.eye(64, device=device), torch.ones(64, 64, device=device)

    def result(entry):
        return mix_linear(entry if mapped else x, weight, p=0.5, backend=backend)

    entries = x.expand(2, 64, 64)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(result)(entries)
    assert not torch.equal(*torch.vmap(result, randomness="different")(entries))
    assert torch.equal(*torch.vmap(result, randomness="same")(entries))


class DrawsSeen(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.randint.low
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_dispatch_modes_see_the_seed_drawn(mode, device, backend):
    x, weight = torch.eye(64, device=device), torch.ones(64, 64, device=device, requires_grad=True)
    with mode(), DrawsSeen() as seen:
        mix_linear(x, weight, p=0.5, backend=backend)
    assert seen.count == 1


@pytest.mark.parametrize("tracer", ("jit", "make_fx"))
def test_a_trace_draws_a_seed_each_run(tracer, device, backend):
    """A trace of the eager call in C++: that in Python, whose operators may return None, torch.jit.trace refuses."""
    skip_without_cpp(backend)
    x, weight = torch.eye(64, device=device), torch.ones(64, 64, device=device)

    def output(input):
        return mix_linear(input, weight, p=0.5, backend=backend)

    def gradient(input):
        leaf = input.detach().requires_grad_()
        return torch.autograd.grad(output(leaf).sum(), leaf)[0]

    if tracer == "jit":
        function, traced = output, torch.jit.trace(output, (x,), check_trace=False)
    else:
        function, traced = gradient, make_fx(gradient, pre_dispatch=True)(x)
    runs = []
    for run in (traced, function):
        torch.manual_seed(0)
        runs.append([run(x) for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(*runs[0])


def test_forward_mode_is_refused(device, backend):
    operands = {"input": torch.eye(64), "weight": torch.ones(64, 64), "bias": torch.ones(64)}
    operands |= {"target": torch.zeros(64, 64)}
    operands = {name: tensor.to(device) for name, tensor in operands.items()}
    for name, operand in operands.items():
        with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
            mix_linear(**operands | {name: forward_ad.make_dual(operand, operand)}, p=0.5, backend=backend)


def test_meta_tensors_give_the_shape():
    """As with nn.functional.linear: for models that are built before their weights are loaded."""
    x, weight = torch.ones(2, 3, 64, device="meta"), torch.ones(32, 64, device="meta", requires_grad=True)
    for p in (0.3, 0.9):
        output = mix_linear(x, weight, p=p)
        output.backward(torch.empty_like(output))
        assert (output.device.type, output.shape, weight.grad.shape) == ("meta", (2, 3, 32), (32, 64))


class OperatorCalls(TorchDispatchMode):
    """Notes the calls of the package's registered operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("mixout_fast"):
            self.calls.append((func, tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))))
        return func(*args, **kwargs or {})


@masks
@pytest.mark.parametrize("p", (0.3, 0.9))
@pytest.mark.parametrize("ways", tuple(itertools.product((39, 40), (39, 40), (False, True), (False, True))), ids=str)
def test_both_autograd_functions_call_the_operators_alike(ways, p, mask, device, backend, seed, monkeypatch):
    """For all combinations of `ways`, such as one pass for y and not for dX, with 40 rows."""
    skip_without_cpp(backend)
    module = backends.BACKENDS[backend]
    monkeypatch.setattr(module.checked_mix_linear.__self__, "ways", lambda *_: ways)
    case = testing.random_case((8, 5), 95, 33, p=p, mask=mask, device=device, seed=seed)
    calls = []
    for error in (None, "left out"):
        monkeypatch.setattr(operators, "AUTOGRAD_ERROR", error)
        with OperatorCalls() as recorder:
            testing.run(case, backend)
            with torch.no_grad():  # the weight requires grad, yet nothing is gathered for it
                weight = case.weight.detach().requires_grad_()
                mix_linear(case.input, weight, p=p, mask=mask, seed=case.seed, backend=backend)
        options = [(func, [a for a in args if not isinstance(a, torch.Tensor)]) for func, (args, _) in recorder.calls]
        assert [func.name().partition("::")[2] for func, _ in options] == ["linear", "linear_backward", "linear"]
        calls.append(options)
    assert calls[0] == calls[1]


@masks
@pytest.mark.parametrize(
    "leading, column_major",
    ((3, ""), (255, ""), ((2, 3), ""), (255, "WU"), (255, "W")),
    ids=("3", "255", "2x3", "columns", "W's columns"),
)
@pytest.mark.parametrize("target", (True, False))
def test_registered_operators_are_pure_and_have_fakes(target, leading, column_major, mask, device, backend, path, seed):
    """What torch.compile relies on; a backend without registered operators has nothing to check."""
    case = testing.random_case(leading, 33, 17, p=0.9, mask=mask, target=target, bias=target, device=device, seed=seed)
    module, draw = backends.BACKENDS[backend], (case.seed, case.p, case.mask)
    transposed = testing.column_major(case)
    operands = [
        transposed.weight if "W" in column_major else case.weight,
        transposed.target if "U" in column_major else case.target,
    ]
    with OperatorCalls() as recorder:
        module.mix(*operands, *draw, torch.bfloat16)
        module.mask_grad(case.weight, *draw, 10.0, torch.bfloat16)
        for static, gathers in itertools.product((False, True), (False, True) if mask == "input" else (False,)):
            _, *gathered = module.linear(case.input, *operands, case.bias, *draw, gathers, static)
            arguments = (case.grad_output, None if gathers else case.input, *gathered, *operands, *draw, 10.0)
            for needs in ((True, True, True), (False, True, False), (True, False, True)):
                module.gradients(*arguments, needs, static)
    for operator, (args, kwargs) in recorder.calls:
        torch.library.opcheck(operator, args, kwargs)
