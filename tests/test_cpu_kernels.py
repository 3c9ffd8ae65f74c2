"""Tests of the C++ kernels for CPUs alone: every instruction set, and sizes at which their sums change form."""

import dataclasses
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import dropped_pages
import pytest
import torch

from mixout_fast import mix_linear, testing
from mixout_fast.backends import cpu

STATM = Path("/proc/self/statm")
CPUINFO = Path("/proc/cpuinfo")
OWN_PRODUCTS = (torch.float32, torch.float64)  # fp64 with AVX2, and both with less: only for few rows
if cpu.LOAD_ERROR is None:
    OWN_PRODUCTS = tuple(dict.fromkeys((*OWN_PRODUCTS, *cpu.own_products())))

pytestmark = pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason=str(cpu.LOAD_ERROR))


@pytest.mark.parametrize("dtype", OWN_PRODUCTS, ids=str)
@pytest.mark.parametrize(
    "shape",
    (
        *((12, 383, 200), (24, 1023, 33), (9, 767, 60), (300, 3100, 40), (300, 40, 1601)),
        *((300, 1600, 600), (70, 600, 600), (17, 8300, 70), (40, 2300, 300)),
    ),
    ids=str,
)
def test_error_is_at_most_twice_the_librarys(shape, dtype, seed):
    """At 9 and 12 rows the library sums in more parts than at 24, in fp64 in shorter ones than in fp32.

    With many rows y sums over more than one block of W' from 3073 in_features on, dX from 769 out_features on. In bf16
    the last four shapes have more than one block of outputs, in y or in dX; the second and the fourth of these are also
    summed in parts.
    """
    testing.check_error(testing.error_cases(testing.random_case, shape, seed, p=0.9, dtype=dtype), "cpu")


@pytest.mark.parametrize("dtype", OWN_PRODUCTS, ids=str)
def test_error_of_sums_that_the_library_halves(dtype, seed):
    """Of few more than 192 terms. Each draw by itself: the largest error of all draws hides that of one in seven."""
    for i in range(40):
        case = testing.random_case(300, 194, 194, p=0.1, dtype=dtype, bias=False, seed=seed + i)
        testing.check_error([case], "cpu")


@pytest.mark.parametrize("dtype", dict.fromkeys((*OWN_PRODUCTS, torch.bfloat16, torch.float16)), ids=str)
@pytest.mark.parametrize("rows", (12, 300))
def test_error_of_column_major_weights(rows, dtype, seed):
    """With parts of vectors and whole ones, and more than one block of outputs in y, in dX and in dW."""
    for shape in ((rows, 70, 300), (rows, 1600, 96), (rows, 64, 1601), (rows, 1500, 500)):
        for options in ({"p": 0.9}, {"p": 0.1, "target": False, "bias": False}):
            cases = testing.error_cases(testing.random_case, shape, seed, dtype=dtype, **options)
            testing.check_error(map(testing.column_major, cases), "cpu")


@pytest.mark.parametrize("dtype", OWN_PRODUCTS, ids=str)
@pytest.mark.parametrize("shape, p", (((20000, 14, 64), 0.1), ((20000, 96, 17), 0.9), ((200000, 8, 20), 0.3)), ids=str)
@pytest.mark.parametrize("name", ("cpu", "reference"))
def test_error_of_many_rows(shape, p, dtype, name, seed):
    """dW with few outputs or kept columns, and db, are sums of many pieces, which grow if dY has a nonzero mean."""
    cases = [testing.random_case(*shape, p=p, dtype=dtype, seed=seed + i) for i in range(2)]
    for case in cases:
        case.grad_output.add_(1)
    testing.check_error(cases, name)
    testing.check_error(map(testing.column_major, cases), name)


@pytest.mark.parametrize("dtype", dict.fromkeys((*OWN_PRODUCTS, torch.bfloat16)), ids=str)
def test_error_of_many_equal_rows(dtype, seed):
    """As the gradient of a mean has: once a sum in fp32 is large enough, each addition rounds in the same direction."""
    cases = [testing.random_case(300_000, 8, 16, p=0.5, dtype=dtype, seed=seed + i) for i in range(2)]
    for case in cases:
        case.grad_output.fill_(1 + 2**-7)
        case.input.detach().fill_(1 + 2**-6)
    testing.check_error(cases, "cpu")
    testing.check_error(map(testing.column_major, cases), "cpu")


@pytest.mark.parametrize("dtype", dict.fromkeys((*OWN_PRODUCTS, torch.bfloat16)), ids=str)
@pytest.mark.parametrize("rows", (1, 40))
def test_error_beside_a_large_bias(rows, dtype, seed):
    """If the bias were added first, every partial sum of y would be rounded to the bias's precision."""
    cases = testing.error_cases(testing.random_case, (rows, 3500, 300), seed, p=0.1, dtype=dtype)
    cases = [dataclasses.replace(case, bias=1000 * case.bias) for case in cases]
    testing.check_error(cases, "cpu")
    testing.check_error(map(testing.column_major, cases), "cpu")


@pytest.mark.parametrize("dtype", dict.fromkeys((*OWN_PRODUCTS, torch.bfloat16, torch.float16)), ids=str)
@pytest.mark.parametrize("name", ("y", "dX"))
def test_column_major_weights_of_dropped_neurons_are_not_read(name, dtype, seed):
    dropped_pages.check_they_are_not_read(name, cpu, dtype, seed)


def results_of_our_own(dtype):
    """Those of one-pass products: where dW and db are the library's, they depend on the threads."""
    in_fp32 = dtype == torch.bfloat16 and cpu.multiplies_in_fp32(dtype)
    return ("y", "dX") if cpu.instruction_set() in ("avx2", "baseline") or in_fp32 else testing.RESULTS


def assert_same_for_any_threads(case, names):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7, 8):
            torch.set_num_threads(count)
            results.append(testing.run(case, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name in names:
            testing.assert_same_bits(name, other[name], results[0][name], case)


@pytest.mark.parametrize("shape", ((128, 300, 48), (128, 300, 32), (8, 300, 200), (300, 512, 200)), ids=str)
@pytest.mark.parametrize("dtype", OWN_PRODUCTS, ids=str)
def test_results_do_not_depend_on_the_threads(shape, dtype, seed):
    if not cpu.own_products():
        pytest.skip("the library's products depend on the threads")
    case = testing.random_case(*shape, p=0.7, dtype=dtype, seed=seed)
    assert_same_for_any_threads(case, results_of_our_own(dtype))
    assert_same_for_any_threads(testing.column_major(case), results_of_our_own(dtype))


@pytest.mark.parametrize("shape", ((601, 300, 49), (300, 49, 800), (300, 512, 200)), ids=str)
@pytest.mark.parametrize("dtype", OWN_PRODUCTS, ids=str)
def test_products_whose_rows_are_shared_do_not_depend_on_the_threads(shape, dtype, seed, monkeypatch):
    """With few outputs many threads share the rows too. Only our own products: the library's depend on the threads."""
    monkeypatch.setattr(cpu, "ONE_PASS_ROWS", dict.fromkeys(cpu.ONE_PASS_ROWS, (sys.maxsize, sys.maxsize)))
    assert_same_for_any_threads(testing.random_case(*shape, p=0.7, dtype=dtype, seed=seed), results_of_our_own(dtype))


@pytest.mark.parametrize("rows", (3, 300))
@pytest.mark.parametrize("shape", ((0, 5), (5, 0)), ids=str)
def test_one_pass_of_an_empty_weight_is_refused(rows, shape, seed):
    """mix_linear never asks for it, but an operator called directly must not divide by the number of outputs."""
    operands = torch.randn(rows, shape[1]), torch.randn(shape), None, None, torch.tensor(seed)
    with pytest.raises(RuntimeError, match="weight: empty"):
        torch.ops.mixout_fast.linear(*operands, 0.5, False, True, False, False, False)


@pytest.mark.parametrize("p", (-0.5, 1.5, float("nan")))
def test_operators_refuse_a_p_that_is_none(p, seed):
    with pytest.raises(RuntimeError, match="p: takes a probability"):
        torch.ops.mixout_fast.mix(torch.ones(3, 5), None, torch.tensor(seed), p, True, torch.float32)


@pytest.mark.parametrize("index", (None, torch.zeros(5, dtype=torch.int32)), ids=("nothing", "index alone"))
def test_backward_refuses_to_make_dw_of_nothing(index, seed):
    operands = torch.ones(8, 3), None, index, None, torch.ones(3, 5), None, torch.tensor(seed)
    with pytest.raises(RuntimeError, match="dW is made of"):
        torch.ops.mixout_fast.linear_backward(*operands, True, True, True, 0.5, True, 2.0, True, False, False)


def process_bytes(field):
    """The size of this process's address space (field 0), or of what is resident (1)."""
    return int(STATM.read_text().split()[field]) * os.sysconf("SC_PAGE_SIZE")


reads_statm = pytest.mark.skipif(not STATM.exists(), reason="reads this process's memory from /proc")


@reads_statm
def test_one_column_of_any_stride_is_not_copied(seed):
    """A transposed row has such strides; copying it would take a vector or more per row."""
    x = torch.randn(1, 2**20).t()
    weight = torch.ones(1, 1)
    mix_linear(x[:300], weight, None, None, 0.5, seed=seed, backend="cpu")
    before = process_bytes(1)
    output = mix_linear(x, weight, None, None, 0.5, seed=seed, backend="cpu")
    assert process_bytes(1) - before < 4 * (x.nbytes + output.nbytes)


@reads_statm
def test_memory_kept_for_sums_does_not_grow_with_the_outputs(seed):
    """Threads keep memory for 16-bit results that they sum in fp32."""
    x, weight = torch.randn(256, 16, dtype=torch.float16), torch.randn(2**17, 16, dtype=torch.float16)
    mix_linear(x, weight[:4096], None, None, 0.5, seed=seed, backend="cpu")
    before = process_bytes(1)
    output = mix_linear(x, weight, None, None, 0.5, seed=seed, backend="cpu")
    size = output.nbytes
    del output
    assert process_bytes(1) - before < size / 2


NARROWER = {
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="others have one instruction set")
@pytest.mark.skipif(not CPUINFO.exists(), reason="reads this processor's flags from /proc")
@pytest.mark.parametrize(
    "ignored",
    ({}, {"ATEN_CPU_CAPABILITY": ""}, {"ATEN_CPU_CAPABILITY": "AVX2"}, {"ONEDNN_MAX_CPU_ISA": "WIDEST"}),
    ids=str,
)
def test_instruction_set_is_the_widest(ignored):
    """Whatever PyTorch and oneDNN ignore in the variables that limit them."""
    flags = set(re.search(r"^flags\s*:(.*)", CPUINFO.read_text(), re.MULTILINE)[1].split())
    needs = {
        "amx": {"avx512f", "avx512_bf16", "avx512_vbmi2", "amx_tile", "amx_bf16"},
        "avx512_bf16": {"avx512f", "avx512_bf16", "avx512_vbmi2"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx2": {"avx2", "fma"},
        "baseline": set(),
    }
    script = "import torch; from mixout_fast.backends import cpu; print(cpu.instruction_set(), "
    script += "*map(cpu.multiplies_in_fp32, (torch.bfloat16, torch.float16)))"
    limits = {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}
    environment = {name: value for name, value in os.environ.items() if name not in limits} | ignored
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    widest = next(name for name, needed in needs.items() if needed <= flags)
    in_fp32 = [str(flag not in flags) for flag in ("avx512_bf16", "avx512_fp16")]
    assert run.stdout.split() == [widest, *in_fp32]


@pytest.mark.parametrize("name", NARROWER)
def test_narrower_instruction_sets_are_as_exact(name, seed):
    command = [sys.executable, "-m", "pytest", "-q", "-k", "test_error_ and not reference", f"--seed={seed}", __file__]
    run = subprocess.run(command, env={**os.environ, **NARROWER[name]}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("name", NARROWER)
def test_checks_pass_with_narrower_instruction_sets(name):
    environment = {**os.environ, **NARROWER[name]}
    script = "from mixout_fast.__main__ import main; from mixout_fast.backends import cpu; print(cpu.instruction_set())"
    script += "; raise SystemExit(main(['check', '--device', 'cpu', '--backend', 'cpu']))"
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    narrowest_first = [*reversed(NARROWER)]
    assert run.stdout.split()[0] in narrowest_first[: narrowest_first.index(name) + 1]
