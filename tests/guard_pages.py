"""`pytest --guard-pages=end` (or start): an access past a CPU tensor's end (or before its start) ends the run at once.

This holds for all code: the CPU's kernels, CUDA's under --emulate-cuda, Triton's in its interpreter.
"""

import ctypes
import subprocess
from pathlib import Path

import pytest
from compilation import build

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "build" / "guard_pages.so"


def install(edge: str) -> None:
    """Allocate all CPU tensors from here on beside guard pages; end the run if the allocator cannot be built."""
    try:
        build(LIBRARY, Path(__file__).with_suffix(".cpp"), "-lc10")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.exit(f"--guard-pages: {error}", returncode=1)
    ctypes.CDLL(LIBRARY).guard(ctypes.c_bool(edge == "end"))
