"""The Triton kernels compile for GPUs that are not present, without spills and to the intended instructions."""

import dataclasses
import functools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from mixout_fast import testing
from mixout_fast.backends import triton
from mixout_fast.functional import MASKS

if not triton.INSTALLED or triton.INTERPRETS:
    pytest.skip("triton is not installed, or interprets its kernels", allow_module_level=True)

from benchmarks import kernel_report

pytestmark = pytest.mark.slow


def reading_of(launch, target="sm_90"):
    return kernel_report.read(kernel_report.compile_for(launch, kernel_report.TARGETS[target]), target)


@pytest.fixture(scope="module")
def every_launch():
    return kernel_report.launches(quick=False)


@pytest.fixture(scope="module")
def launches():
    """The first launch of each kind in bf16."""
    seen = {}
    for launch in kernel_report.launches(quick=True):
        seen.setdefault(launch.what, launch)
    return seen


@pytest.mark.parametrize("target", ("sm_90", "gfx942"))
@pytest.mark.parametrize("what", ("mix, gather, sum", "mix, element, sum", "y, input", "dX, input", "expand, sum"))
def test_compiled_without_a_fault(what, target, launches):
    assert kernel_report.faults(launches[what], target, reading_of(launches[what], target)) == []


@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_100"))
@pytest.mark.parametrize("compute", (torch.bfloat16, torch.float16), ids=str)
def test_the_largest_products_do_not_spill(target, compute, every_launch):
    """In 16 bits the blocks are largest and leave no registers over."""
    largest = [
        launch for launch in every_launch
        if launch.compute == compute and launch.options.get("BLOCK_F") == 64 and launch.options["BLOCK_M"] == 64
    ]  # fmt: skip
    assert {launch.what for launch in largest} == {"y, input", "dX, input", "y, element", "dX, element"}
    for launch in largest:
        assert kernel_report.faults(launch, target, reading_of(launch, target)) == [], f"{launch.what} {launch.dtypes}"


def test_the_report_in_the_repository_has_no_fault(every_launch):
    report = Path(kernel_report.__file__).parent / "results" / "kernel-report.txt"
    compiled = len(every_launch) * len(kernel_report.TARGETS)
    assert report.read_text().splitlines()[-1] == f"{compiled} compiled, 0 with a fault"


def test_a_product_without_tensor_cores_is_summed_in_pieces(every_launch):
    """Each step's sum begins at zero in the compiled code too, which the interpreter cannot show."""
    products = [launch for launch in every_launch if launch.what == "y, input" and launch.dtypes == "float32"]
    (ieee, *_), (tf32, *_) = (
        [launch for launch in products if launch.options["PRECISION"] == precision] for precision in ("ieee", "tf32")
    )
    for launch, in_pieces in ((ieee, True), (tf32, False)):
        code = kernel_report.compile_for(launch, kernel_report.TARGETS["sm_80"]).asm["ttgir"]
        summed_onto = re.findall(r"= tt\.dot %\S+, %\S+, %(\w+)", code)
        assert summed_onto
        assert all(name.startswith("cst") for name in summed_onto) == in_pieces


def test_another_p_compiles_nothing_anew():
    """schedule.py changes p during training."""
    seen, seed = {}, torch.tensor(0)
    note = functools.partial(kernel_report.note_launches, seen, torch.float32, torch.float32, "")
    weight = x = torch.empty(128, 1024)
    for p in (0.9, 0.8, 0.7, 0.5):
        compact = torch.empty(triton.capacity(1024, p), 128)
        index = torch.empty(len(compact), dtype=torch.int32)
        note(triton.prologue, weight, weight, x, None, seed, p, "input", triton.scale(p), False, False, torch.float32)
        note(triton.product, x, weight, weight, None, seed, p, "input", False)
        note(triton.expanded, compact, index, None, 1024, triton.scale(p), False, torch.float32)
    assert [kernel for kernel, *_ in seen] == [
        triton.kernels.prologue_kernel, triton.kernels.one_pass_kernel, triton.kernels.expand_kernel
    ]  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """The names of launched kernels: on CPU tensors too they are compiled and launched as on a GPU, but not run."""
    names = []

    class Launcher:
        def __init__(self, source, metadata):
            self.name = source.fn.__name__

        def __call__(self, *arguments):
            names.append(self.name)

    here = -1  # Not a GPU's number, so that no kernel compiled here is taken for a GPU's, or the other way round.
    driver = mock.Mock(launcher_cls=Launcher)
    driver.get_current_device.return_value = here
    driver.get_current_stream.return_value = 0
    driver.get_current_target.return_value = kernel_report.TARGETS["sm_90"]
    driver.utils.load_binary.return_value = (None, None, 32, 0, 1024)
    driver.utils.get_device_properties.return_value = {"max_shared_mem": kernel_report.SHARED_LIMIT["sm_90"]}
    monkeypatch.setattr(kernel_report.triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton, "unavailable", lambda device_type: None)
    yield names
    for name in ("prologue", "element", "one_pass", "expand"):
        getattr(triton.kernels, f"{name}_kernel").device_caches.pop(here, None)


@pytest.mark.parametrize("path", ("one_pass", "mixed_first"))
@pytest.mark.parametrize("mask", MASKS)
def test_sizes_of_one_compile_and_launch(mask, path, launched, monkeypatch):
    """Triton makes a constant of an argument that is 1, which the interpreter does not."""
    rows = 1000 if path == "one_pass" else -1
    monkeypatch.setattr(triton, "ONE_PASS_ROWS", dict.fromkeys(triton.ONE_PASS_ROWS, (rows, rows)))
    for shape in ((1, 96, 48), (17, 1, 48), (17, 96, 1), (0, 96, 48)):
        testing.run(testing.random_case(*shape, p=0.9, mask=mask, compute=torch.bfloat16), "triton")
    kinds = {"prologue", "expand"} if mask == "input" else {"element"}
    kinds |= {"one_pass"} if path == "one_pass" else set()
    assert {name.removesuffix("_kernel") for name in launched} == kinds


def test_a_seed_at_any_address_compiles_nothing_anew(launched):
    """Seeds that a user draws into one tensor have such addresses."""
    for seed in torch.arange(2):
        triton.mix(torch.empty(32, 32), None, seed, 0.5, "input", torch.float32)
    (compiled, *_) = triton.kernels.prologue_kernel.device_caches[-1]
    assert len(launched) == 2
    assert len(compiled) == 1


def test_faults_are_found(launches):
    """In a product too large for its registers and shared memory, and in loads of entries two apart."""
    product = launches["y, input"]
    large = dataclasses.replace(product, options=product.options | {"BLOCK_M": 256, "BLOCK_R": 128, "num_warps": 2})
    found = " ".join(kernel_report.faults(large, "sm_90", reading_of(large)))
    assert "spills" in found
    assert "shared memory" in found

    mixing = launches["mix, gather"]
    names = mixing.kernel.arg_names
    strided = list(mixing.arguments)
    strided[names.index("stride_wk")] = 2
    strided = dataclasses.replace(mixing, arguments=tuple(strided))
    assert "less than 16 bytes" in " ".join(kernel_report.faults(strided, "sm_90", reading_of(strided)))
