"""Builds mixout_fast._C, a shared library of torch ops without Python symbols, so that one wheel serves every Python.

MIXOUT_FAST_BUILD=auto (default) builds it where it can and says why where it can't, cpu makes failure fatal, none
skips it. Without the library the package works on its reference backend.
"""

import os
import shutil
from glob import glob

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("MIXOUT_FAST_BUILD", "auto")
if BUILD not in ("auto", "none", "cpu"):
    raise SystemExit(f"MIXOUT_FAST_BUILD: {BUILD!r}; it takes auto, none or cpu")

OLDEST_TORCH = (2, 11)
# The stable ABI as of OLDEST_TORCH: a binary built against a newer torch must not use anything that came later.
TARGET_VERSION = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)


def give_up(reason):
    if BUILD == "cpu":
        raise SystemExit(f"mixout_fast: MIXOUT_FAST_BUILD=cpu, but the library cannot be built: {reason}")
    print(f"mixout_fast: installing without the compiled library: {reason}")
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
    return [library]


def builder():
    """torch's BuildExtension where there is torch, with a failure reported rather than fatal under auto."""
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

    return Build.with_options(no_python_abi_suffix=True)


class Wheel(bdist_wheel):
    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(ext_modules=extensions(), cmdclass={"build_ext": builder(), "bdist_wheel": Wheel})
