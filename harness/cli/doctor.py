"""What this machine can and cannot do for the harness, and how to fix it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from harness import wire
from harness.client.replicas import Replica
from harness.client.target import Target
from harness.deploy import stub
from harness.deploy.config import Deployment
from harness.deploy.control import has_open_control
from harness.deploy.distribution import find_files, libpython_folder, libpython_name
from harness.deploy.flags import shared_memory_needed
from harness.deploy.ports import free_ports
from harness.deploy.running import local_urls
from harness.deploy.stage_identity import stages_of
from harness.errors import ServerError
from harness.host import nvml, packages
from harness.host.packages import Found
from harness.host.places import CODE, REPOSITORY

_MEMORY_NEEDED = 4 << 30
_DISK_NEEDED = 1 << 30
_GPU_NEEDED = 12 << 30  # weights, convolution state and a KV cache of preset 1.5b
_UNREADABLE = "unknown"


@dataclass(frozen=True)
class Check:
    """One finding. ``fine`` is None for what is useful but not required."""

    what: str
    fine: bool | None
    found: str
    fix: str = ""


@dataclass(frozen=True)
class GpuFacts:
    """One GPU as its driver reports it; memory in bytes."""

    name: str
    driver: str
    total: int
    free: int


@dataclass(frozen=True)
class HostResources:
    """What a machine has; sizes in bytes. ``gpu_device``: an NVIDIA kernel driver is loaded, which may not answer."""

    cores: int
    memory_free: int
    disk_free: int
    shared_free: int
    gpu_device: bool
    gpus: tuple[GpuFacts, ...]
    torch_cuda: str  # CUDA version of the torch that stages import; "" = a CPU build
    compiler: str  # path of the C compiler; "" = none
    python_header: Path  # Python.h of the Python that runs the stages, whether it exists or not


def examine(root: Path, target: Target | None = None) -> list[Check]:
    """Run every check, in the order in which a first run would need them; ``target``: servers to be reached."""
    servers = _remote(target) if target else [_server(root)]
    try:
        search = stub.search_path()
    except ServerError as error:
        return [Check("stages' Python", False, "does not start", str(error)), *servers]
    host = this_host(root, search)
    return [*software(search), *_triton(), *machine(host), _ports(), *gpus(host), *servers]


def this_host(root: Path, search: tuple[str, ...]) -> HostResources:
    return HostResources(
        cores=len(os.sched_getaffinity(0)),
        memory_free=psutil.virtual_memory().available,
        disk_free=shutil.disk_usage(root).free,
        shared_free=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        gpu_device=os.path.exists("/dev/nvidiactl"),
        gpus=_gpus_found(),
        torch_cuda=_cuda_of(packages.find("torch", search)),
        compiler=_compiler(),
        python_header=_python_header(),
    )


def software(search: tuple[str, ...], version: tuple[int, int] = sys.version_info[:2]) -> Iterator[Check]:
    """Python, and the packages that the stages would import from this search path."""
    fine = (3, 11) <= version <= (3, 12)
    yield Check("Python", fine, ".".join(map(str, version)), "" if fine else "use Python 3.11 or 3.12")
    yield Check("stages' Python", True, f"the same; harness from {CODE}")
    asked = {each.name: each for each in packages.required()}
    for name in stub.NEEDS:
        yield _package(f"stages' {name}", packages.find(name, search), stub.problem(name, search))
    others = [each for name, each in asked.items() if name not in stub.NEEDS]
    wrong = [(each, packages.find(each.name, search)) for each in others]
    wrong = [(each, found, packages.shortfall(each, found)) for each, found in wrong]
    wrong = [(each, found, short) for each, found, short in wrong if short]
    for each, found, short in wrong:
        yield _package(each.name, found, f"{short}. Fix: {sys.executable} -m pip install '{each}'")
    if asked and not wrong:
        yield Check("other packages", True, f"{len(others)}, each in a version that the harness takes")


def _package(what: str, found: Found | None, problem: str) -> Check:
    return Check(what, not problem, found.version if found else "none", problem)


def _triton() -> Iterator[Check]:
    try:
        yield Check("Triton", True, str(find_files().server))
    except ServerError as error:
        yield Check("Triton", False, "not usable", str(error))
    try:
        yield Check(libpython_name(), True, str(libpython_folder()))
    except ServerError as error:
        yield Check(libpython_name(), False, "none", str(error))
    try:
        Deployment().configs()
        yield Check("model repository", True, str(REPOSITORY))
    except ServerError as error:
        yield Check("model repository", False, str(REPOSITORY), str(error))


def machine(host: HostResources) -> Iterator[Check]:
    """Cores, memory, shared memory and disk."""
    enough = host.cores >= 2 or None
    yield Check(
        "cores",
        enough,
        str(host.cores),
        "" if enough else "with one core the load generator disturbs the server: use two",
    )
    yield _room("memory", host.memory_free, _MEMORY_NEEDED, "close other programs")
    needed = shared_memory_needed(Deployment().configs(), max(1, len(host.gpus)))
    yield _room("shared memory", host.shared_free, needed, "start the container with --shm-size=1g")
    yield _room("disk", host.disk_free, _DISK_NEEDED, "free some space, or give --results on another disk")


def _room(what: str, free: int, needed: int, fix: str) -> Check:
    fine = free >= needed
    return Check(what, fine, f"{_size(free)} free, {_size(needed)} needed", "" if fine else fix)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _ports() -> Check:
    try:
        free_ports(3)
        return Check("loopback ports", True, "free")
    except OSError as error:
        return Check("loopback ports", False, str(error), "allow binding to 127.0.0.1")


def gpus(host: HostResources) -> Iterator[Check]:
    """The driver, torch's CUDA version, and each GPU with its memory."""
    if not host.gpu_device and not host.gpus:
        yield Check("GPU", None, "none: figures are of this host's CPU", "for GPU figures, run on a GPU host")
        return
    if not host.gpus:
        fix = "check nvidia-smi: a driver of another version than its kernel module needs a reboot"
        yield Check("GPU driver", False, "/dev/nvidiactl exists, but the driver reports no GPU", fix)
        return
    yield Check("GPU driver", True, host.gpus[0].driver)
    yield _torch_on_gpu(host)
    yield from _build_tools(host)
    for index, gpu in enumerate(host.gpus):
        yield _gpu(index, gpu)


def _torch_on_gpu(host: HostResources) -> Check:
    if host.torch_cuda:
        return Check("torch on the GPU", True, f"built for CUDA {host.torch_cuda}")
    found = "a CPU build of torch on a GPU host: stages would refuse to start"
    return Check("torch on the GPU", False, found, "install a CUDA build: make install TORCH='torch>=2.11,<=2.13'")


def _build_tools(host: HostResources) -> Iterator[Check]:
    """What the attention kernels' compiler needs: Triton (the language) compiles a C launcher at first start."""
    needed = "the first kernel that a stage launches is compiled with it"
    fix = f"install one (Debian: apt install gcc), or name it in CC: {needed}"
    yield Check("C compiler", bool(host.compiler), host.compiler or "none", "" if host.compiler else fix)
    there = host.python_header.is_file()
    version = ".".join(map(str, sys.version_info[:2]))
    fix = f"install this Python's headers (Debian: apt install python{version}-dev): {needed}"
    yield Check("Python.h", there, str(host.python_header) if there else "none", "" if there else fix)


def _compiler() -> str:
    """Path of the C compiler that Triton (the language) would use: CC before gcc before clang."""
    if given := os.environ.get("CC"):
        return shutil.which(given) or ""
    return shutil.which("gcc") or shutil.which("clang") or ""


def _python_header() -> Path:
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own scheme: its headers are not in local/
    return Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")


def _gpu(index: int, gpu: GpuFacts) -> Check:
    found = f"{gpu.name}, {_size(gpu.total)}, {_size(gpu.free)} free"
    if gpu.free >= _GPU_NEEDED:
        return Check(f"GPU {index}", True, found)
    fix = f"preset 1.5b needs about {_size(_GPU_NEEDED)}: free some (nvidia-smi lists who holds it), or use preset tiny"
    return Check(f"GPU {index}", None, found, fix)


def _gpus_found() -> tuple[GpuFacts, ...]:
    """Each GPU that the driver reports; none where it does not answer."""
    return tuple(GpuFacts(gpu.name, gpu.driver, gpu.memory_bytes, gpu.free_bytes) for gpu in nvml.present())


def _cuda_of(torch: Found | None) -> str:
    """The CUDA version of a torch, read from its files: an import would take seconds."""
    try:
        text = (torch.folder / "torch" / "version.py").read_text() if torch else ""
    except OSError:
        return _UNREADABLE
    given = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return given.group(1) if given else ""


def _server(root: Path) -> Check:
    urls = local_urls(root)
    if len(urls) > 1:
        fix = "select one with --url, or stop the others"
        return Check("running server", None, ", ".join(urls), fix)
    return Check("running server", None, *((urls[0],) if urls else ("none", "start one: harness serve")))


async def _servers(target: Target) -> list[Check]:
    return await asyncio.gather(*(_reached(target, address) for address in target.addresses))


def _remote(target: Target) -> list[Check]:
    """Whether each server is reachable and, if so, what its stages report that they run on."""
    reached = asyncio.run(_servers(target))
    pairs = zip(target.addresses, reached, strict=True)
    ready = [address for address, check in pairs if check.fine]
    return [*reached, *(check(target, address) for address in ready for check in (_control_of, _stages_of))]


def _control_of(target: Target, address: str) -> Check:
    """Whether a server accepts control calls without the key; the target's own key header is left out."""
    headers = tuple(each for each in target.headers if not each[0].startswith("triton-grpc-protocol-"))
    with replace(target, headers=headers).channel(address) as channel:
        is_open = has_open_control(channel, headers)
    fix = (
        "any client can load models, i.e. execute code: start Triton with "
        "--grpc-restricted-protocol=model-repository,shared-memory,trace,logging:harness=KEY"
    )
    return Check(f"model control of {address}", not is_open, "open" if is_open else "closed", fix if is_open else "")


def _stages_of(target: Target, address: str) -> Check:
    what = f"stages of {address}"
    try:
        with target.channel(address) as channel:
            stages = [each for each in stages_of(channel, address, target.headers) if each.preset]
    except ServerError as error:
        return Check(what, None, "unknown", str(error))
    if not stages:
        return Check(what, None, "unknown", "none of its models reports what it runs on: is it the harness's server?")
    topology = wire.STAGED if any(each.model in wire.STAGES for each in stages) else wire.FUSED
    found = sorted({f"{topology}, {each.gpu or each.device}, {each.dtype}, preset {each.preset}" for each in stages})
    fix = "give all stages one device, dtype and preset: nothing is measured on a mixed server"
    return Check(what, len(found) == 1, "; ".join(found), "" if len(found) == 1 else fix)


async def _reached(target: Target, address: str) -> Check:
    replica = Replica(target, address)
    try:
        await replica.ready()
    except ServerError as error:
        return Check(f"server {address}", False, "not usable", str(error))
    finally:
        await replica.close()
    return Check(f"server {address}", True, f"ready, reached {'with TLS' if target.tls else 'in plain text'}")
