"""What is the Triton backend's own: blocks, choices, launches, operators. Agreement is tested as of every backend."""

import dataclasses
from unittest import mock

import pytest
import torch

from mixout_fast import backends, mix_linear, reference, testing
from mixout_fast.backends import triton
from mixout_fast.functional import MASKS

DEVICES = [device for device in ("cpu", "cuda") if triton.unavailable(device) is None]
DEVICES = [device for device in DEVICES if device == "cpu" or torch.cuda.is_available()]

masks = pytest.mark.parametrize("mask", MASKS)


@pytest.fixture(params=DEVICES)
def served(request):
    """Each device that the backend serves; without a GPU, and not interpreted, none."""
    return request.param


def test_it_is_not_chosen_for_cpu_tensors_before_the_cpu_backend():
    names = list(backends.BACKENDS)
    assert names.index("cpu") < names.index("triton") < names.index("reference")


def test_why_it_cannot_serve_is_said(monkeypatch):
    assert "CUDA" in triton.unavailable("mps")
    monkeypatch.setattr(triton, "INTERPRETS", False)
    assert "TRITON_INTERPRET=1" in triton.unavailable("cpu")
    monkeypatch.setattr(triton, "INSTALLED", False)
    assert triton.unavailable("cuda") == triton.unavailable("cpu") == "triton is not installed"


@pytest.fixture
def small_blocks(monkeypatch):
    """So that small tensors take several blocks, each of its own kind at the edges, and a program several of them."""
    for name, value in (
        ("TILE_BYTES", 128),
        ("BLOCK_COLUMNS", 16),
        ("PROGRAMS", 3),
        ("ELEMENT_BLOCK", 64),
        ("EXPANDED", (16, 16)),
    ):
        monkeypatch.setattr(triton, name, value)


@masks
@pytest.mark.parametrize(("dtype", "compute"), ((torch.float32, torch.float32), (torch.float32, torch.bfloat16)))
def test_bits_over_many_blocks(dtype, compute, mask, served, seed, small_blocks):
    for shape in ((17, 63, 33), (1, 32, 16)):
        for p in (0.1, 0.9):
            case = testing.random_case(*shape, p=p, mask=mask, dtype=dtype, compute=compute, device=served, seed=seed)
            testing.check_mixed_weight(case, "triton")
            testing.check_mask_grad(case, "triton")
            testing.check_output(case, "triton")
            if mask == "input":
                testing.check_gather(case, "triton")
                testing.check_grad_weight(case, "triton")


@masks
def test_weights_of_three_dimensions_and_any_strides(mask, served, seed, small_blocks):
    torch.manual_seed(seed)
    weight = torch.randn(5, 3, 18, device=served).transpose(1, 2)
    target = torch.randn(18, 5, 3, device=served).transpose(0, 1)
    draw = torch.tensor(seed, device=served), 0.5, mask
    for ours, theirs in zip(*[
        (m.mix(weight, target, *draw, torch.float16), m.mask_grad(weight, *draw, 2.0, torch.float32))
        for m in (triton, reference)
    ], strict=True):  # fmt: skip
        testing.assert_same_bits("of (5, 18, 3)", ours, theirs, f"mask={mask!r}, seed={seed}")


def test_more_columns_than_are_counted_at_once(served, seed):
    case = testing.random_case(3, 2 * 1024 + 5, 17, p=0.9, device=served, seed=seed)
    testing.check_mixed_weight(case, "triton")
    testing.check_gather(case, "triton")
    testing.check_exact(testing.integer_case(3, 1024 + 5, 17, p=0.75, device=served, seed=seed), "triton")


def test_products_in_one_pass_drop_kept_columns_past_the_capacity(served, monkeypatch):
    for module in (triton, reference):
        monkeypatch.setattr(module, "capacity", lambda count, p: min(count, 16))
    case = testing.integer_case(3, 130, 70, p=0.5, device=served)
    assert reference.keep_mask(case.seed, (1, 130), 0.5, "input").sum() == 16
    assert testing.is_one_pass(case, "triton") == (True, True)
    testing.check_exact(case, "triton")


@pytest.mark.parametrize(
    ("rows", "forward", "backward"),
    # mix and gather; mix, expand. In one pass: product, gather; product, expand.
    ((128, ["prologue"], ["prologue", "expand"]), (16, ["one_pass", "prologue"], ["one_pass", "expand"])),
)
def test_launches_of_a_layer(rows, forward, backward, served, seed):
    """Beside these the library's: y where mixed first; dX likewise, the compact product and db."""
    case = testing.random_case(rows, 64, 32, p=0.9, device=served, seed=seed)
    x, weight = case.input.requires_grad_(), case.weight.requires_grad_()
    seen = []
    launch = triton.launch

    def count(kernel, *arguments, **options):
        seen.append(kernel.fn.__name__.removesuffix("_kernel"))
        launch(kernel, *arguments, **options)

    with mock.patch.object(triton, "launch", count):
        output = mix_linear(x, weight, case.target, case.bias, case.p, seed=case.seed, backend="triton")
        assert seen == forward
        seen.clear()
        output.backward(case.grad_output)
        assert seen == backward


def test_every_configuration_of_the_one_pass_product(served, seed, monkeypatch):
    for config in triton.ONE_PASS_CONFIGS:
        monkeypatch.setattr(triton, "ONE_PASS_CONFIGS", (config, config))
        for mask in MASKS:
            case = testing.integer_case(13, 130, 70, p=0.75, mask=mask, device=served, seed=seed)
            testing.check_exact(case, "triton")


def test_the_configuration_follows_the_number_of_programs():
    wide, narrow = triton.ONE_PASS_CONFIGS
    rows = torch.empty(20, 64)
    assert triton.one_pass_config(rows, 64 * triton.WIDE_PROGRAMS) == {"BLOCK_M": 32} | wide
    assert triton.one_pass_config(rows, 64 * (triton.WIDE_PROGRAMS - 1)) == {"BLOCK_M": 32} | narrow
    assert triton.one_pass_config(torch.empty(1000, 64), 64)["BLOCK_M"] == 64
    assert triton.one_pass_config(torch.empty(1, 64), 64)["BLOCK_M"] == 16


def test_error_of_few_rows(served, seed):
    """Of 3 rows MKL sums in 16 parts, so what is no worse may not sum in long ones."""
    cases = [testing.random_case(3, 1023, 127, p=0.5, device=served, seed=seed + i) for i in range(4)]
    assert testing.is_one_pass(cases[0], "triton") == (True, True)
    testing.check_error(cases, "triton")


def test_operators_are_pure_and_have_fakes(served, seed):
    case = testing.random_case(5, 33, 17, p=0.9, device=served, seed=seed)
    operands, draw = (case.weight, case.target), (case.seed, case.p)
    index, columns = triton.gather(case.input, *draw, True)
    compact = columns.t() @ case.grad_output
    for function, arguments in (
        (triton.masked, (*operands, *draw, "input", 10.0, False, torch.bfloat16)),
        (triton.masked, (case.weight, None, *draw, "element", 10.0, True, torch.float32)),
        (triton.gathered, (case.input, *draw)),
        (triton.mixed_and_gathered, (*operands, case.input, *draw)),
        (triton.product, (case.input, *operands, case.bias, *draw, "input", False)),
        (triton.product, (case.grad_output, *operands, None, *draw, "element", True)),
        (triton.expanded, (compact, index, 33, 10.0, torch.bfloat16)),
    ):
        torch.library.opcheck(function.operator, arguments)


def test_infinite_entries_of_other_columns_stay_there(served, seed):
    """Blocks reach past the edges of tensors: what lies beyond must not enter a sum, not even times 0."""
    case = testing.integer_case(13, 33, 17, p=0.5, device=served, seed=seed)

    def within_infinity(tensor):
        spread = torch.full([size + 5 for size in tensor.shape], torch.inf, device=tensor.device)
        inner = spread[tuple(slice(0, size) for size in tensor.shape)]
        return inner.copy_(tensor)

    spread = {
        name: within_infinity(getattr(case, name)) for name in ("input", "weight", "target", "bias", "grad_output")
    }
    testing.check_exact(dataclasses.replace(case, **spread, origin="within infinity"), "triton")
