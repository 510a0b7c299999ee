"""Builds and loads ``guard.cpp``; it must be loaded before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

_SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """Return a C++ compiler, or None if there is none."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def load() -> None:
    """Load the guard into this process; build it first unless it was built for this torch.

    Raises:
        RuntimeError: torch is already imported.
        FileNotFoundError: there is no C++ compiler.
        subprocess.CalledProcessError: it cannot be built.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the guard must be loaded before torch is imported")
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch = Path(found.origin).parent
    key = hashlib.sha256(_SOURCE.read_bytes() + version("torch").encode() + str(torch).encode())
    folder = Path(tempfile.gettempdir()) / f"gralora-rehearsal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    library = folder / f"guard-{key.hexdigest()[:16]}.so"
    if not library.exists():
        _build(library, torch)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _build(library: Path, torch: Path) -> None:
    command = compiler()
    if command is None:
        raise FileNotFoundError("no C++ compiler: install g++, or name one in CXX")
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        made = Path(place) / library.name
        options = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch}/include"]
        libraries = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
        subprocess.run([command, *options, str(_SOURCE), "-o", str(made), *libraries], check=True)
        made.replace(library)
