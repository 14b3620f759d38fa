"""Profiles of a device: a child process measures the stages; the result is stored and shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from harness import wire
from harness.deploy.config import checked_preset
from harness.device_profile import (
    EVENTS,
    MEASURED,
    PREFILL,
    DeviceEvent,
    EndEvent,
    ErrorEvent,
    GridPoint,
    ModelSizes,
    PointEvent,
    Profile,
    ProfileManifest,
    ProfilerEvent,
    SkippedPoint,
    StagePoint,
    event_of,
    is_event,
)
from harness.errors import HarnessError, InputError
from harness.host.places import preset_name
from harness.host.process_group import end_group, spawn
from harness.host.provenance import commit, host_facts, versions
from harness.records.store import write_profile

DEVICES = ("auto", "cpu", "cuda")
Points = Mapping[str, Sequence[StagePoint | SkippedPoint]]  # by stage
BUDGET_S, TINY_BUDGET_S = 420.0, 60.0
_TITLES = {
    wire.LLM: ("LLM step", "sessions", "context"),
    PREFILL: ("LLM prompt part", "tokens", "context"),
    wire.DIFFUSION: ("diffusion", "sessions", "steps"),
    wire.VOCODER: ("vocoder", "sessions", ""),
    wire.VOICE: ("voice encoder", "seconds", ""),
}
_COORDINATES = {
    wire.LLM: ("batch", "context"),
    PREFILL: ("tokens", "context"),
    wire.DIFFUSION: ("batch", "steps"),
    wire.VOCODER: ("batch", ""),
    wire.VOICE: ("seconds", ""),
}


@dataclass(frozen=True)
class ProfileJob:
    """What to measure. ``budget_s`` defaults to one minute for preset tiny and seven minutes for others.

    Raises InputError for what cannot be measured.
    """

    preset: str = "tiny"
    device: str = "auto"
    checkpoint: str = ""
    weights_seed: int = 0
    budget_s: float | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "preset", checked_preset(self.preset))
        if self.device not in DEVICES:
            raise InputError(f"unknown device {self.device!r}: use one of {', '.join(DEVICES)}")
        usual_s = TINY_BUDGET_S if self.preset == "tiny" else BUDGET_S
        budget_s = usual_s if self.budget_s is None else self.budget_s
        object.__setattr__(self, "budget_s", budget_s)
        if not 5 <= budget_s <= 86_400:
            raise InputError(f"a budget of {budget_s:g} s is not usable: give 5 to 86400 seconds")

    def options(self) -> list[str]:
        """The job as command line options, both of ``harness profile`` and of its child."""
        options = ["--preset", self.preset, "--device", self.device, "--budget-seconds", f"{self.budget_s:g}"]
        options += ["--weights-seed", str(self.weights_seed)]
        options += ["--checkpoint", self.checkpoint] if self.checkpoint else []
        return options + (["--quick"] if self.quick else [])

    def command(self) -> list[str]:
        """The command line of the child that measures."""
        return [sys.executable, "-m", "harness.vibevoice.profiling.profiler", *self.options()]


@dataclass
class Findings:
    """What the child has reported so far."""

    device: DeviceEvent | None = None
    stages: dict[str, list[StagePoint | SkippedPoint]] = field(default_factory=dict)
    model: ModelSizes | None = None  # reported last, so None if the measurement broke off

    def take(self, event: ProfilerEvent) -> None:
        match event:
            case DeviceEvent():
                self.device = event
            case PointEvent():
                self.stages.setdefault(event.stage, []).append(event.point)
            case ErrorEvent():
                raise InputError(event.message)
            case EndEvent():
                self.model = event.model


def measure(job: ProfileJob, folder: Path, say: Callable[[str], None]) -> Path:
    """Measure the stages in a child process and store the profile; returns its path. ``say`` is called per point.

    Raises HarnessError where the child failed (nothing is stored then), and before it starts where nothing could be
    stored.
    """
    _check_folder(Path(folder))
    began = time.monotonic()
    findings = Findings()
    with _child(job) as (process, log):
        for event in _events(process, log):
            findings.take(event)
            if isinstance(event, PointEvent):
                say(f"[{time.monotonic() - began:3.0f} s, {event.done}/{event.of}] {describe(event)}")
        if findings.device is None or findings.model is None:
            raise HarnessError(f"the measurement broke off{_why(process.wait(), log)}")
        profile = _profile(job, findings.device, findings.model, findings.stages, time.monotonic() - began)
    path = Path(folder) / f"{_file_name(profile.device)}-{profile.preset}.json"
    write_profile(path, profile)
    return path


def _check_folder(folder: Path) -> None:
    """Raise InputError where no file can be written to the folder, or the folder cannot be created."""
    try:
        nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; give another --out") from error


@contextmanager
def _child(job: ProfileJob) -> Iterator[tuple[subprocess.Popen, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "profile.log"
        process = spawn(job.command(), log)
        try:
            yield process, log
        finally:
            end_group(process, grace_s=2)


def _events(process: subprocess.Popen, log: Path) -> Iterator[ProfilerEvent]:
    """The child's events until it has ended; other lines of its log are warnings of libraries."""
    rest = ""
    with open(log, errors="replace") as lines:
        while True:
            ended = process.poll() is not None  # checked before reading, so that its last lines are read too
            *whole, rest = (rest + lines.read()).split("\n")
            yield from (event_of(line) for line in whole if is_event(line))
            if ended:
                return
            time.sleep(0.1)


def _why(code: int, log: Path) -> str:
    if code == -9:
        return ": it was killed, most likely because memory ran out; give a smaller --preset"
    lines = [line for line in log.read_text(errors="replace").splitlines() if not is_event(line)]
    return f" (exit code {code}):\n" + "\n".join(lines[-5:])[-2000:]


def _profile(job: ProfileJob, said: DeviceEvent, model: ModelSizes, stages: Points, took_s: float) -> Profile:
    host, on_cpu = host_facts(), said.device == "cpu"
    return Profile(
        device=host.cpu if on_cpu else said.device,
        preset=preset_name(job.preset),
        dtype=said.dtype,
        manifest=ProfileManifest(
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join(["harness", "profile", *job.options()]),
            commit=commit(),
            versions=versions(),
            host=host,
            threads=1 if on_cpu else None,
            weights=job.checkpoint or f"random, seed {job.weights_seed}",
            seconds=round(took_s, 1),
            self_noise=said.self_noise,
            device_ms_from=_device_ms_from(stages),
        ),
        model=model,
        bandwidth_gb_s=said.bandwidth_gb_s,
        tflop_s=said.tflop_s,
        stages={stage: tuple(points) for stage, points in stages.items()},
        basis=MEASURED,
    )


def _device_ms_from(stages: Points) -> dict[str, int]:
    """Counts of points whose ``device_ms`` came from the profiler, from CUDA events, from a CPU or from wall time."""
    points = (point for points in stages.values() for point in points)
    return dict(Counter(point.device_ms_from for point in points if isinstance(point, StagePoint)))


def _file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-")


def describe(event: PointEvent) -> str:
    """Describe a point briefly."""
    point, (title, *_) = event.point, _TITLES[event.stage]
    where = ", ".join(f"{name} {point.at(name)}" for name in _COORDINATES[event.stage] if name)
    return f"{title}, {where}: " + (point.left_out if isinstance(point, SkippedPoint) else f"{point.ms:.3g} ms")


def tables(profile: Profile) -> list[Table]:
    """Milliseconds of every stage, each with its roofline in parentheses, as tables for a terminal.

    Where the device's time was measured separately, the line below shows the share of time in which the device was
    busy.
    """
    return [_table(stage, profile.stages[stage]) for stage in _TITLES if stage in profile.stages]


def _table(stage: str, points: Sequence[StagePoint | SkippedPoint]) -> Table:
    title, row_name, column_name = _TITLES[stage]
    row_key, column_key = _COORDINATES[stage]
    columns = sorted({_at(point, column_key) for point in points})
    table = Table(title=title, title_justify="left", caption=_caption(points), caption_justify="left", pad_edge=False)
    table.add_column(row_name, justify="right")
    for column in columns:
        table.add_column(f"{column_name}\n{column}" if column_name else "ms", justify="right")
    cells = {(_at(point, row_key), _at(point, column_key)): _cell(point) for point in points}
    for row in sorted({_at(point, row_key) for point in points}):
        table.add_row(str(row), *(cells.get((row, column), "") for column in columns))
    return table


def _at(point: GridPoint, name: str) -> int:
    return point.at(name) if name else 0


def _caption(points: Sequence[StagePoint | SkippedPoint]) -> str | None:
    separated = [point for point in points if isinstance(point, StagePoint) and point.is_separated]
    if not separated or any(point.low_ms is not None for point in separated):
        return None
    gaps = any(point.device_ms_from == EVENTS for point in separated)
    words = "%: share of the time in which the device was busy; the rest is host time"
    return words + ("; (*) from CUDA events, including the gaps between kernels" if gaps else "")


def _cell(point: StagePoint | SkippedPoint) -> str:
    if isinstance(point, SkippedPoint):
        return point.left_out
    bound = "" if point.roofline_ms is None else f" ({_three_digits(point.roofline_ms)})"
    cell = f"{_three_digits(point.ms)}{bound}"
    if point.low_ms is not None and point.high_ms is not None:
        return f"{cell}\n{_three_digits(point.low_ms)} to {_three_digits(point.high_ms)}"
    return f"{cell}\n{_share(point)}" if point.is_separated else cell


def _share(point: StagePoint) -> str:
    return f"{point.turn_ms / point.ms:.0%}{'*' if point.device_ms_from == EVENTS else ''}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
