"""Building the libraries that only tests need."""

import subprocess
from pathlib import Path

from torch.utils import cpp_extension


def build(library: Path, *arguments: str | Path) -> None:
    """Compile and link a library against torch; arguments are further flags, sources and libraries, in that order."""
    library.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    options = ["-shared", "-fPIC", "-std=c++20", "-O2"]
    subprocess.run(["c++", *options, *includes, *paths, *arguments, "-o", library], check=True)
