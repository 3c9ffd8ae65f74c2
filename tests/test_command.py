"""python -m mixout_fast."""

import subprocess
import sys

import pytest
import torch

from mixout_fast import __main__, __version__, backends, testing
from mixout_fast.functional import MASKS


def test_without_a_command_it_prints_version_and_backends():
    result = subprocess.run([sys.executable, "-m", "mixout_fast"], capture_output=True, text=True, check=True)
    assert f"mixout_fast {__version__}" in result.stdout
    for name in backends.BACKENDS:
        assert name in result.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="the CUDA backend speaks to torch's compiler")
def test_import_leaves_torchs_compiler_alone():
    """Importing the compiler takes 1.3 s, six times as long as importing the package."""
    script = "import sys, mixout_fast; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_each_backend_is_said_to_serve_or_why_not(monkeypatch, capsys):
    class Unable:
        @staticmethod
        def unavailable(device_type):
            return f"no compiler for {device_type}"

    monkeypatch.setattr(backends, "BACKENDS", {"unable": Unable, "reference": backends.BACKENDS["reference"]})
    assert __main__.main([]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == ["cpu:", "unable cannot serve: no compiler for cpu", "reference serves this device"]


def test_a_bad_environment_variable_is_named(monkeypatch, capsys):
    monkeypatch.setattr(backends, "DEFAULT", "tpu")
    assert __main__.main([]) == 1
    assert "\n  MIXOUT_FAST_BACKEND 'tpu' cannot serve" in capsys.readouterr().out


def test_check_passes(few_shapes, device, backend, capsys):
    assert __main__.main(["check", "--device", device, "--backend", backend]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"backend {backend} on {device}" in lines[0]
    assert all(line.startswith("ok    ") for line in lines[1:-1])
    assert len(lines[1:-1]) == len(list(testing.checks(device)))
    assert lines[-1] == "all checks hold"


@pytest.mark.parametrize("kernel", ("mix", "mask_grad", "gather", "linear", "grad_input", "grad_weight", "gradients"))
def test_check_fails_with_the_line_that_says_what_is_wrong(kernel, broken, monkeypatch, capsys):
    """A kernel that gets the last entry of its result wrong by one."""
    correct = getattr(broken, kernel)

    def wrong(*arguments):
        results = correct(*arguments)
        *_, last = [t for t in (results if isinstance(results, tuple) else (results,)) if t is not None]
        last.view(-1)[-1:].add_(1)
        return results

    monkeypatch.setattr(broken, kernel, wrong)
    assert __main__.main(["check", "--backend", "broken"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert any(f"bits, float32, {mask} mask" in line and "weight (" in line for line in failed for mask in MASKS)


def test_check_fails_when_a_kernel_raises(few_shapes, monkeypatch, capsys):
    monkeypatch.setattr(torch.autograd, "gradcheck", lambda *_: 1 / 0)
    assert __main__.main(["check"]) == 1
    assert "FAIL  gradcheck, float64, input mask: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", (("--device", "nowhere"), ("--device", "meta"), ("--device", "cuda:99"), ("--backend", "tpu"))
)
def test_check_of_what_is_not_there(arguments, capsys):
    assert __main__.main(["check", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err
    assert not output.out


def test_help_names_what_is_checked(capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["check", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in ("--device", "--backend", "--seed", "gradcheck", "Exit status"):
        assert word in text
