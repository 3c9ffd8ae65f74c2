import pytest

from benchmarks.contenders import Shape

DEFAULT_SHAPES = ("2048x768x768", "128x768x768")
SMOKE_SHAPE = "17x48x33"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--layer-shapes", nargs="+", metavar="ROWSxKxN", help=f"default {' '.join(DEFAULT_SHAPES)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        smoke = metafunc.config.getoption("benchmark_disable", False)
        shapes = metafunc.config.getoption("layer_shapes") or ((SMOKE_SHAPE,) if smoke else DEFAULT_SHAPES)
        metafunc.parametrize("shape", [Shape.parse(text) for text in shapes], ids=str)
