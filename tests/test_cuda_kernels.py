"""The CUDA kernels beyond what every backend is tested for: on a GPU, or emulated by `pytest --emulate-cuda`."""

import dataclasses
import functools
import itertools
import math
import sys

import cuda_emulation
import dropped_pages
import pytest
import torch
from parameters import masks, precisions

from mixout_fast import backends, mix_linear, reference, testing
from mixout_fast.backends import cuda, gpu, operators
from mixout_fast.functional import DTYPES, MASKS

DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
DEVICE = next((d for d in DEVICES if backends.describe(d)["cuda"] is None), None)
pytestmark = pytest.mark.skipif(DEVICE is None, reason="no GPU (--emulate-cuda emulates one)")

emulated = pytest.mark.skipif(DEVICE != "cpu", reason="--emulate-cuda: tests neither set nor guard a GPU's memory")
paths = pytest.mark.parametrize("path", ("one_pass", "mixed_first"))


@pytest.fixture
def take(monkeypatch):
    """Makes the backend take one path, whatever the number of rows."""

    def take(path):
        rows = sys.maxsize if path == "one_pass" else -1
        monkeypatch.setattr(cuda, "ONE_PASS_ROWS", dict.fromkeys(cuda.ONE_PASS_ROWS, (rows, rows)))

    return take


@pytest.fixture
def allow_tf32():
    """Sets whether fp32 products may round their operands to TF32."""

    def allow(allowed):
        torch.set_float32_matmul_precision("high" if allowed else "highest")

    before = torch.get_float32_matmul_precision()
    yield allow
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def limit_capacity(monkeypatch):
    """Lowers the capacity of every mask, in the reference and in the emulation alike."""

    def limit(limit):
        capacity = reference.capacity
        for module in (reference, operators):
            monkeypatch.setattr(module, "capacity", lambda count, p: min(limit, capacity(count, p)))
        monkeypatch.setattr(cuda_emulation.variable("capacity_limit"), "value", limit)

    return limit


def check_bits(case):
    checks = [testing.check_mask, testing.check_mixed_weight, testing.check_mask_grad, testing.check_repeatable]
    if case.mask == "input":
        checks += [testing.check_gather, testing.check_grad_weight]
    for check in checks:
        check(case, "cuda")


@paths
@masks
@precisions
@pytest.mark.parametrize("shape", ((1, 8, 16), (5, 96, 80), (64, 256, 128), (130, 520, 72)), ids=str)
def test_rows_of_whole_vectors(shape, dtype, compute, mask, path, take, seed):
    """Rows are multiples of 16 bytes, unlike in the other tests, with a full and a cut tile at each edge."""
    take(path)
    options = {"mask": mask, "dtype": dtype, "compute": compute, "device": DEVICE, "seed": seed}
    check_bits(testing.random_case(*shape, p=0.3, **options))
    column_major = testing.column_major(testing.random_case(*shape, p=0.9, **options))
    testing.check_each_gradient_alone(column_major, "cuda")
    if mask == "input":
        testing.check_grad_weight(column_major, "cuda")
    case = testing.integer_case(*shape, p=0.75, **options)
    testing.check_exact(case, "cuda")
    testing.check_exact(testing.column_major(case), "cuda")
    del options["seed"]
    # With one row the 8 cases of error_cases have too few results: their largest error is luck.
    seeds = range(seed, seed + 64, 8) if shape[0] == 1 else (seed,)
    cases = [testing.error_cases(testing.random_case, shape, s, p=0.5, **options) for s in seeds]
    testing.check_error(itertools.chain(*cases), "cuda")


@paths
@masks
@precisions
@pytest.mark.parametrize("name", ("input", "weight", "target", "grad_output"))
def test_whole_vectors_from_addresses_that_are_none(name, dtype, compute, mask, path, take, seed):
    """Rows are multiples of 16 bytes but start an entry past an aligned address, where a GPU's vector access faults."""
    take(path)
    options = {"mask": mask, "dtype": dtype, "compute": compute, "device": DEVICE, "seed": seed}
    case = testing.integer_case(9, 64, 48, p=0.75, **options)
    tensor = getattr(case, name)
    entry = tensor.new_zeros(1)
    behind = torch.cat((entry, tensor.flatten(), entry))[1:-1].view(tensor.shape)
    assert behind.data_ptr() % 16 != 0
    testing.check_exact(dataclasses.replace(case, **{name: behind}, origin=f"{name} unaligned"), "cuda")


@emulated
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", dropped_pages.MIXED)
def test_weights_of_dropped_neurons_are_not_read(name, dtype, seed):
    dropped_pages.check_they_are_not_read(name, cuda, dtype, seed)


@emulated
@paths
@pytest.mark.parametrize(("in_features", "limit"), (*itertools.product((300, 1100), (0, 1, 100, 400)), (20000, 5000)))
def test_kept_columns_past_a_lowered_capacity_are_dropped(in_features, limit, path, take, limit_capacity, seed):
    """What happens once in 1e8 masks, made common: about half the columns are kept."""
    take(path)
    limit_capacity(limit)
    options = {"p": 0.5, "device": DEVICE, "seed": seed}
    check_bits(testing.random_case(5, in_features, 40, **options))
    case = testing.integer_case(5, in_features, 40, **options)
    kept = reference.keep_mask(case.seed, case.weight.shape, 0.5, "input")
    assert kept.sum() == min(limit, reference.mask_words(case.seed, in_features).ge(2**31).sum())
    testing.check_exact(case, "cuda")
    testing.check_exact(testing.column_major(case), "cuda")


@emulated
@pytest.mark.parametrize("limit", (0, 1, 10))
def test_input_channels_past_a_lowered_capacity_are_dropped(limit, limit_capacity, seed):
    """In a convolution, whose offsets share their channel's mask entry."""
    limit_capacity(limit)
    torch.manual_seed(seed)
    weight, target = torch.randn(2, 5, 60, 9)
    draw = torch.tensor(seed), 0.5, "input"
    assert reference.keep_mask(draw[0], weight.shape, *draw[1:]).sum() == limit
    for ours, theirs in zip(*[
        (m.mix(weight, target, *draw, torch.float32), m.mask_grad(weight, *draw, 2.0, torch.float32))
        for m in (cuda, reference)
    ], strict=True):  # fmt: skip
        testing.assert_same_bits("of (5, 60, 9)", ours, theirs, f"limit {limit}, seed={seed}")


@paths
@pytest.mark.parametrize(("in_features", "p", "of_mask"), ((200, 0.9865, 37628019), (1100, 0.99755, 310510928)))
def test_kept_columns_past_the_capacity_are_dropped(in_features, p, of_mask, path, take, seed):
    """What happens once in 3e8 masks: the first seeds with a column more than the capacity, 16, found by trying all."""
    take(path)
    drawn = torch.tensor(of_mask, device=DEVICE)
    assert reference.mask_words(drawn, in_features).ge(reference.threshold(p)).sum() == 17
    assert reference.keep_mask(drawn, (1, in_features), p, "input").sum() == 16
    random = (testing.random_case(5, in_features, 130, p=p, device=DEVICE, seed=seed + i) for i in range(8))
    cases = [dataclasses.replace(case, seed=drawn) for case in random]
    check_bits(cases[0])
    testing.check_error(cases, "cuda")


@paths
@pytest.mark.parametrize("p", (0.1, 0.9))
def test_more_columns_than_are_gathered_at_once(p, path, take, seed):
    take(path)
    cases = [testing.random_case(3, 20000, 17, p=p, device=DEVICE, seed=seed + i) for i in range(8)]
    check_bits(cases[0])
    testing.check_error(cases, "cuda")


KEPT = {
    "none": [],
    "the last": [1499],
    "all": range(1500),
    "half of them before a border": range(36, 1500),
    "one less than half": range(37, 1500),
    "at borders": [c for border in range(128, 1500, 128) for c in (border - 1, border)],
    "every other": range(1, 1500, 2),
}


@pytest.mark.parametrize("padding", (0, 5, 600))
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("column_major", (False, True), ids=("rows", "columns"))
def test_columns_are_found_in_the_index(column_major, kept, padding, seed):
    """A block expands 128 columns, column-major 32; in an index of more than 384, or 480, it searches for its part."""
    torch.manual_seed(seed)
    index = torch.tensor([*kept, *padding * [-1]], dtype=torch.int32, device=DEVICE)
    columns, grad = (torch.randint(-3, 4, (3, count), device=DEVICE).float() for count in (len(index), 40))
    draw = torch.tensor(seed, device=DEVICE), 0.5, "input"
    weight, needs = torch.empty(40, 1500, device=DEVICE), (False, True, False)
    weight = weight.t().contiguous().t() if column_major else weight
    _, dW, _ = cuda.gradients(grad, None, index, columns, weight, None, *draw, 2.0, needs, False)
    want = torch.zeros_like(weight)
    want[:, list(kept)] = 2 * grad.t() @ columns[:, : len(kept)]
    assert torch.equal(dW, want)


@pytest.mark.parametrize("module", (cuda, backends.BACKENDS["triton"]), ids=("cuda", "triton"))
def test_one_pass_is_for_few_rows_or_a_large_grid(module):
    few, many = gpu.MANY_OUTPUTS - 1, gpu.MANY_OUTPUTS
    assert module.one_pass_rows(torch.bfloat16, few) == (16, 16)
    assert module.one_pass_rows(torch.bfloat16, many) == (64, -1)
    assert module.one_pass_rows(torch.float32, many) == (16, -1)


def test_dW_is_a_full_product_where_the_compact_one_saves_less_than_a_quarter():
    assert reference.capacity(64, 0.8) == 48
    assert not gpu.takes_full_product(0.8, 40, 64)
    assert gpu.takes_full_product(0.7, 40, 64)
    assert gpu.takes_full_product(0.8, reference.THIN_OUTPUT - 1, 64)


def test_more_columns_than_the_one_pass_holds(take, seed):
    """W' is mixed first. p is small: where no entry can be past the capacity, a block draws only its own entries."""
    take("one_pass")
    case = testing.random_case(2, 2**18 + 7, 3, p=0.0001, device=DEVICE, seed=seed)
    check_bits(case)
    testing.check_error([case], "cuda")


@pytest.mark.parametrize("one_pass", (True, False))
def test_gather_of_no_rows_still_has_an_index(one_pass, take, seed):
    take("one_pass" if one_pass else "mixed_first")
    case = testing.random_case(0, 255, 17, p=0.9, device=DEVICE, seed=seed)
    testing.check_gather(case, "cuda")


@pytest.mark.parametrize("rows", (0, 5))
def test_p_one_gathers_nothing(rows, take, seed):
    """Without entries nothing is launched: CUDA refuses a grid of no blocks."""
    take("mixed_first")
    testing.check_gather(testing.random_case(rows, 255, 17, p=1.0, device=DEVICE, seed=seed), "cuda")


@paths
def test_tf32_where_it_is_allowed(path, take, allow_tf32, seed):
    """Products of fp32 on tensor cores: exact on small integers, but 1 + 2^-12 is rounded to 1."""
    take(path)
    allow_tf32(True)
    for shape in ((17, 33, 65), (64, 256, 128)):
        for mask in MASKS:
            testing.check_exact(testing.integer_case(*shape, p=0.75, mask=mask, device=DEVICE, seed=seed), "cuda")
    if path == "one_pass":
        x = torch.full((4, 64), 1 + 2.0**-12, device=DEVICE, requires_grad=True)
        weight = torch.full((32, 64), 1 + 2.0**-12, device=DEVICE)
        y = mix_linear(x, weight, weight, None, 0.5, seed=seed, backend="cuda")
        assert (y == 64).all()
        y.backward(x.detach()[:, :32])
        assert (x.grad == 32).all()
        allow_tf32(False)
        assert (mix_linear(x, weight, weight, None, 0.5, seed=seed, backend="cuda") > 64).all()


@pytest.mark.parametrize("shape", ((63, 1001), (10000, 201), (100000, 64)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_of_db(shape, dtype, take, seed):
    """db is summed in parts, which grow if dY has a nonzero mean."""
    take("mixed_first")
    torch.manual_seed(seed)
    grad = (torch.randn(shape, dtype=torch.float64) + 0.25).to(DEVICE, dtype)
    x, weight = torch.ones(shape[0], 1).to(grad), torch.ones(shape[1], 1).to(grad)
    draw = torch.tensor(seed, device=DEVICE), 0.5, "element"
    _, _, db = cuda.gradients(grad, x, None, None, weight, None, *draw, 2.0, (True, True, True), False)
    want = torch.tensor([math.fsum(column) for column in grad.double().t().tolist()], dtype=torch.float64)
    error, of_library = ((result.double().cpu() - want).abs().max() for result in (db, grad.sum(0)))
    assert error <= testing.ERROR_RATIO * of_library


def launches(function):
    """How many kernels a function launches, the library's included: each call of the operators named here is one."""
    ours = cuda_emulation.variable("launches")
    before = ours.value
    with torch.profiler.profile() as profile:
        function()
    library = [e for e in profile.events() if e.name in ("aten::addmm", "aten::mm", "aten::sum", "aten::_to_copy")]
    return ours.value - before + len(library)


@emulated
@paths
@masks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("p", "out_features"), ((0.1, 40), (0.5, 40), (0.9, 40), (0.9, 8)))
def test_launches_of_a_layer(p, out_features, dtype, mask, path, take, seed):
    """At most 2 forward and 4 backward, whatever is trained."""
    take(path)
    case = testing.random_case(70, 300, out_features, p=p, mask=mask, dtype=dtype, seed=seed)
    for trained in ("xwb", "xw", "xb", "wb", "x", "w", "b"):
        x, weight, bias = (
            tensor.detach().requires_grad_(name in trained)
            for name, tensor in (("x", case.input), ("w", case.weight), ("b", case.bias))
        )
        outputs = []

        def forward(*operands, outputs=outputs):
            outputs.append(mix_linear(*operands, p, mask=mask, seed=case.seed, backend="cuda"))

        assert launches(functools.partial(forward, x, weight, case.target, bias)) == (1 if path == "one_pass" else 2)
        backward = launches(functools.partial(outputs[0].backward, case.grad_output))
        assert backward == 4 if trained == "xwb" else backward <= 4, trained


@pytest.mark.skipif(DEVICE != "cuda", reason="the emulation has no CUDA graphs")
@paths
@pytest.mark.parametrize("p", (0.5, 0.9))
def test_a_captured_graph_draws_fresh_masks(p, path, take):
    """So nothing in forward or backward waits for the device; at 0.9 forward gathers the kept columns too."""
    take(path)
    weight = torch.ones(128, 128, device="cuda", requires_grad=True)
    x = torch.eye(128, device="cuda")

    def step():
        y = mix_linear(x, weight, p=p, backend="cuda")
        return y, torch.autograd.grad(y.sum(), weight)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grad = step()
    seen = []
    for _ in range(8):
        graph.replay()
        assert torch.equal(grad, y.t())
        seen.append(y.clone())
    assert len(torch.stack(seen).flatten(1).unique(dim=0)) == len(seen)
