"""Renders every overlay, and one of a signed plan, and checks each object: its schema, and what it refers to.

    python ops/check_manifests.py

Schemas are those of Kubernetes, read strictly: an unknown field is a failure. A ScaledObject, which is KEDA's, is
checked against the part of its schema that stands in ops/manifest_rules.py. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import kubernetes_validate
import yaml

from harness.export.fleet import Accepted, fleet_of
from harness.export.folder import write_folder
from harness.export.kubernetes import OVERLAYS, RULES, Monitoring, overlay_files, record_of

sys.path.append(str(Path(__file__).resolve().parent))  # also where this file is loaded by its path
from manifest_rules import OWN_SCHEMAS, broken_references, broken_schema, name_of, unsafe  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KUBERNETES = ROOT / "ops" / "kubernetes"
SAMPLE, SAMPLE_QPS = ROOT / "results" / "sample-quick", 5.0
VERSION = "1.34"  # of Kubernetes


class Overlay(NamedTuple):
    """A folder that is applied as a whole: its objects as rendered, and what is wrong with them."""

    name: str
    objects: tuple[dict, ...]
    failures: tuple[str, ...]


def check() -> dict:
    """``objects``: how many were rendered and checked; ``failures``: each in words; ``overlays``: counts of both."""
    with tempfile.TemporaryDirectory() as folder:
        overlays = [examined(name, path) for name, path in folders(Path(folder))]
    return {
        "objects": sum(len(each.objects) for each in overlays),
        "failures": [f"{each.name}: {failure}" for each in overlays for failure in each.failures],
        "overlays": {each.name: {"objects": len(each.objects), "failures": len(each.failures)} for each in overlays},
    }


def folders(scratch: Path) -> Iterator[tuple[str, Path]]:
    """Every overlay by name: those of the repository, and those that an export of a signed sample writes."""
    for path in sorted((KUBERNETES / "overlays").iterdir()):
        yield path.name, path
    out = scratch / "export"
    fleet = fleet_of(SAMPLE, SAMPLE_QPS, Accepted(force=True))  # an old sample is a sample still
    write_folder(out, overlay_files(fleet, Monitoring()), record_of(fleet))
    for name in (*OVERLAYS, *RULES):
        if (out / name).is_dir():
            yield f"export, {name}", out / name


def examined(name: str, folder: Path) -> Overlay:
    """Render an overlay and check its objects. Raises RuntimeError where kubectl is missing."""
    if not shutil.which("kubectl"):
        raise RuntimeError("kubectl is not installed: it renders the overlays")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        return Overlay(name, (), (f"kubectl kustomize: {done.stderr.strip()}",))
    objects = tuple(each for each in yaml.safe_load_all(done.stdout) if each)
    return Overlay(name, objects, tuple(problems_of(objects)))


def problems_of(objects: tuple[dict, ...]) -> Iterator[str]:
    """What is wrong with rendered objects: by schema, by what they refer to, and by what a pod may do."""
    for each in objects:
        if problem := schema_problem(each):
            yield f"{name_of(each)}: {problem}"
    yield from broken_references(objects)
    yield from unsafe(objects)


def schema_problem(thing: dict) -> str:
    """Why an object does not have its schema, "" where it does."""
    return _schema_problem(json.dumps(thing, sort_keys=True))


@functools.cache  # overlays share most objects, and a schema takes long to read
def _schema_problem(text: str) -> str:
    thing = json.loads(text)
    if thing.get("kind") in OWN_SCHEMAS:
        return broken_schema(thing)
    try:
        kubernetes_validate.validate(thing, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        return str(error)
    return ""


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        found = check()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'overlay':<20} {'objects':>8} {'failures':>9}")
    for name, counts in found["overlays"].items():
        print(f"{name:<20} {counts['objects']:>8} {counts['failures']:>9}")
    for failure in found["failures"]:
        print(failure)
    print(json.dumps({"objects": found["objects"], "failures": len(found["failures"])}))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
