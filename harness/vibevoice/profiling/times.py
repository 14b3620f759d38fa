"""The time of a stage, interpolated linearly between the points of a profile, and extrapolated beyond the last."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from harness import wire
from harness.content import parsed
from harness.device_profile import PREFILL, Profile, StagePoint
from harness.errors import InputError

NOT_SEPARATED = "wall time, not separated from the host's"
Points = Mapping[str, Sequence[StagePoint]]  # by stage


class Curve:
    """Milliseconds over one quantity: linear between points; beyond the last, the line of the last two.

    Below the first point, the first point's time; beyond the last point, at least the last point's time.
    """

    def __init__(self, points: Iterable[tuple[float, float]]):
        self.x, self.y = map(np.array, zip(*sorted(dict(points).items()), strict=True))

    def at(self, x: float) -> float:
        if x <= self.x[-1] or len(self.x) == 1:
            return float(np.interp(x, self.x, self.y))
        slope = (self.y[-1] - self.y[-2]) / (self.x[-1] - self.x[-2])
        return float(self.y[-1] + max(0.0, slope) * (x - self.x[-1]))


class Surface:
    """Milliseconds over two quantities, linear in each between points: one curve over the second for each first."""

    def __init__(self, points: Iterable[tuple[float, float, float]]):
        rows: dict[float, list] = {}
        for first, second, ms in points:
            rows.setdefault(first, []).append((second, ms))
        self.curves = {first: Curve(row) for first, row in rows.items()}

    def covers(self, first: float, second: float) -> bool:
        """Whether a pair lies within the points; those of a large batch may end at a smaller context than others."""
        if first > max(self.curves):
            return False
        near = max((x for x in self.curves if x <= first), default=first), min(x for x in self.curves if x >= first)
        return all(second <= self.curves[x].x[-1] for x in near if x in self.curves)

    def at(self, first: float, second: float) -> float:
        return Curve((x, curve.at(second)) for x, curve in self.curves.items()).at(first)


class Times:
    """Milliseconds of every stage over its points; ``ms_of`` selects the wall time of a point or the device's part."""

    def __init__(self, points: Points, ms_of: Callable[[StagePoint], float]):
        usual = [p for p in points[wire.DIFFUSION] if p.steps == wire.DEFAULT_DIFFUSION_STEPS]
        self._step = Surface((p.at("batch"), p.at("context"), ms_of(p)) for p in points[wire.LLM])
        self._prefill = Surface((p.at("tokens"), p.at("context"), ms_of(p)) for p in points[PREFILL])
        self._denoise = Curve((p.at("batch"), ms_of(p)) for p in usual)
        shares = [(p.at("steps"), ms_of(p) / self._denoise.at(p.at("batch"))) for p in points[wire.DIFFUSION]]
        self._steps = Curve([(0, 0.0), *shares])  # relative to the time of the default number of steps
        self._vocode = Curve((p.at("batch"), ms_of(p)) for p in points[wire.VOCODER])
        self._encode = Curve((p.at("seconds"), ms_of(p)) for p in points[wire.VOICE])

    def step_ms(self, contexts: Sequence[int]) -> float:
        """A frame step of the LLM for sessions of these contexts (positions of both branches)."""
        at = len(contexts), sum(contexts) / len(contexts)
        self._check("a frame step", at, self._step.covers(*at))
        return self._step.at(*at)

    def prefill_ms(self, tokens: int, context: int) -> float:
        """A prompt part of ``tokens`` after ``context`` positions."""
        self._check("a prompt part", (tokens, context), self._prefill.covers(tokens, context))
        return self._prefill.at(tokens, context)

    def denoise_ms(self, steps: Sequence[int]) -> float:
        """One frame per row, with these numbers of steps; rows with the same number are computed together."""
        groups = [(count, len(list(rows))) for count, rows in itertools.groupby(sorted(steps))]
        return sum(self._on(self._denoise, "diffusion", rows) * self._steps.at(count) for count, rows in groups)

    def vocode_ms(self, batch: int) -> float:
        """A frame of ``batch`` sessions."""
        return self._on(self._vocode, "the vocoder", batch)

    def encode_ms(self, seconds: float) -> float:
        """A voice sample of this many seconds."""
        return self._on(self._encode, "the voice encoder", seconds)

    def _on(self, curve: Curve, what: str, x: float) -> float:
        self._check(what, (x,), x <= curve.x[-1])
        return curve.at(x)

    def _check(self, what: str, at: tuple[float, ...], covered: bool) -> None:
        """Called with every requested time, and whether it lies within the points."""


class ProfiledTimes(Times):
    """The wall times of every stage in a profile's file; ``device``: the device's part of them.

    A profile without ``device_ms`` (an older one) does not separate the parts: all of its time counts as device time,
    and ``basis`` says so. ``sizes``: of the model that was measured; ``device_name``, ``dtype``: on what, and in which
    type. Raises InputError for a file that is not a profile.
    """

    def __init__(self, path: Path | str):
        self.path = path
        self._told: set[str] = set()
        try:
            profile = Profile.of(parsed(Path(path).read_text()))
            points = {stage: profile.timed(stage) for stage in (*wire.STAGES, wire.VOICE, PREFILL)}
            super().__init__(points, lambda point: point.ms)
            self.device = Times(points, lambda point: point.turn_ms)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{path} is not a profile that can be emulated: {error}; make one with `harness profile`"
            ) from None
        self.sizes, self.device_name, self.dtype = profile.model, profile.device, profile.dtype
        self.basis = _basis(points)

    def parts_ms(self, time_of: Callable[[Times], float]) -> tuple[float, float]:
        """Host and device milliseconds of a call; their sum is its wall time."""
        ms = time_of(self)
        device_ms = min(ms, time_of(self.device))
        return ms - device_ms, device_ms

    def _check(self, what: str, at: tuple[float, ...], covered: bool) -> None:
        """Print, once per stage, that a time lies outside the measured points."""
        if not covered and what not in self._told:
            self._told.add(what)
            place = ", ".join(f"{value:.0f}" for value in at)
            print(f"{self.path}: {what} at ({place}) lies beyond what was measured: extrapolated", flush=True)


def _basis(points: Points) -> str:
    sources = sorted({point.device_ms_from or NOT_SEPARATED for rows in points.values() for point in rows})
    return f"device times from: {', '.join(sources)}"
