"""The trials of a run as a campaign needs them: which points are settled, and which trials failed."""

from __future__ import annotations

import json
from collections.abc import Callable

from harness import wire
from harness.drive.load import Load
from harness.errors import ServerError
from harness.records.schema import Rung, Trial
from harness.records.store import Run
from harness.runs.points import describe_point
from harness.sweep.trial import Measured, TrialRequest, failed_trial, trial_id
from harness.topology import Knobs

TRIES = 2  # a trial that failed or was INVALID is measured once more
FAILED_IN_A_ROW = 2 * TRIES  # two points: then the point is not the cause


class TrialLog:
    """The stored trials of a run, and those that failed and are not stored yet.

    A failed trial is stored once a later trial succeeds, which shows that the point itself was at fault.
    """

    def __init__(self, run: Run):
        self.run = run
        self.in_doubt: list[Trial] = []  # failed, with nothing measured since

    def all(self) -> list[Trial]:
        return [*self.run.trials(), *self.in_doubt]

    def known(self, name: str) -> Trial | None:
        return next((trial for trial in self.all() if trial.trial_id == name), None)

    def repeats(self, point: Knobs, load: Load) -> int:
        """How often this trial was measured already."""
        return sum(self.known(trial_id(point, load, number)) is not None for number in range(TRIES))

    def settled(self, point: Knobs, load: Load) -> bool:
        """Whether the trial is VALID, or was measured as often as is useful."""
        return self._settled(point, load, {each.trial_id: each for each in self.all()})

    def settled_points(self, load_of: Callable[[Knobs], Load]) -> list[Knobs]:
        """Points whose ladders need no more trials, in the order of their first trials. ``load_of(point)`` -> Load."""
        trials = {each.trial_id: each for each in self.all()}
        points = {json.dumps(each.deployment, sort_keys=True): each.deployment for each in trials.values()}
        return [each for each in points.values() if self._settled(each, load_of(each), trials)]

    @staticmethod
    def _settled(point: Knobs, load: Load, trials: dict[str, Trial]) -> bool:
        tries = [trials.get(trial_id(point, load, repeat)) for repeat in range(TRIES)]
        return any(trial is not None and trial.valid for trial in tries) or None not in tries

    def keep(self, measured: Measured) -> None:
        """Store a trial, and before it those that were in doubt."""
        self.keep_failed()
        self.run.append_trial(measured.trial, measured.results, measured.samples)

    def keep_failed(self) -> None:
        while self.in_doubt:
            self.run.append_trial(self.in_doubt[0], (), ())
            self.in_doubt.pop(0)

    def doubt(self, request: TrialRequest, error: Exception) -> Trial:
        """Note a failed trial. Raises ServerError where so many failed in a row that the point is not the cause."""
        trial = failed_trial(request, str(error))
        self.in_doubt.append(trial)
        points = {json.dumps(each.deployment, sort_keys=True) for each in self.in_doubt}
        if len(self.in_doubt) >= FAILED_IN_A_ROW and len(points) > 1:
            count = len(self.in_doubt)
            raise ServerError(f"{count} trials failed in a row; none of them is stored. The last: {error}")
        return trial

    def in_pace(self) -> list[tuple[Rung, Trial]]:
        """The rungs of VALID trials that kept pace with speech, each with its trial."""
        rungs = [(rung, trial) for trial in self.run.trials() if trial.valid for rung in trial.rungs]
        return [pair for pair in rungs if pair[0].sessions <= pair[0].frames_per_s * wire.SECONDS_PER_FRAME]

    def best_so_far(self) -> str:
        """The deployment that delivered the most audio in a rung that kept pace with speech, as text."""
        rung, trial = max(self.in_pace(), key=lambda pair: pair[0].frames_per_s, default=(None, None))
        if rung is None or trial is None:
            return ""
        most = rung.frames_per_s * wire.SECONDS_PER_FRAME
        return f"best so far: {most:.1f} audio s/s in time with {describe_point(trial.deployment)}"


def note_of(trial: Trial) -> str:
    """A short description of a finished trial."""
    verdict = f"VALID{_disturbed(trial)}" if trial.valid else f"INVALID ({'; '.join(trial.reasons)})"
    if trial.kind == "ladder":
        best = max((rung.frames_per_s for rung in trial.rungs), default=0.0)
        return f"{verdict}, up to {best * wire.SECONDS_PER_FRAME:.1f} audio s/s"
    p95 = trial.rungs[0].summary.ttfa_p95_s if trial.rungs else float("nan")
    return f"{verdict}, time to first audio p95 {p95:.2f} s"


def _disturbed(trial: Trial) -> str:
    """How many rungs of a ladder were measured again or left out, and why; "" for an undisturbed ladder."""
    again = sum(rung.repeated for rung in trial.disturbed)
    left_out = len(trial.disturbed) - again
    counts = [f"{again} measured again"] * bool(again) + [f"{left_out} left out"] * bool(left_out)
    return f" (disturbed rungs: {', '.join(counts)}; {trial.disturbed[0].disturbed})" if counts else ""
