"""`pytest --guard-pages=end` (or start): what reads or writes past a CPU tensor's end (or start) ends the run at once.

Whose code it is does not matter: the CPU's kernels, CUDA's under --emulate-cuda, Triton's in its interpreter.
"""

import ctypes
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "build" / "guard_pages.so"


def install(edge: str) -> None:
    """Have all CPU tensors that are made from here on allocated so; end the run where that cannot be built."""
    LIBRARY.parent.mkdir(exist_ok=True)
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    command = ["c++", "-shared", "-fPIC", "-std=c++20", "-O2", *includes, Path(__file__).with_suffix(".cpp")]
    try:
        subprocess.run([*command, "-o", LIBRARY, *paths, "-lc10"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.exit(f"--guard-pages: {error}", returncode=1)
    ctypes.CDLL(LIBRARY).guard(ctypes.c_bool(edge == "end"))
