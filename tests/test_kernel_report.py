"""The Triton kernels compile for GPUs that are not here, without spills and with the instructions that they are for."""

import dataclasses

import pytest

from mixout_fast.backends import triton

if not triton.INSTALLED or triton.INTERPRETS:
    pytest.skip("triton is not installed, or interprets its kernels", allow_module_level=True)

from benchmarks import kernel_report

pytestmark = pytest.mark.slow


def reading_of(launch, target="sm_90"):
    return kernel_report.read(kernel_report.compile_for(launch, kernel_report.TARGETS[target]), target)


@pytest.fixture(scope="module")
def launches():
    """Of bf16, the first of each kind."""
    seen = {}
    for launch in kernel_report.launches(quick=True):
        seen.setdefault(launch.what, launch)
    return seen


@pytest.mark.parametrize("target", ("sm_90", "gfx942"))
@pytest.mark.parametrize("what", ("mix, gather", "mix, element", "y, input", "dX, input", "expand"))
def test_compiled_without_a_fault(what, target, launches):
    assert kernel_report.faults(launches[what], target, reading_of(launches[what], target)) == []


def test_faults_are_found(launches):
    """Of a product too large for its registers and shared memory, and of rows two apart."""
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
