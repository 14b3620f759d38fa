#!/usr/bin/env bash
# Installs the harness on a host without a network, from the unpacked parts of `make gpu-kit` beside this script.
set -euo pipefail

usage() {
  cat <<'END'
Usage: bash install.sh [--python PYTHON] FOLDER

Makes FOLDER with the checkout in it, and in FOLDER/.venv an environment without pip: the packages of the kit, then this
checkout, then the packages of PYTHON (left out = python3), which must have torch built for the GPU. All parts of the kit
must be unpacked here first. Nothing is fetched, and nothing outside FOLDER is changed. Ends with a check of every import and with `harness doctor`.

Examples:
  for part in part-*.tar; do tar xf "$part"; done
  bash install.sh ~/harness
  bash install.sh --python /opt/torch/bin/python3 ~/harness
END
}

fail() { echo "install.sh: $1" >&2; exit 64; }

kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python3
folder=
while [ $# -gt 0 ]; do
  case $1 in
    -h|--help) usage; exit 0 ;;
    --python) [ $# -gt 1 ] || fail "--python needs the path of an interpreter"; python=$2; shift 2 ;;
    -*) fail "unknown option $1; see --help" ;;
    *) [ -z "$folder" ] || fail "give one FOLDER, not $folder and $1"; folder=$1; shift ;;
  esac
done
[ -n "$folder" ] || fail "give the FOLDER to install into; see --help"
[ ! -e "$folder" ] || fail "$folder is there already: name another, or remove it"
for file in kit.json checkout.tar.xz; do
  [ -f "$kit/$file" ] || fail "$kit holds no $file: unpack part-1.tar, and all other parts, here first"
done
command -v "$python" > /dev/null || fail "there is no $python: name the host's interpreter with --python"

"$python" - "$kit" "$folder" <<'END'
import json, lzma, os, subprocess, sys, sysconfig, tarfile, venv, zipfile
from pathlib import Path

kit, target = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
plan = json.loads((kit / "kit.json").read_text())
missing = [part for part, files in plan["parts"].items() if not all((kit / file).is_file() for file in files)]
if missing:
    print(f"install.sh: {kit} lacks files of {', '.join(missing)}: nothing runs without all {len(plan['parts'])} parts; "
          "unpack these there first, by tar xf", file=sys.stderr)
    sys.exit(64)
version = f"{sys.version_info.major}.{sys.version_info.minor}"
if version != plan["python"]:
    sys.exit(f"install.sh: {sys.executable} is Python {version}, and this kit is for {plan['python']}: "
             f"name another with --python, or build the kit with --python {version}")

asked = [sys.executable, "-P", "-c", "import json, sys; print(json.dumps(sys.path))"]
searched = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
host = [p for p in searched if os.path.isdir(p) and p not in standard and not p.endswith("lib-dynload")]


def unpack(archive, folder):
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")


target.mkdir(parents=True)
unpack(kit / "checkout.tar.xz", target)
for part in (target / "checkout").iterdir():
    part.rename(target / part.name)
(target / "checkout").rmdir()

environment = target / ".venv"
venv.create(environment, symlinks=True, with_pip=False)
packages = environment / "lib" / f"python{version}" / "site-packages"
for archive in kit.glob("nvidia_pytriton-*.tar.xz"):
    unpack(archive, packages)
for wheel in sorted(kit.glob("wheels/*.whl")):
    with zipfile.ZipFile(wheel) as source:
        source.extractall(packages)
for data in packages.glob("*.data"):  # a wheel's files for other places: only modules are of use here
    for part in ("purelib", "platlib"):
        for each in (data / part).glob("*"):
            each.rename(packages / each.name)
for library in kit.glob("libpython*.xz"):
    (environment / "lib" / library.stem).write_bytes(lzma.decompress(library.read_bytes()))
(packages / "harness.pth").write_text("".join(f"{path}\n" for path in [target, *host]))

for name in ("harness", "locust"):
    script = environment / "bin" / name
    script.write_text(f"#!/bin/sh\nexec '{environment}/bin/python' -m {name} \"$@\"\n")
    script.chmod(0o755)
END

wrong=0
"$folder/.venv/bin/python" - <<'END' || wrong=1
import importlib, sys, tomllib

from packaging.requirements import Requirement

import harness.host.places

NAMES = {"nvidia-ml-py": "pynvml", "nvidia-pytriton": None, "pyyaml": "yaml", "tritonclient": "tritonclient.grpc"}
wrong = 0
asked = tomllib.loads((harness.host.places.CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
for each in sorted(asked, key=lambda each: not each.startswith("locust")):  # it replaces what others would import
    needed = Requirement(each)
    if needed.marker and not needed.marker.evaluate():  # of another version of Python
        continue
    project = needed.name
    name = NAMES.get(project, project.replace("-", "_"))
    if name is None:
        continue
    try:
        module = importlib.import_module(name)
    except Exception as error:
        wrong += 1
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"no  {project}: {words}; write the host's `pip list` to host-packages.txt and build the kit again")
    else:
        print(f"ok  {project} {getattr(module, '__version__', '')}  {getattr(module, '__file__', '')}")
sys.exit(1 if wrong else 0)
END
[ $wrong -ne 0 ] || (cd "$folder" && .venv/bin/harness doctor) || wrong=1
if [ $wrong -ne 0 ]; then
  echo "install.sh: installed in $folder, and the lines with 'no' above have to be fixed first" >&2
  exit 1
fi
echo "installed in $folder: cd $folder && . .venv/bin/activate"
