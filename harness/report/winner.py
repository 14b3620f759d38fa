"""The best deployment of a run as files ready to deploy, and their difference to the defaults."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml
from google.protobuf import text_format

from harness import wire
from harness.deploy.config import Configs, folder_of, read_repository
from harness.errors import InputError
from harness.records.store import Run, replace_text
from harness.runs.points import base_of
from harness.sweep.trial import asked, deployed
from harness.topology import Knobs, topology_of

FOLDER = "winner"
DIFF, REQUESTS = "changes.diff", "requests.yaml"


def write_winner(run: Run, point: Knobs) -> Path:
    """Write ``winner/<model>/config.pbtxt`` for every model, and ``changes.diff``.

    Values that requests must set are in ``requests.yaml``. The files replace those of an earlier call. Raises
    StoreError where they cannot be written.

    The fused engine is deployed under the name of the entry, whose code in model_repository/ differs: the engine's code
    is written too, so that ``winner/`` is a complete repository.
    """
    folder, topology = run.path / FOLDER, topology_of(point)
    shutil.rmtree(folder, ignore_errors=True)
    for model, text in texts(winning_configs(run, point)).items():
        replace_text(folder / model / "config.pbtxt", text)
        if topology == wire.FUSED:
            code = Path("1") / "model.py"
            replace_text(folder / model / code, (folder_of(model, topology) / code).read_text())
    replace_text(folder / DIFF, changes(run, point))
    if asked(point):
        replace_text(folder / REQUESTS, yaml.safe_dump(asked(point)))
    return folder


def winning_configs(run: Run, point: Knobs) -> Configs:
    """The configuration of every model at a point. Raises InputError for a point that this repository cannot have."""
    return deployed(base_of(run), point).configs()


def changes(run: Run, point: Knobs) -> str:
    """A unified diff from the repository's own configurations to those of a point; "" where there is none."""
    topology = topology_of(point)
    before, after = texts(read_repository(topology=topology)), texts(winning_configs(run, point))
    names = {model: folder_of(model, topology).name for model in before}
    return "".join(_diff(names[model], model, before[model], after[model]) for model in before)


def changes_or_reason(run: Run, point: Knobs) -> str:
    """``changes``, or why there are none: an old run may have set a knob that the repository no longer has."""
    try:
        return changes(run, point)
    except InputError as error:
        return f"not known: {error}"


def texts(configs: Configs) -> Mapping[str, str]:
    return {model: text_format.MessageToString(config) for model, config in configs.items()}


def _diff(source: str, model: str, before: str, after: str) -> str:
    names = (f"model_repository/{source}/config.pbtxt", f"{FOLDER}/{model}/config.pbtxt")
    lines = difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), *names, n=2)
    return "".join(lines)
