"""Every test runs on each available device, with each backend that serves it, on fresh inputs and NaN-filled memory."""

import importlib.util
import os
import random
import sys
import zlib

import pytest
import torch

from benchmarks.environment import cuda_is_lost
from mixout_fast import backends, reference, testing
from mixout_fast.backends import triton

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

INTERPRETED = triton.unavailable("cpu") is None
"""Whether Triton's kernels run in its interpreter (TRITON_INTERPRET=1): then only they are tested, on small shapes."""

if INTERPRETED:
    testing.SHAPES = ((19, 95, 33),)


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=random.SystemRandom().getrandbits(31), help="of the random inputs")
    parser.addoption(
        "--emulate-cuda", action="store_true", help="test the CUDA backend and no other, its kernels run on the CPU"
    )
    parser.addoption(
        "--guard-pages", choices=("end", "start"), help="memory beside a CPU tensor faults, past its end or its start"
    )


def pytest_configure(config):
    if config.getoption("--guard-pages"):
        import guard_pages

        guard_pages.install(config.getoption("--guard-pages"))
    if config.getoption("--emulate-cuda"):
        import cuda_emulation

        cuda_emulation.install()
    config.addinivalue_line("markers", "slow: compiles, so takes seconds; leave out with -m 'not slow'")


def pytest_report_header(config):
    return f"inputs: --seed={config.getoption('seed')}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("inputs", f"the same again: --seed={item.config.getoption('seed')}"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    """Stop where every further test would fail too. One process of several (pytest-xdist) ends; another replaces it."""
    if not cuda_is_lost():
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    pytest.exit("CUDA is unusable after the last test", 1)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        served = [(d, name) for d in DEVICES for name, reason in backends.describe(d).items() if reason is None]
        if metafunc.config.getoption("--emulate-cuda"):
            served = [("cpu", "cuda")]
        if INTERPRETED:
            served = [("cpu", "triton")]
        if "path" in metafunc.fixturenames:
            served = [(d, name, path) for d, name in served for path in paths_of(backends.BACKENDS[name])]
        names = ("device", "backend", "path")[: len(served[0])]
        metafunc.parametrize(names, served, ids=map("-".join, served), indirect=names[2:])
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture
def seed(request):
    return request.config.getoption("seed") ^ zlib.crc32(request.node.name.encode())


@pytest.fixture(autouse=True)
def fresh_state(seed, monkeypatch):
    """No backend chosen from outside, a seed of the test's own, and NaN in all memory that was not written.

    Under deterministic algorithms torch fills what `empty` returns, also where C++ operators call it.
    """
    monkeypatch.setattr(backends, "DEFAULT", None)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def paths_of(module):
    return ("one_pass", "mixed_first") if hasattr(module, "ONE_PASS_ROWS") else ("mixed_first",)


def take_one_pass_up_to(rows, module, monkeypatch):
    for table in ("ONE_PASS_ROWS", "MANY_OUTPUTS_ROWS"):
        if hasattr(module, table):
            monkeypatch.setattr(module, table, dict.fromkeys(getattr(module, table), (rows, rows)))


@pytest.fixture
def path(request, backend, monkeypatch):
    """Makes the backend take one pass, or mix first, whatever the number of rows."""
    module = backends.BACKENDS[backend]
    take_one_pass_up_to(sys.maxsize if request.param == "one_pass" else -1, module, monkeypatch)
    if hasattr(module, "THIN_ROWS"):
        monkeypatch.setattr(module, "THIN_ROWS", dict.fromkeys(module.THIN_ROWS, (sys.maxsize, sys.maxsize)))
    return request.param


@pytest.fixture
def mixes_first(monkeypatch):
    """Disables one-pass kernels, which sum in an order of their own: results are the library's, bit for bit."""
    for module in backends.BACKENDS.values():
        take_one_pass_up_to(-1, module, monkeypatch)


@pytest.fixture
def few_shapes(monkeypatch):
    """Few shapes for testing.checks, in tests of what the checks report."""
    monkeypatch.setattr(testing, "SHAPES", ((3, 17, 5), (255, 63, 33)))


@pytest.fixture
def broken(monkeypatch, few_shapes):
    """A second copy of the reference as the backend "broken", for a test to break."""
    specification = importlib.util.spec_from_file_location("broken", reference.__file__)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "broken", module)
    specification.loader.exec_module(module)
    monkeypatch.setitem(backends.BACKENDS, "broken", module)
    return module
