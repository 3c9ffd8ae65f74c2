"""The CUDA backend with its kernels run on the CPU by csrc/tests/emulation.h: `pytest --emulate-cuda`.

The same kernel source and the same operators, on CPU tensors. It cannot show what nvcc makes of the source, how
tensor cores round their sums, or time.
"""

import ctypes
import shutil
from pathlib import Path

import pytest
from compilation import build

from mixout_fast import backends
from mixout_fast.backends import cuda

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "build" / "emulation" / "_CUDA.so"
SOURCES = [ROOT / "csrc" / "cuda" / name for name in ("ops.cpp", "kernels.cu")]
FLAGS = ["-ffp-contract=off", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
# A GPU faults on a vector access at an address that is not a multiple of its size; these make the emulation trap.
FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
MACROS = ["-DMIXOUT_EMULATION", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def variable(name: str) -> ctypes.c_int64:
    """A variable of csrc/tests/emulation.h; its `value` reads and sets it."""
    return ctypes.c_int64.in_dll(ctypes.CDLL(LIBRARY), name)


def install() -> None:
    """Make the CUDA backend serve CPU tensors, before all others; end the run if that is pointless or impossible."""
    if cuda.LOAD_ERROR is None:
        pytest.exit("--emulate-cuda: the CUDA library itself is loaded here and tested in its stead", returncode=0)
    if shutil.which("c++") is None:
        pytest.exit("--emulate-cuda: there is no C++ compiler to build the emulation", returncode=0)
    build(LIBRARY, *FLAGS, *MACROS, "-xc++", *SOURCES, "-ltorch_cpu", "-ldl")
    error = cuda.load(LIBRARY)
    if error:
        pytest.exit(f"--emulate-cuda: {error}", returncode=1)
    cuda.unavailable = lambda device_type: None if device_type == "cpu" else "emulated: it serves CPU tensors only"
    backends.BACKENDS = {"cuda": cuda} | backends.BACKENDS
