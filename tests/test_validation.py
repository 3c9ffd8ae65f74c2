"""Bad input is refused before anything runs, with the argument's name, what it got and what it takes."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch

from mixout_fast import MixLinear, backends, mix_linear, mixout

X, W, B = torch.randn(3, 17), torch.randn(5, 17), torch.randn(5)


def refused(error, *fragments):
    """Expects an error whose message begins with the first fragment and holds them all."""
    begins, *held = map(re.escape, fragments)
    return pytest.raises(error, match=f"^{begins}" + "".join(f"(?=.*{fragment})" for fragment in held))


# the options passed, the error, what its message holds
BAD_OPTIONS = (
    ({"p": -0.1}, ValueError, ("p: -0.1", "[0, 1]")),
    ({"p": 1.5}, ValueError, ("p: 1.5", "[0, 1]")),
    ({"p": math.nan}, ValueError, ("p: nan", "[0, 1]")),
    ({"p": math.inf}, ValueError, ("p: inf", "[0, 1]")),
    ({"p": "0.5"}, TypeError, ("p: '0.5'", "str", "[0, 1]")),
    ({"p": True}, TypeError, ("p: True", "bool", "[0, 1]")),
    ({"p": None}, TypeError, ("p: None", "[0, 1]")),
    ({"mask": "row"}, ValueError, ("mask: 'row'", "input", "element")),
    ({"grad_scale": "none"}, ValueError, ("grad_scale: 'none'", "exact", "paper")),
    ({"distribution": "uniform"}, ValueError, ("distribution: 'uniform'", "bernoulli", "gaussian")),
    ({"distribution": "gaussian", "p": 1.0}, ValueError, ("p: 1", "gaussian")),
    ({"distribution": "gaussian", "grad_scale": "paper"}, ValueError, ("grad_scale: 'paper'", "gaussian")),
    ({"distribution": "gaussian", "backend": "cpu"}, ValueError, ("backend: 'cpu'", "gaussian", "reference")),
)
BAD_CALL_OPTIONS = (
    ({"backend": "tpu"}, ValueError, ("backend 'tpu'", "'cpu'", "these can:", "reference")),
    ({"seed": torch.tensor(1.0)}, ValueError, ("seed: torch.float32", "0-d int64")),
    ({"seed": torch.tensor([1, 2])}, ValueError, ("seed: torch.int64 of shape (2,)", "0-d int64")),
    ({"seed": torch.tensor(1, device="meta")}, ValueError, ("seed: ", "meta", "cpu")),
    ({"seed": 0.5}, TypeError, ("seed: 0.5", "float", "int")),
    ({"seed": 2**64}, ValueError, ("seed: 18446744073709551616", "64")),
)


@pytest.mark.parametrize(("options", "error", "fragments"), BAD_OPTIONS + BAD_CALL_OPTIONS)
def test_bad_options_of_a_call(options, error, fragments):
    options = {"p": 0.5} | options
    with refused(error, *fragments):
        mix_linear(X, W, W, **options)
    with refused(error, *fragments):
        mixout(W, W, training=True, **options)


BAD_MODULE_OPTIONS = (({"backend": "tpu"}, ValueError, ("backend: 'tpu'", "cpu", "reference")),)


@pytest.mark.parametrize(("options", "error", "fragments"), BAD_OPTIONS + BAD_MODULE_OPTIONS)
def test_bad_options_of_the_module(options, error, fragments):
    with refused(error, *fragments):
        MixLinear(17, 5, **options)
    with refused(error, *fragments):
        MixLinear.from_linear(torch.nn.Linear(17, 5), **{"p": 0.5} | options)


BAD_WEIGHTS = (
    ((W.int(),), TypeError, ("dtype torch.int32", "torch.float32", "torch.bfloat16")),
    ((W.bool(),), TypeError, ("dtype torch.bool", "torch.float32")),
    ((W.cfloat(),), TypeError, ("dtype torch.complex64", "torch.float32")),
    (([[1.0]],), TypeError, ("list", "tensor")),
    ((W, W.t()), ValueError, ("shape (17, 5)", "(5, 17)")),
    ((W, W[0]), ValueError, ("shape (17,)", "(5, 17)")),
    ((W, W.double()), TypeError, ("torch.float64", "torch.float32")),
    ((W, W.to("meta")), ValueError, ("meta", "cpu")),
    ((W, W.clone().requires_grad_()), ValueError, ("requires grad", "detach")),
    ((W, 0.0), TypeError, ("float", "tensor or None")),
)


@pytest.mark.parametrize(("arguments", "error", "fragments"), BAD_WEIGHTS)
@pytest.mark.parametrize("training", (True, False))
def test_bad_weight_or_target(arguments, error, fragments, training):
    """Also in eval mode: the error should not appear only when training starts."""
    with refused(error, "target: " if len(arguments) == 2 else "weight: ", *fragments):
        mix_linear(X, *arguments, p=0.5, training=training)
    with refused(error, "target: " if len(arguments) == 2 else "input: ", *fragments):
        mixout(*arguments, p=0.5, training=training)


# the arguments input, weight, target, bias
BAD_LINEARS = (
    ((X[:, :16], W, W, B), ValueError, ("input: ", "shape (3, 16)", "(5, 17)")),
    ((X[0, 0], W, W, B), ValueError, ("input: ", "shape ()", "(5, 17)")),
    ((X, W[0], None, B), ValueError, ("weight: ", "shape (17,)", "(out_features, in_features)")),
    ((X, W[None], None, B), ValueError, ("weight: ", "shape (1, 5, 17)", "(out_features, in_features)")),
    ((X, W, W, B[:4]), ValueError, ("bias: ", "shape (4,)", "(5, 17)")),
    ((X, W, W, B[:, None]), ValueError, ("bias: ", "shape (5, 1)", "(5, 17)")),
    ((X.double(), W, W, B), TypeError, ("input: ", "torch.float64", "torch.float32")),
    ((X.int(), W, W, B), TypeError, ("input: ", "torch.int32", "torch.float32")),
    ((X, W, W, B.half()), TypeError, ("bias: ", "torch.float16", "torch.float32")),
    ((X.to("meta"), W, W, B), ValueError, ("input: ", "meta", "cpu")),
    ((X, W, W, B.to("meta")), ValueError, ("bias: ", "meta", "cpu")),
    (([1.0] * 17, W, W, B), TypeError, ("input: ", "list", "tensor")),
    ((X, W, W, 0.0), TypeError, ("bias: ", "float", "tensor or None")),
)


@pytest.mark.parametrize(("arguments", "error", "fragments"), BAD_LINEARS)
@pytest.mark.parametrize("training", (True, False))
def test_bad_linear(arguments, error, fragments, training):
    with refused(error, *fragments):
        mix_linear(*arguments, 0.5, training)


@pytest.mark.parametrize(
    ("arguments", "error", "fragments"),
    (
        ((X.int(), W, W, B), TypeError, ("input: ", "torch.int32")),
        ((X.to("meta"), W, W, B), ValueError, ("input: ", "meta", "cpu")),
        ((X, W, W, B.int()), TypeError, ("bias: ", "torch.int32")),
    ),
)
def test_bad_linear_under_autocast(arguments, error, fragments):
    """Autocast accepts operands of several dtypes, but no integers, and only one device."""
    with torch.autocast("cpu", torch.bfloat16), refused(error, *fragments):
        mix_linear(*arguments, 0.5)


def test_ragged_input_is_for_eval_or_the_mixed_weight():
    ragged = torch.nested.nested_tensor([X, X[:1]], layout=torch.jagged)
    want = torch.nn.functional.linear(ragged, W, B).values()
    assert torch.equal(mix_linear(ragged, W, W, B, 0.5, training=False).values(), want)
    assert torch.equal(torch.nn.functional.linear(ragged, mixout(W, W, 0.5, True), B).values(), want)
    with refused(TypeError, "input: layout torch.jagged", "dense", "F.linear(input, mixout(weight"):
        mix_linear(ragged, W, W, B, 0.5)
    with refused(TypeError, "input: layout torch.sparse_coo", "dense"):
        mix_linear(X.to_sparse(), W, W, B, 0.5)


def test_bad_mixout_input():
    with refused(ValueError, "input: ", "0-d", "vector", "matrix"):
        mixout(torch.tensor(1.0), p=0.5, training=True)
    with refused(ValueError, "inplace: ", "requires grad", "no_grad"):
        mixout(W.clone().requires_grad_(), p=0.5, training=True, inplace=True)


def test_bad_target_of_the_module():
    for make in (lambda u: MixLinear(17, 5, target=u), lambda u: MixLinear.from_linear(torch.nn.Linear(17, 5), 0.5, u)):
        with refused(ValueError, "target: ", "(17, 5)", "(5, 17)"):
            make(W.t())
        with refused(TypeError, "target: ", "torch.int32"):
            make(W.int())
        with refused(TypeError, "target: ", "float", "tensor or None"):
            make(0.0)


def test_from_linear_takes_an_nn_linear():
    for module in (torch.nn.Conv2d(17, 5, 1), W, None):
        with refused(TypeError, f"linear: {type(module).__name__}", "nn.Linear"):
            MixLinear.from_linear(module, 0.5)


def test_nothing_runs_before_the_refusal():
    """No seed is drawn, so a caught error does not change the masks that follow."""
    state = torch.get_rng_state()
    for arguments, error, _ in BAD_LINEARS:
        with pytest.raises(error):
            mix_linear(*arguments, 0.5)
    with pytest.raises(ValueError):
        mix_linear(X, W, W, p=0.5, backend="tpu")
    assert torch.equal(torch.get_rng_state(), state)


class Unable:
    """A backend that serves nothing."""

    @staticmethod
    def unavailable(device_type):
        return "its library was not built"


def test_a_named_backend_that_cannot_serve_says_why_and_which_can(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "unable", Unable)
    serving = ", ".join(name for name, reason in backends.describe("cpu").items() if reason is None)
    with refused(ValueError, "backend 'unable'", "'cpu'", "its library was not built", f"these can: {serving}"):
        mix_linear(X, W, p=0.5, backend="unable")


def test_an_automatic_choice_passes_over_backends_that_cannot_serve(monkeypatch):
    order = {"unable": Unable, **backends.BACKENDS}
    monkeypatch.setattr(backends, "BACKENDS", order)
    assert backends.describe("cpu")["unable"] == "its library was not built"
    chosen = backends.select(None, "cpu")
    assert chosen is next(order[name] for name, reason in backends.describe("cpu").items() if reason is None)


@pytest.mark.parametrize(("value", "default"), (("reference", "'reference'"), ("", "None")))
def test_the_environment_gives_the_default(value, default):
    command = [sys.executable, "-c", "from mixout_fast import backends; print(repr(backends.DEFAULT))"]
    environment = {**os.environ, "MIXOUT_FAST_BACKEND": value}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == default


def test_a_default_serves_calls_that_name_no_backend(device, backend, monkeypatch):
    monkeypatch.setattr(backends, "DEFAULT", backend)
    assert backends.select(None, device) is backends.BACKENDS[backend]
    assert backends.select("reference", device) is backends.BACKENDS["reference"]
    monkeypatch.setattr(backends, "DEFAULT", "tpu")
    with refused(ValueError, "MIXOUT_FAST_BACKEND 'tpu'", "none of this name", "these can:"):
        mix_linear(X.to(device), W.to(device), p=0.5)
    mix_linear(X.to(device), W.to(device), p=0.5, backend=backend)
