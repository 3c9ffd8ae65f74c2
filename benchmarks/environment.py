"""What figures hold for: the machine, the versions, and exactly which code ran."""

import datetime
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import mixout_fast
from mixout_fast.autograd import is_in_cpp
from mixout_fast.backends import select

ROOT = Path(__file__).parent.parent


def environment(device_type: str, sources: tuple[str, ...]) -> dict[str, str | int]:
    """Everything that must be the same for two figures to belong in one table.

    `sources` are the modules of benchmarks that, besides the package, affect a figure.
    """
    facts = {
        "device": device_name(device_type),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mixout_fast": mixout_fast.__version__,
        "backend": backend_name(device_type),
        "autograd": "C++" if is_in_cpp(select(None, device_type)) else "Python",
        "variables": " ".join(variables()),
        "code": code_digest(sources),
    }
    if device_type == "cuda":
        facts |= {
            "host": cpu_model(),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "triton": package_version("triton"),
        }
    return facts


def occasion() -> dict[str, str]:
    """When, by which command and from which commit a run of benchmarks.run was made."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*variables(), "python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "commit": commit(),
    }


def cuda_is_lost() -> bool:
    """Whether an error, such as an access out of bounds, has left all further calls of CUDA in this process to fail."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def variables() -> list[str]:
    """NAME=value of the variables that choose instruction sets, libraries' algorithms, threads or a backend."""
    prefixes = ("ATEN_CPU_", "ONEDNN_", "DNNL_", "MKL_", "OMP_", "KMP_", "GOMP_", "MIXOUT_FAST_BACKEND")
    return sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(prefixes))


def device_name(device_type: str) -> str:
    return torch.cuda.get_device_name() if device_type == "cuda" else cpu_model()


def this_machine() -> set[str]:
    """The names of this machine's devices."""
    return {device_name(device_type) for device_type in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]}


def cpu_model() -> str:
    """The processor's name, and on x86 its family and model: in a virtual machine the name may be just "AMD EPYC"."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name}, family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else name


def machine_slug(device_type: str) -> str:
    """The machine's name as part of a file's name: intel-xeon-processor-2threads, nvidia-h100-80gb-hbm3."""
    words = re.sub(r"\((r|tm)\)", "", device_name(device_type).lower())
    slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    return slug if device_type == "cuda" else f"{slug}-{torch.get_num_threads()}threads"


def backend_name(device_type: str) -> str:
    """The backend of calls that do not name one."""
    return select(None, device_type).__name__.rpartition(".")[2]


def driver_version() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or "unknown"


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """The commit, followed by a + if the package, csrc or the benchmarks differ from it."""
    name = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", "mixout_fast", "csrc", "benchmarks/*.py")
    return f"{name}{'+' if changed else ''}" if name else "unknown"


def code_digest(sources: tuple[str, ...]) -> str:
    files = ("mixout_fast/**/*.py", "mixout_fast/*.so", *(f"benchmarks/{name}.py" for name in sources))
    digest = hashlib.sha256()
    for path in sorted(path for pattern in files for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str:
    """What a command prints; an empty string if the command is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
