"""Goodput by traffic class: requests per second that met every SLO of their class, trial by trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from harness.records.schema import Rung, Trial
from harness.records.slo import Slo, goodput_by_class
from harness.report import facts
from harness.report.facts import SweptDeployment


@dataclass(frozen=True)
class ClassGoodput:
    """Requests/s of a class that were completed in a window, and of them those that met every SLO."""

    completed_per_s: float
    goodput_per_s: float

    @property
    def share(self) -> float | None:
        return self.goodput_per_s / self.completed_per_s if self.completed_per_s else None


@dataclass(frozen=True)
class TrialGoodput:
    """A trial's goodput by class, in an open-loop run's window or in the window of a ladder where it was highest.

    ``windows``: how many the trial has. ``total``: of all classes.
    """

    trial: Trial
    letter: str
    rung: Rung
    windows: int
    classes: dict[str, ClassGoodput]

    @property
    def total(self) -> ClassGoodput:
        parts = self.classes.values()
        return ClassGoodput(sum(e.completed_per_s for e in parts), sum(e.goodput_per_s for e in parts))


def goodput(
    trials: Sequence[Trial], requests: pd.DataFrame, slos: Sequence[Slo], swept: Sequence[SweptDeployment]
) -> list[TrialGoodput]:
    """One row per trial with a window; ``requests`` as Run.requests() gives them.

    As in ``goodput_per_s`` of a summary: requests completed in the window count, whenever they started, each judged by
    its whole stream.
    """
    letters = {facts.key(entry.knobs): entry.letter for entry in swept}
    names = sorted(set(requests["traffic_class"]))
    rows = []
    for trial in trials:
        own = requests[(requests["trial_id"] == trial.trial_id) & (requests["outcome"] == "done")]
        found = [(rung, _of_window(own, slos, names, rung)) for rung in trial.rungs]
        if found:
            rung, classes = max(found, key=lambda pair: sum(each.goodput_per_s for each in pair[1].values()))
            rows.append(TrialGoodput(trial, letters[facts.key(trial.deployment)], rung, len(found), classes))
    return rows


def _of_window(done: pd.DataFrame, slos: Sequence[Slo], names: Sequence[str], rung: Rung) -> dict[str, ClassGoodput]:
    inside = done[(done["ended_ns"] >= rung.start_ns) & (done["ended_ns"] < rung.end_ns)]
    seconds = (rung.end_ns - rung.start_ns) / 1e9
    good = goodput_by_class(slos, inside, seconds)
    counts = inside["traffic_class"].value_counts()
    return {name: ClassGoodput(float(counts.get(name, 0)) / seconds, good.get(name, 0.0)) for name in names}
