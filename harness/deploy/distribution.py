"""The Triton server of the installed wheel: the location of its files, and the environment in which it runs."""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from harness.errors import ServerError


@dataclass(frozen=True)
class Distribution:
    """Locations of the server in the installed wheel, and of what its Python stub needs to start."""

    server: Path
    backend: Path
    stub: Path
    libraries: tuple[Path, ...]


def find_distribution() -> Distribution:
    """Find the server of the nvidia-pytriton wheel. Raises ServerError with what is missing and how to fix it."""
    found = find_files()
    return replace(found, libraries=(*found.libraries, libpython_folder()))


def find_files() -> Distribution:
    """The part of ``find_distribution`` that concerns the wheel alone, without the system's libpython."""
    try:
        package = Path(str(metadata.distribution("nvidia-pytriton").locate_file("pytriton")))
    except metadata.PackageNotFoundError:
        raise ServerError("the package nvidia-pytriton is not installed: pip install nvidia-pytriton==0.7.0") from None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServerError(f"nvidia-pytriton has no stub for Python {version}: use Python 3.11 or 3.12")
    return Distribution(
        server=package / "tritonserver" / "bin" / "tritonserver",
        backend=package / "tritonserver" / "backends" / "python",
        stub=stub,
        libraries=(package.parent / "nvidia_pytriton.libs",),
    )


def libpython_folder() -> Path:
    """The folder of libpythonX.Y.so.1.0, which the stub links to."""
    name = libpython_name()
    for place in libpython_places():
        if (place / name).exists():
            return place
    raise ServerError(
        f"{name} was not found on this machine, and Triton's Python backend needs it: install your system's libpython "
        f"(Debian: apt install {name.partition('.so')[0]}), or name the folder that holds it in LD_LIBRARY_PATH"
    )


def libpython_name() -> str:
    return f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"


def libpython_places() -> list[Path]:
    """Folders searched for libpython, in this order: the environment or the calling process may provide one."""
    named = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    libdir = sysconfig.get_config_var("LIBDIR") or ""
    places = [libdir, f"{sys.base_prefix}/lib", f"{sys.prefix}/lib", *named, "/usr/lib/x86_64-linux-gnu", "/usr/lib"]
    return [Path(place) for place in dict.fromkeys(places) if place]


def server_environment(found: Distribution, python: Path | None = None) -> dict[str, str]:
    """The server's environment: the stub takes packages from the first python3 on PATH, libpython from LD_LIBRARY_PATH.

    ``python``: the folder of that python3; None = that of this interpreter.
    """
    environment = dict(os.environ)
    environment["PATH"] = f"{python or Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    libraries = [str(folder) for folder in found.libraries] + [environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    environment["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "1")
    environment["HF_HUB_OFFLINE"] = "1"
    return environment
