"""python -m mixout_fast: which backend serves which device; python -m mixout_fast check: does it compute mixout."""

import argparse
import sys
import time

import torch

from mixout_fast import __version__, autograd, backends, testing
from mixout_fast.backends import operators

DESCRIPTION = """Without a command: the version, and for each device which backend serves it and why the others don't.
The environment variable MIXOUT_FAST_BACKEND names a backend for every call that doesn't."""
CHECK_DESCRIPTION = """Check a backend on a device: gradcheck in fp64; agreement with the reference bit for bit, on
exactly representable inputs, and within twice the library's own error against fp64, for every dtype and mask; mask
statistics. Prints a line per check. Exit status: 0 when all hold, 1 when one fails, 2 when none could run."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mixout_fast", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command")
    check = commands.add_parser("check", help="check a backend on a device", description=CHECK_DESCRIPTION)
    check.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    check.add_argument("--backend", help="cpu, cuda, triton or reference (default: the one that serves the device)")
    check.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "check":
        return run_checks(options.device, options.backend, options.seed)
    return print_backends()


def print_backends() -> int:
    print(f"mixout_fast {__version__}, torch {torch.__version__}")
    status = 0
    if torch.cuda.is_available():
        torch.cuda.init()  # only then do backends tell whether they run on this GPU
    for device_type in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(f"{device_type}:")
        try:
            chosen = backends.select(None, device_type)
        except ValueError as error:
            print(f"  {error}")
            chosen, status = None, 1
        for name, reason in backends.describe(device_type).items():
            served = "serves this device" if backends.BACKENDS[name] is chosen else "available"
            print(f"  {name:<10} {served if reason is None else f'cannot serve: {reason}'}")
        if autograd.is_in_cpp(chosen):
            print("  autograd in C++")
        elif hasattr(chosen, "checked_mix_linear"):
            print(f"  autograd in Python, which takes the host longer: {operators.AUTOGRAD_ERROR}")
    return status


def run_checks(device: str, backend: str | None, seed: int) -> int:
    try:
        device = torch.device(device)
        torch.zeros((), device=device).item()  # the device exists and computes
        module = backends.select(backend, device.type)
    except (RuntimeError, ValueError, AssertionError) as error:
        print(error, file=sys.stderr)
        return 2
    name = next(name for name, candidate in backends.BACKENDS.items() if candidate is module)
    print(f"mixout_fast {__version__}, torch {torch.__version__}, backend {name} on {device}, seed {seed}")
    failures = 0
    for check, function in testing.checks(device, name, seed):
        start = time.perf_counter()
        try:
            function()
        except Exception as error:
            failures += 1
            print(f"FAIL  {check}: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"ok    {check} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{failures} failed" if failures else "all checks hold")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
