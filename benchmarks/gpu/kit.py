"""Builds what a GPU host without network access needs to run this harness, in parts of at most 64 MiB.

Part 1 is the checkout, the Triton server reduced to one Python version, numpy 1 and the client; later parts have every
other dependency that the host lacks, or has only in a version that needs numpy 2. All parts are needed before anything
runs: with numpy 1 (which Triton's Python stub needs) a host's newest scipy and pandas fail, and transformers imports
scipy. On the host, unpack all parts into one folder and run install.sh there.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PART_LIMIT = 64 << 20  # bytes
TAR_BLOCK = 10_240  # a tar is padded to a multiple of this
PRESET = 3  # of xz: higher presets save little here, and take minutes
FROM_THE_HOST = ("torch",)  # built for the host's GPU: never included
SERVER = "nvidia-pytriton"
FIRST = ("numpy", "tritonclient", "python-rapidjson")  # what a run of the stages on Triton needs
# Included even if the host has one: Triton's Python stub needs numpy 1, and the package list of a host on which an
# earlier kit was tried may contain that kit's client.
CARRIED = FIRST
NUMPY = "1.26.4"  # the last of numpy 1
GLIBC = 39  # of 2.39, in Ubuntu 24.04; the server's own wheel needs 2.35
LEFT_OUT = (":!results/sample-*", ":!notebooks")  # excluded from the checkout
EXIT_FAILED, EXIT_MISTAKE = 1, 64


class KitError(Exception):
    """The kit cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Options:
    folder: Path
    host: Path
    python: str  # of the host, e.g. 3.12
    libpython: Path | None
    limit: int  # bytes of a part


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        parts = build(options)
    except KitError as error:
        print(f"kit.py: {error}", file=sys.stderr)
        return EXIT_FAILED
    for part in parts:
        print(f"{part['name']:<14} {part['bytes'] / 2**20:6.1f} MiB  {', '.join(part['holds'])}")
    print(
        f"In {options.folder}. The host needs all {len(parts)} parts before anything runs. There: "
        "for p in part-*.tar; do tar xf $p; done; bash install.sh ~/harness"
    )
    print(json.dumps({"folder": str(options.folder), "limit_bytes": options.limit, "parts": parts}))
    return 0


def parse(arguments: Sequence[str] | None) -> Options:
    raw = argparse.RawDescriptionHelpFormatter
    example = "Example:\n  python benchmarks/gpu/kit.py --out build/gpu-kit --host benchmarks/gpu/host-packages.txt"
    parser = argparse.ArgumentParser(description=__doc__, epilog=example, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-kit", help="the folder of the parts")
    parser.add_argument("--host", type=Path, default=HERE / "host-packages.txt", help="what `pip list` says there")
    parser.add_argument("--python", default="3.12", choices=("3.11", "3.12"), help="the host's Python")
    parser.add_argument(
        "--libpython", type=Path, help="its libpython3.X.so.1.0; left out = of a Python on this machine"
    )
    parser.add_argument("--limit-mib", type=int, default=PART_LIMIT >> 20, help="the largest size of a part")
    parser.error = lambda message: parser.exit(EXIT_MISTAKE, f"kit.py: {message}; see --help\n")
    given = parser.parse_args(arguments)
    return Options(given.out, given.host, given.python, given.libpython, given.limit_mib << 20)


def build(options: Options) -> list[dict]:
    """Write the parts; returns name, bytes and contents of each. Raises KitError."""
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        first = [HERE / "install.sh", checkout(work), libpython(work, options)]
        wheels = download(missing(options), work / "wheels", options.python)
        first += [slim_server(work, options.python), *(w for w in wheels if project_of(w) in FIRST)]
        others = [w for w in wheels if project_of(w) not in FIRST]
        return write_parts(work, options, first, others)


def write_parts(work: Path, options: Options, first: Sequence[Path], others: Sequence[Path]) -> list[dict]:
    """Write the parts, with kit.json (the contents of every part) in the first. Raises KitError."""
    plan = write_plan(work, options, split(first, others, options.limit))
    parts = split([*first, plan], others, options.limit)  # the first part takes none of the others
    return [write_part(options, number, files) for number, files in enumerate(parts, 1)]


def write_plan(work: Path, options: Options, parts: Sequence[Sequence[Path]]) -> Path:
    """Write what the installer checks the host and the unpacked files against."""
    path = work / "kit.json"
    holds = {part_name(number): [unpacked_name(file) for file in files] for number, files in enumerate(parts, 1)}
    path.write_text(json.dumps({"python": options.python, "server": server_version(), "parts": holds}))
    return path


def part_name(number: int) -> str:
    return f"part-{number}.tar"


def unpacked_name(file: Path) -> str:
    """The path of a file once its part is unpacked."""
    return f"wheels/{file.name}" if file.suffix == ".whl" else file.name


def checkout(work: Path) -> Path:
    """The committed files of this checkout, with a note of the commit."""
    commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").decode().strip()
    listed = git("archive", "--format=tar", "--prefix=checkout/", "HEAD", "--", ".", *LEFT_OUT)
    path = work / "checkout.tar.xz"
    with tarfile.open(fileobj=io.BytesIO(listed)) as source, tarfile.open(path, "w:xz", preset=PRESET) as target:
        for member in source:
            target.addfile(member, source.extractfile(member) if member.isfile() else None)
        note = tarfile.TarInfo("checkout/harness/commit.txt")
        note.size = len(commit) + 1
        target.addfile(note, io.BytesIO(f"{commit}\n".encode()))
    return path


def git(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise KitError(
            f"the kit is built from a commit, but git reports for {ROOT}: {error}; run it in a clone"
        ) from error


def libpython(work: Path, options: Options) -> Path:
    """The shared library that Triton's Python stub links to, without its debug symbols."""
    name = f"libpython{options.python}.so.1.0"
    found = options.libpython or find_libpython(options.python, name)
    if found is None or not found.is_file():
        raise KitError(
            f"no {name} on this machine (no package index carries one by itself): name one with --libpython, from a "
            f"Python {options.python} built with --enable-shared, such as Debian's and Ubuntu's package libpython"
            f"{options.python}"
        )
    plain = work / name
    shutil.copyfile(found, plain)
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-unneeded", str(plain)], check=True)
    path = work / f"{name}.xz"
    path.write_bytes(lzma.compress(plain.read_bytes(), preset=PRESET))
    return path


def find_libpython(python: str, name: str) -> Path | None:
    """The libpython of an interpreter of this version, or of the system."""
    places = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"]
    if each := interpreter(python):
        asked = [each, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
        places.insert(0, subprocess.run(asked, capture_output=True, text=True).stdout.strip())
    return next((Path(place) / name for place in places if (Path(place) / name).is_file()), None)


@lru_cache
def interpreter(python: str) -> str | None:
    """This interpreter if it has this version, or another that has: on PATH, or under ~/.pyenv."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{python}.*"), reverse=True)
    candidates = [sys.executable, shutil.which(f"python{python}"), *(folder / "bin" / "python3" for folder in pyenv)]
    for each in map(str, filter(None, candidates)):
        asked = [each, "-c", "import sysconfig; print(sysconfig.get_python_version())"]
        if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == python:
            return each
    return None


def dependencies() -> list[Requirement]:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [Requirement(each) for each in listed]


def server_version() -> str:
    return next(str(each.specifier).removeprefix("==") for each in dependencies() if each.name == SERVER)


def host_packages(path: Path) -> dict[str, str]:
    """Version by name, "" if unknown, from ``pip list`` in any of its formats, or from names alone."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise KitError(f"cannot read {path}: {error.strerror}; write it with `pip list --format=freeze`") from None
    found = {}
    for line in lines:
        parts = re.split(r"==|\s+", line.strip())
        if parts[0] and re.match(r"[A-Za-z0-9]", parts[0]) and parts[0].lower() != "package":
            found[canonicalize_name(parts[0])] = parts[1] if len(parts) > 1 else ""
    return found


def missing(options: Options) -> dict[str, str]:
    """Version by name of each package that the harness needs and the host lacks, or has in an unsuitable version.

    A host's package of unknown version counts as the newest one. A package that is not built for numpy 1 is unsuitable.
    """
    host = host_packages(options.host)
    if lacking := [name for name in FROM_THE_HOST if name not in host]:
        raise KitError(f"{options.host} has no {', '.join(lacking)}: the host must bring its own, built for its GPU")
    own = needed(map(str, dependencies()), options.python)
    asked = [each for each in own if each.name not in (*FROM_THE_HOST, SERVER)]
    for each in asked:
        each.marker = None  # pip would judge it by the Python that builds the kit
    known = agreeing(host, resolve(asked, {}, options.python), options.python)
    there = {name: each for name, each in resolve(newest(asked), known, options.python).items() if name in host}
    stays = {name: each for name, each in there.items() if host[name] in ("", each[0])}
    kept = {name: version for name, (version, needs) in stays.items() if suits(name, version, needs, asked, options)}
    resolved = resolve(asked, kept, options.python)
    return {name: version for name, (version, _) in resolved.items() if kept.get(name) != version}


def agreeing(host: dict[str, str], carried: dict[str, tuple[str, list[str]]], python: str) -> dict[str, str]:
    """The host's packages of known version that are compatible with those included; otherwise pip finds no solution.

    ``carried``: version and own requirements by name of what an empty host would get. What the host lacks, CARRIED, and
    versions required by these that the host does not have are always included.
    """
    known = {name: version for name, version in host.items() if version and name not in CARRIED}
    certain = [name for name in carried if name not in host or name in CARRIED]
    while certain:
        listed = needed(carried.get(certain.pop(), ("", []))[1], python)
        refused = [each.name for each in listed if not fits(known.get(canonicalize_name(each.name)), each)]
        for name in map(canonicalize_name, refused):
            if known.pop(name, None):
                certain.append(name)
    return known


def fits(version: str | None, requirement: Requirement) -> bool:
    return version is None or requirement.specifier.contains(version, prereleases=True)


def needed(needs: Iterable[str], python: str) -> list[Requirement]:
    """The requirements of a package that apply on the host; of extras only that of gRPC, as the harness uses it."""
    there = {"python_version": python, "python_full_version": f"{python}.0"}
    every = map(Requirement, needs)
    return [
        each
        for each in every
        if each.marker is None or any(each.marker.evaluate({**there, "extra": extra}) for extra in ("", "grpc"))
    ]


def newest(asked: Iterable[Requirement]) -> list[Requirement]:
    """The same packages without upper bounds."""
    found = [Requirement(str(each)) for each in asked]
    for each in found:
        each.specifier = SpecifierSet(",".join(str(one) for one in each.specifier if one.operator in (">=", "==")))
    return found


def suits(name: str, version: str, needs: Sequence[str], asked: Iterable[Requirement], options: Options) -> bool:
    """Whether the host's version of a package can stay: within the harness's bounds, and compatible with numpy 1."""
    bounds = [each.specifier for each in asked if canonicalize_name(each.name) == name]
    if name in CARRIED or not all(bound.contains(version, prereleases=True) for bound in bounds):
        return False
    there = {"extra": "", "python_version": options.python, "python_full_version": f"{options.python}.0"}
    listed = [each for each in map(Requirement, needs) if each.marker is None or each.marker.evaluate(there)]
    return all(each.specifier.contains(NUMPY) for each in listed if each.name == "numpy")


def resolve(asked: Iterable[Requirement], fixed: dict[str, str], python: str) -> dict[str, tuple[str, list[str]]]:
    """Version and own requirements, by name, of everything required, with some versions fixed; nothing is installed."""
    with tempfile.TemporaryDirectory() as scratch:
        report, limits = Path(scratch) / "report.json", Path(scratch) / "limits.txt"
        limits.write_text("".join(f"{name}=={version}\n" for name, version in fixed.items()))
        command = [*pip("install", python), "--dry-run", "--ignore-installed", "--target", scratch]
        command += ["--report", str(report), "-c", str(limits), *map(str, asked)]
        run_pip(command)
        found = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    return {canonicalize_name(each["name"]): (each["version"], each.get("requires_dist", [])) for each in found}


def download(versions: dict[str, str], folder: Path, python: str) -> list[Path]:
    """One wheel of each, for the host's Python."""
    command = [*pip("download", python), "--no-deps", "-d", str(folder)]
    run_pip([*command, *(f"{name}=={version}" for name, version in versions.items())])
    return sorted(folder.glob("*.whl"))


def pip(verb: str, python: str) -> list[str]:
    """Run pip as on the host, with an interpreter of its version, since pip resolves for its own interpreter."""
    command = [sys.executable, "-m", "pip"]
    command += ["--python", each] if (each := interpreter(python)) else []
    command += [verb, "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python]
    command += [] if each else ["--ignore-requires-python"]
    platforms = [*(f"manylinux_2_{minor}" for minor in range(GLIBC, 4, -1)), "manylinux2014", "manylinux1"]
    return [*command, *(word for each in platforms for word in ("--platform", f"{each}_x86_64"))]


def run_pip(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-3:]
        raise KitError(f"pip finds no set of packages that fits the host: {' '.join(words)}")


def project_of(wheel: Path) -> str:
    return canonicalize_name(wheel.name.partition("-")[0])


def slim_server(work: Path, python: str) -> Path:
    """The wheel of the Triton server with the Python stub of one version alone."""
    (wheel,) = download({SERVER: server_version()}, work / "server", python)
    path = work / f"{wheel.name.removesuffix('.whl')}.tar.xz"
    with zipfile.ZipFile(wheel) as source, tarfile.open(path, "w:xz", preset=PRESET) as target:
        for info in source.infolist():
            if not info.is_dir() and is_needed(info.filename, python):
                member = tarfile.TarInfo(info.filename)
                member.size, member.mode = info.file_size, (info.external_attr >> 16) & 0o777 or 0o644
                target.addfile(member, source.open(info))
    return path


def is_needed(name: str, python: str) -> bool:
    """Whether the server needs this file of its wheel: not the stubs for other Pythons, nor its bundled libpython."""
    stub = re.search(r"/python_backend_stubs/([\d.]+)/", name)
    other_stub = stub is not None and stub.group(1) != python
    return not other_stub and not re.search(r"\.libs/libpython", name) and not name.endswith(".dist-info/RECORD")


def split(first: Sequence[Path], others: Sequence[Path], limit: int) -> list[list[Path]]:
    """Files by part: the first ones together, then the others, largest first, each where there is room."""
    parts, sizes = [list(first)], [packed_size(first)]
    for file in sorted(others, key=lambda file: (-file.stat().st_size, file.name)):
        room = [n for n, size in enumerate(sizes) if n > 0 and size + packed_size([file]) <= limit]
        if not room:
            parts.append([])
            sizes.append(TAR_BLOCK)
            room = [len(parts) - 1]
        parts[room[0]].append(file)
        sizes[room[0]] += packed_size([file])
    for files, size in zip(parts, sizes, strict=True):
        if size > limit:
            named = ", ".join(f"{file.name} {file.stat().st_size / 2**20:.1f} MiB" for file in files)
            raise KitError(f"a part would be {size / 2**20:.1f} MiB, above {limit / 2**20:.0f}: {named}")
    return parts


def packed_size(files: Iterable[Path]) -> int:
    """Upper bound of a tar's size: a header per file, its content in blocks, and the padding at the end."""
    return sum(1024 + file.stat().st_size for file in files) + TAR_BLOCK


def write_part(options: Options, number: int, files: Sequence[Path]) -> dict:
    path = options.folder / part_name(number)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as target:
        for file in files:
            target.add(file, unpacked_name(file))
    return {"name": path.name, "bytes": path.stat().st_size, "holds": [file.name for file in files]}


if __name__ == "__main__":
    sys.exit(main())
