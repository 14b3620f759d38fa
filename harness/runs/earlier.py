"""How far ladders of one deployment differ on a host: what earlier runs in the same results folder showed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from harness.capacity.models.between_ladders import ASSUMED, Between
from harness.errors import HarnessError
from harness.records.fit import FittedBetween, FittedStep
from harness.records.schema import BetweenLadders, RunManifest
from harness.records.store import Run
from harness.runs.device_names import is_here

_MOST_DEGREES = 12.0  # hosts change: however many runs there were, a run's own ladders count for more than a third


def between_of_earlier_runs(results: Path, manifest: RunManifest) -> BetweenLadders | None:
    """The prior of a new run, from finished runs on such a host, of the same preset; None where they do not widen it.

    Each run adds the squares and degrees of freedom of what it found beyond its own prior. They may widen what is
    assumed, not narrow it: within minutes a host varies less than from day to day.
    """
    squares, degrees, names = ASSUMED.degrees * ASSUMED.deviation**2, ASSUMED.degrees, []
    for run in _alike(results, manifest):
        prior = prior_of(run.manifest)
        if (found := _found_in(run)) is None or found.degrees is None or found.degrees <= prior.degrees:
            continue
        squares += max(found.degrees * found.deviation**2 - prior.degrees * prior.deviation**2, 0.0)
        degrees += found.degrees - prior.degrees
        names.append(run.manifest.run_id)
    deviation = math.sqrt(squares / degrees)
    if deviation <= ASSUMED.deviation:
        return None
    return BetweenLadders(deviation=deviation, degrees=min(degrees, _MOST_DEGREES), runs=tuple(sorted(names)))


def prior_of(manifest: RunManifest) -> Between:
    """How far ladders are taken to differ in a run before any of its own was repeated."""
    learnt = manifest.between_ladders
    return Between(learnt.deviation, learnt.degrees) if learnt else ASSUMED


def _alike(results: Path, manifest: RunManifest) -> Iterator[Run]:
    """Finished runs on such a host; not copies in folders of other names, as samples that came with the harness are."""
    for folder in sorted(results.iterdir()) if results.is_dir() else ():
        if Run.is_run(folder):
            try:
                run = Run.open(folder)
            except HarnessError:
                continue
            known = run.manifest
            if known.finished_at and known.run_id == folder.name and place_of(known) == place_of(manifest):
                yield run


def place_of(manifest: RunManifest) -> tuple:
    """Where a run was measured. What stages report is added to a device's name in brackets, or replaces a GPU's."""
    host = manifest.host
    device = "" if is_here(manifest) and not manifest.emulated else manifest.device.partition(" (")[0]
    return (
        host.cpu,
        host.cores,
        host.memory_gib,
        host.gpu,
        manifest.preset,
        device,
        manifest.emulated,
        manifest.dilation,
    )


def _found_in(run: Run) -> FittedBetween | None:
    try:
        fit = run.fit()
    except HarnessError:
        return None
    best = fit.best_deployment if fit else None
    step = best.step_time if best else None
    return step.between if isinstance(step, FittedStep) else None
