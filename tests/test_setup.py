"""What setup.py decides to build, and what it says if it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def setup(tmp_path, torch_cuda="None", **environment):
    """Runs `setup.py --version` with a C++ compiler but no nvcc on PATH, beside a torch of that CUDA version.

    tmp_path stands in for the folder that pip installs packages to.
    """
    (tmp_path / "c++").touch(mode=0o755)
    program = f"""
import runpy, sys, sysconfig, torch
torch.version.cuda = {torch_cuda}
sysconfig.get_path = lambda name: {str(tmp_path)!r}
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""
    environment = {"PATH": str(tmp_path), "CXX": "c++"} | environment
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "MIXOUT_FAST_BUILD")}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=kept | environment
    )


@pytest.mark.parametrize(
    ("torch_cuda", "reason"),
    (("None", "this torch is built without CUDA"), ("'13.0'", "nvcc is neither on PATH nor in CUDA_HOME")),
)
def test_auto_says_why_there_is_no_cuda_library_and_goes_on(torch_cuda, reason, tmp_path):
    result = setup(tmp_path, torch_cuda)
    assert result.returncode == 0, result.stderr
    assert f"installing without the compiled CUDA library: {reason}" in result.stdout


def test_cuda_fails_without_nvcc(tmp_path):
    result = setup(tmp_path, MIXOUT_FAST_BUILD="cuda")
    assert result.returncode == 1
    assert "the CUDA library cannot be built: nvcc is neither on PATH nor in CUDA_HOME" in result.stderr


@pytest.mark.parametrize("place", ("toolkit/bin", "nvidia/cu13/bin"))
def test_nvcc_is_found_in_cuda_home_and_from_pypi(place, tmp_path):
    nvcc = tmp_path / place / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    result = setup(tmp_path, MIXOUT_FAST_BUILD="cuda", CUDA_HOME=str(tmp_path / "toolkit"))
    assert result.returncode == 0, result.stderr


def test_cpu_says_nothing_of_cuda(tmp_path):
    result = setup(tmp_path, "'13.0'", MIXOUT_FAST_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    assert "CUDA" not in result.stdout


def test_auto_goes_on_behind_a_library_that_does_not_build(tmp_path):
    """The other libraries are built all the same, and the missing one is named."""
    program = """
import runpy, sys
from torch.utils.cpp_extension import BuildExtension
def build_extension(self, extension):
    print("builds", extension.name)
    if extension.name == "mixout_fast._C":
        raise RuntimeError("broken")
BuildExtension.build_extension = build_extension
sys.argv = ["setup.py", "build_ext", "--build-lib", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""
    environment = os.environ | {"MIXOUT_FAST_BUILD": "auto"}
    arguments = [sys.executable, "-c", program, str(tmp_path / "build")]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert "without the compiled library mixout_fast._C: broken" in result.stdout
    assert "builds mixout_fast._autograd_" in result.stdout


def test_an_unknown_choice_is_named(tmp_path):
    assert "it takes auto, none, cpu, cuda or autograd" in setup(tmp_path, MIXOUT_FAST_BUILD="gpu").stderr
