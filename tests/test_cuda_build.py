"""The CUDA library as built, without a GPU: ptxas's report on its kernels, their instructions, loading."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "mixout_fast" / "_CUDA.so"
REPORT = ROOT / "build" / "cuda" / "ptxas.txt"

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="no CUDA library (MIXOUT_FAST_BUILD=cuda builds it)")


def tool(name):
    """The path of a program of the CUDA toolkit, from PATH or from its wheel on PyPI."""
    wheel = next((path for entry in sys.path for path in Path(entry).glob(f"nvidia/cu*/bin/{name}")), None)
    found = shutil.which(name) or wheel
    if found is None:
        pytest.skip(f"no {name}: of the CUDA toolkit, or pip install nvidia-cuda-{name}")
    return found


@pytest.fixture(scope="module")
def kernels():
    """(architecture, kernel's mangled name) -> ptxas's lines on it."""
    if not REPORT.exists() or REPORT.stat().st_mtime < LIBRARY.stat().st_mtime:
        pytest.skip("the library was not built by setup.py build_ext in this tree: no report of ptxas")
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'\n.*Function properties for \w+\n(.*\n.*\n)", REPORT.read_text()
    )
    assert found
    return {(architecture, name): lines for name, architecture, lines in found}


def test_every_kernel_is_built_for_every_architecture(kernels):
    architectures = {architecture for architecture, _ in kernels}
    names = {name for _, name in kernels}
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert architectures == {"sm_80", "sm_90a", "sm_100"}
    for kernel in ("mix_kernel", "mask_grad_kernel", "product_kernel", "expand_kernel"):
        assert any(kernel in name for name in names)
    assert set(kernels) == {(architecture, name) for architecture in architectures for name in names}


def test_gpus_newer_than_all_it_is_compiled_for_find_ptx():
    """Newer GPUs compile the PTX when they load the library. PTX for 9.0a, say, would serve no other GPU."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        pytest.skip("TORCH_CUDA_ARCH_LIST chose the GPUs")
    listed = subprocess.run([tool("cuobjdump"), "-lelf", "-lptx", LIBRARY], capture_output=True, text=True, check=True)
    newest = max(map(int, re.findall(r"sm_(\d+)\w?\.cubin", listed.stdout)))
    assert re.findall(r"sm_(\w+)\.ptx", listed.stdout) == [str(newest)]


def test_no_kernel_spills_or_has_local_memory(kernels):
    for kernel, lines in kernels.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in lines, (kernel, lines)


def test_every_kernel_fits_a_block_of_256_threads(kernels):
    for kernel, lines in kernels.items():
        registers, shared = (int(re.search(pattern, lines)[1]) for pattern in (r"Used (\d+) reg", r"(\d+) bytes smem"))
        assert registers * 256 <= 65536, kernel
        assert shared <= 48 * 1024, kernel


@pytest.fixture(scope="module")
def instructions():
    """(architecture, kernel's mangled name) -> its disassembly."""
    text = subprocess.run([tool("cuobjdump"), "-sass", LIBRARY], capture_output=True, text=True, check=True).stdout
    functions = {}
    for part in text.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = (\w+)", part)[1]
        for function in part.split("Function : ")[1:]:
            functions[architecture, function.split()[0]] = function
    assert functions
    return functions


def of_kernel(instructions, kernel, type_code):
    found = {key: code for key, code in instructions.items() if kernel in key[1] and type_code in key[1]}
    assert len({architecture for architecture, _ in found}) == len({architecture for architecture, _ in instructions})
    return found.items()


@pytest.mark.parametrize(
    ("multiply", "instruction"),
    (
        ("MultiplyBfloat16", r"HMMA\.16816\.F32\.BF16"),
        ("MultiplyFloat16", r"HMMA\.16816\.F32 "),
        ("MultiplyTf32", r"HMMA\.1688\.F32\.TF32"),
    ),
)
def test_products_run_on_tensor_cores(multiply, instruction, instructions):
    for key, code in of_kernel(instructions, "product_kernel", multiply):
        assert re.search(instruction, code), key


@pytest.mark.parametrize("multiply", ("MultiplyBfloat16", "MultiplyFloat16"))
def test_products_load_four_tiles_of_rows_before_they_multiply(multiply, instructions):
    for key, code in of_kernel(instructions, "product_kernel", multiply):
        order = "".join("L" if load else "M" for load, _ in re.findall(r"(LDG\.E\.(?:64|128))|(HMMA)", code))
        assert order.endswith("LLLL" + 8 * "M" + "LLLL" + 8 * "M"), (key, order)


def test_ieee_products_do_not(instructions):
    for key, code in of_kernel(instructions, "product_kernel", "FusedMultiplyAdd"):
        assert "HMMA" not in code, key
        assert re.search(r"FFMA|DFMA", code), key


@pytest.mark.parametrize("kernel", ("mix_kernel", "mask_grad_kernel"))
def test_weights_are_read_and_written_16_bytes_at_a_time(kernel, instructions):
    for key, code in of_kernel(instructions, kernel, kernel):
        assert re.search(r"LDG\.E\S*\.128", code), key
        assert re.search(r"STG\.E\S*\.128", code), key


@pytest.mark.parametrize("type_code", ("8bfloat16", "7float16"))
def test_gathered_entries_are_loaded_eight_at_a_time(type_code, instructions):
    """No load waits for a store. 2-byte column numbers are read from shared memory nowhere else."""
    for key, code in of_kernel(instructions, "mix_kernel", f"mix_kernelINS_{type_code}E"):
        behind = code[[column.start() for column in re.finditer(r"LDS\.U16", code)][-8] :]
        assert re.findall(r"(LDG|STG)\.E\.U16", behind)[:16] == 8 * ["LDG"] + 8 * ["STG"], key


def test_mixing_is_not_contracted(instructions):
    """w' = u + d s rounds the product: the fp32 mixing has no fused multiply-add."""
    for key, code in of_kernel(instructions, "mix_kernelIff", "mix_kernelIff"):
        assert "FMUL" in code and "FFMA" not in code, key


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="of a CPU torch")
def test_it_loads_beside_a_cpu_torch_and_has_fakes_for_a_gpu():
    """Shapes, types and devices of a whole step on a GPU that is not present."""
    program = f"""
from pathlib import Path
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from mixout_fast import mix_linear, backends
from mixout_fast.backends import cuda
assert backends.describe("cuda")["cuda"] == "this PyTorch is built without CUDA"
assert cuda.load(Path("{LIBRARY}")) is None
cuda.LOAD_ERROR = None
assert backends.select(None, "cuda") is cuda
with FakeTensorMode():
    for mask in ("input", "element"):
        for rows in (16, 512):
            x, dtype = torch.empty(2, rows, 768, device="cuda", dtype=torch.bfloat16), torch.bfloat16
            weight, target = (torch.empty(96, 768, device="cuda") for _ in range(2))
            seed = torch.zeros((), dtype=torch.int64, device="cuda")
            y, index, columns = cuda.linear(x, weight, target, None, seed, 0.9, mask, mask == "input", False)
            arguments = (y, None if mask == "input" else x, index, columns, weight, target, seed, 0.9, mask, 1.0)
            dX, dW, db = cuda.gradients(*arguments, (True, True, True), False)
            results = [(y, (2, rows, 96), dtype), (dX, (2, rows, 768), dtype)]
            results += [(dW, (96, 768), torch.float32), (db, (96,), dtype)]
            results += [(cuda.mix(weight, target, seed, 0.9, mask, dtype), (96, 768), dtype)]
            results += [(cuda.mask_grad(weight, seed, 0.9, mask, 1.0, dtype), (96, 768), dtype)]
            if mask == "input":
                results += [(index, (144,), torch.int32), (columns, (2 * rows, 144), dtype)]
            for result, shape, dtype_wanted in results:
                assert (result.shape, result.dtype, result.device.type) == (shape, dtype_wanted, "cuda")
print("fakes hold")
"""
    result = run(program)
    assert "fakes hold" in result.stdout, result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU at hand runs the kernels")
def test_a_gpu_that_has_no_kernels_is_left_to_the_next_backend():
    """Such as a GPU that is too old, or newer than a library compiled without PTX. Here the driver is missing."""
    program = f"""
from pathlib import Path
import torch
from mixout_fast import backends
from mixout_fast.backends import cuda
if cuda.LOAD_ERROR:
    assert cuda.load(Path("{LIBRARY}")) is None
cuda.LOAD_ERROR = None
assert backends.select(None, "cuda") is cuda, "nobody has used CUDA yet"
torch.cuda.is_initialized = lambda: True
assert backends.select(None, "cuda") is not cuda
print(cuda.unavailable("cuda"))
"""
    result = run(program)
    assert "this GPU and driver do not run its CUDA library: CUDA driver version" in result.stdout, result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="of a CPU torch")
def test_it_does_not_take_cpu_tensors():
    program = f"""
import torch
torch.ops.load_library("{LIBRARY}")
torch.ops.mixout_fast_cuda.mask_grad(torch.zeros(3, 5), torch.tensor(0), 0.5, True, 1.0, torch.float32)
"""
    assert "Could not run 'mixout_fast_cuda::mask_grad' with arguments from the 'CPU' backend" in run(program).stderr
