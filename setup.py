"""Builds mixout_fast._C, _CUDA and _autograd_VERSION, shared libraries of torch ops without Python symbols, so that one
wheel serves every Python. _C and _CUDA serve every torch from OLDEST_TORCH on, _autograd_VERSION torch VERSION alone.

MIXOUT_FAST_BUILD=auto (default) builds what it can (_CUDA only beside a CUDA torch) and says why where it can't. Under
cpu (all but _CUDA), cuda (all) and autograd (_autograd_VERSION alone) a failure is fatal; none builds nothing. Without
_C or _CUDA the package works on its other backends, without _autograd_VERSION on all of them, at a greater cost to the
host. Building _CUDA needs nvcc, but neither a GPU nor a CUDA torch. TORCH_CUDA_ARCH_LIST names the GPUs it serves.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

BUILD = os.environ.get("MIXOUT_FAST_BUILD", "auto")
if BUILD not in ("auto", "none", "cpu", "cuda", "autograd"):
    raise SystemExit(f"MIXOUT_FAST_BUILD: {BUILD!r}; it takes auto, none, cpu, cuda or autograd")

OLDEST_TORCH = (2, 11)
# The stable ABI as of OLDEST_TORCH: a binary built against a newer torch must not use anything that came later.
TARGET_VERSION = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)


# Ampere, Hopper and Blackwell for data centres. Their relatives run the same code, later GPUs the PTX.
CUDA_ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0a;10.0+PTX"
# Registers and memory of every kernel, as ptxas reports them; tests/test_cuda_build.py reads this file.
PTXAS_REPORT = Path("build/cuda/ptxas.txt")


def give_up(reason, library="library"):
    if BUILD not in ("auto", "none"):
        raise SystemExit(f"mixout_fast: MIXOUT_FAST_BUILD={BUILD}, but the {library} cannot be built: {reason}")
    print(f"mixout_fast: installing without the compiled {library}: {reason}")
    return []


def extensions():
    if BUILD == "none":
        return give_up("MIXOUT_FAST_BUILD=none")
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        return give_up(f"torch cannot be imported here ({error}); install it first, use --no-build-isolation")
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return give_up(f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return give_up(f"no C++ compiler: {compiler!r} is not on PATH")
    library = CppExtension(
        "mixout_fast._C",
        sorted(["csrc/ops.cpp", *glob("csrc/cpu/*.cpp")]),
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h") + glob("csrc/cpu/*.inl")),
        define_macros=[("TORCH_TARGET_VERSION", TARGET_VERSION)],
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden"],
        py_limited_api=True,
        optional=BUILD == "auto",
    )
    # Not on the stable ABI, which has no autograd: mixout_fast looks for the library of the torch it finds.
    autograd = CppExtension(
        "mixout_fast._autograd_" + re.sub(r"\W", "_", torch.__version__),
        ["csrc/autograd/mix_linear.cpp"],
        extra_compile_args=["-O2", "-g0", "-std=c++20", "-fvisibility=hidden"],
        py_limited_api=True,
        optional=BUILD == "auto",
    )
    return [autograd] if BUILD == "autograd" else [library, *cuda_extensions(torch.version.cuda), autograd]


def cuda_extensions(torch_cuda):
    if BUILD == "cpu":
        return []
    if BUILD == "auto" and torch_cuda is None:
        reason = "this torch is built without CUDA (MIXOUT_FAST_BUILD=cuda builds it all the same)"
        return give_up(reason, "CUDA library")
    if nvcc() is None:
        reason = "nvcc is neither on PATH nor in CUDA_HOME, nor installed from PyPI (as the README's Install tells)"
        return give_up(reason, "CUDA library")
    # kernels.cu is not among the sources: torch's build would then look for a CUDA torch.
    depends = sorted(["csrc/cuda/kernels.cu", *glob("csrc/*.h"), *glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh")])
    options = {"depends": depends, "py_limited_api": True, "optional": BUILD == "auto"}
    return [Extension("mixout_fast._CUDA", ["csrc/cuda/ops.cpp"], **options)]


def nvcc():
    """Finds nvcc on PATH, in CUDA_HOME, or where PyPI's package installs it, beside the libraries of a CUDA torch."""
    homes = [os.environ.get("CUDA_HOME"), *glob(os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu*"))]
    places = [os.environ.get("PATH", os.defpath), *(os.path.join(home, "bin") for home in homes if home)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def architecture_flags():
    """Returns nvcc's flags for CUDA_ARCHITECTURES, as in "8.0;9.0a+PTX". Later GPUs compile PTX when they load it."""
    flags = []
    for architecture in CUDA_ARCHITECTURES.replace(" ", ";").strip(";").split(";"):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", architecture)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {architecture!r}; it takes numbers such as 8.0, 9.0a or 10.0+PTX")
        number = match[1] + match[2]
        for code in (f"sm_{number}", *([f"compute_{number}"] if match[3] else [])):
            flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def build_cuda(library):
    """Builds _CUDA by one call of nvcc: torch's own build of CUDA extensions needs a CUDA torch.

    The CUDA runtime is linked statically, so that the library needs none at run time. Symbols are stripped: they name
    nvcc's temporary files, so that no two builds would be the same.
    """
    from torch.utils import cpp_extension

    flags = ["-shared", "-Xlinker=-s", "-cudart=static", "-O3", "-std=c++20", "-fmad=false", "--threads=0"]
    flags += ["-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"]
    flags += [f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    includes = [f"-isystem={path}" for path in cpp_extension.include_paths()]
    # nvcc from PyPI does not find its own libraries, which are in lib and not lib64.
    compiler = nvcc()
    paths = [Path(compiler).resolve().parents[1] / "lib", *cpp_extension.library_paths()]
    libraries = [*(f"-L{path}" for path in paths), "-ltorch_cpu", "-ldl"]
    sources = ["csrc/cuda/ops.cpp", "csrc/cuda/kernels.cu"]
    command = [compiler, *flags, *architecture_flags(), *includes, *sources, "-o", library, *libraries]
    Path(library).parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise CompileError(f"nvcc failed:\n{result.stdout}")
    PTXAS_REPORT.parent.mkdir(parents=True, exist_ok=True)
    PTXAS_REPORT.write_text(result.stdout)


def builder():
    """Returns torch's BuildExtension where there is torch, which under auto reports a failure instead of raising it."""
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        return build_ext

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                give_up(f"{error}; what the compiler said stands above")

        def build_extension(self, extension):
            try:
                if extension.name == "mixout_fast._CUDA":
                    self.build_cuda_extension(extension)
                else:
                    super().build_extension(extension)
            except Exception as error:
                give_up(f"{error}; what the compiler said stands above", f"library {extension.name}")

        def build_cuda_extension(self, extension):
            library = self.get_ext_fullpath(extension.name)
            if self.force or newer_group([*extension.sources, *extension.depends], library, "newer"):
                build_cuda(library)

    return Build.with_options(no_python_abi_suffix=True)


class Wheel(bdist_wheel):
    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(ext_modules=extensions(), cmdclass={"build_ext": builder(), "bdist_wheel": Wheel})
