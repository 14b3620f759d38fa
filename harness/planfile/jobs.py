"""The file of ``harness plan --jobs``: the tasks that are to run beside the streams of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError, field_validator

from harness import wire
from harness.capacity.planning.job_fleets import JobDemand
from harness.errors import InputError, PlanError
from harness.planfile.reading import problem_of, read_yaml
from harness.planfile.sections import Frozen, Positive, Whole
from harness.records.jobs import AskedTasks
from harness.records.turnaround import TurnaroundSlo
from harness.traffic.mix import FROM_SCRIPT, Lengths


class JobsSpec(Frozen):
    """Tasks: how many, how long, until when; and how the studio runs them. Units are in the names."""

    per_hour: Positive
    length: Any
    slos: dict[str, Any] = Field(min_length=1)
    segment_seconds: Annotated[float, Field(strict=True, ge=0.1, le=5400)] = 120.0
    at_once: Whole | None = None
    resume_seconds: Annotated[float, Field(strict=True, ge=0, le=60)] | None = None
    resume_seconds_per_minute: Annotated[float, Field(strict=True, ge=0, le=60)] = 0.0
    streams_swing: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0

    @field_validator("slos")
    @classmethod
    def _readable(cls, slos: dict[str, Any]) -> dict[str, Any]:
        for key, limit in slos.items():
            try:
                TurnaroundSlo.parse(str(key), limit)
            except PlanError as error:
                raise ValueError(str(error)) from None
        return slos

    def lengths(self, folder: Path) -> Lengths:
        """The lengths of tasks; relative paths start at ``folder``. Raises InputError."""
        lengths = Lengths.parse(self.length, folder)
        if lengths.from_script:
            raise InputError(f"length: tasks have no scripts here: give seconds of audio instead of {FROM_SCRIPT}")
        return lengths

    def demand(self, lengths: Lengths) -> JobDemand:
        return JobDemand(
            per_hour=self.per_hour,
            lengths=lengths,
            slos=tuple(TurnaroundSlo.parse(key, limit) for key, limit in self.slos.items()),
            segment_frames=max(1, round(self.segment_seconds * wire.FRAMES_PER_SECOND)),
            at_once=self.at_once,
            between=(self.resume_seconds, self.resume_seconds_per_minute * wire.SECONDS_PER_FRAME / 60),
            swing=self.streams_swing,
        )


def load_jobs(path: Path) -> JobDemand:
    """The demand of a file of tasks. Raises PlanError as ``read_jobs``."""
    return demand_of(read_jobs(path))


def demand_of(asked: AskedTasks) -> JobDemand:
    """The demand of tasks that were read before. Raises InputError for those of another harness version."""
    try:
        spec = JobsSpec.model_validate(asked.keys)
    except ValidationError as error:
        raise InputError(f"tasks that this harness cannot read: {problem_of(error.errors()[0], JobsSpec)}") from None
    return spec.demand(Lengths(np.array(asked.frames)) if asked.frames else spec.lengths(Path()))


def read_jobs(path: Path) -> AskedTasks:
    """Read a file of tasks. Raises one PlanError with a line per mistake: file, key, and what is allowed."""
    try:
        spec = JobsSpec.model_validate(read_yaml(path, JobsSpec))
        lengths = spec.lengths(path.parent)
        is_of_a_file = "empirical" in spec.length
        return AskedTasks(
            keys=spec.model_dump(mode="json"), frames=tuple(lengths.frames.tolist()) if is_of_a_file else ()
        )
    except ValidationError as error:
        problems = [problem_of(each, JobsSpec) for each in error.errors()]
        raise PlanError("\n".join(f"{path}: {problem}" for problem in problems)) from None
    except InputError as error:
        raise PlanError(f"{path}: {error}") from None
