"""Spaces of deployments with an exhaustive truth: every point on an emulated server, its ladder without noise."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from emulated_server import Server, observe

from harness import wire
from harness.capacity.models.steps import StepTime
from harness.records.fit import Fit, FittedStage
from harness.records.schema import BatchStatistics, Rung, StageStatistics
from harness.records.summary import Summary
from harness.sweep.optimizer.objective import Value
from harness.sweep.optimizer.physics import MeasuredLadder
from harness.sweep.optimizer.space import Space
from harness.vibevoice.profiling.roofline import Roofline
from harness.vibevoice.profiling.times import ProfiledTimes
from harness.vibevoice.stages.configuration import preset_config

SESSIONS = 1, 4, 8, 16, 32, 48, 64
ROOT = Path(__file__).resolve().parents[2]
FIT = ROOT / "results" / "sample-quick" / "fit.json"
PROFILE = ROOT / "results" / "profiles" / "amd-epyc-tiny.json"
_FRAMES, _STARTS = 100, 3  # of every rung of the truth
_TRIAL_NOISE, _RUNG_NOISE = 0.025, 0.01  # relative standard deviations
_DEFAULTS = {"delay_us": 0, "preferred_batch": 0, "max_batch": 32, "instances": 1}
GPU_GB_S, GPU_TFLOP_S = 3350, 495  # an H100 SXM by its data sheet: HBM3, dense BF16 halved
_DELAYS = 0, 500, 1000, 2000, 5000, 10_000, 25_000


@dataclass(frozen=True)
class SpeechSlos:
    """Frames/s at the most sessions that meet two SLOs, interpolated between the rungs of a ladder.

    A step takes at most ``step_s``; first audio comes after ``prefill_s`` and the steps of a first chunk of
    ``chunk_frames`` and one more, at most ``first_s`` in total.
    """

    step_s: float = 0.12
    first_s: float = math.inf
    prefill_s: float = 0.1

    def of(self, step: StepTime, chunk_frames: int = 1) -> float:
        sessions = np.linspace(1, SESSIONS[-1], 505)
        taken_s = step(sessions)
        kept = (taken_s <= self.step_s) & (self.prefill_s + (1 + chunk_frames) * taken_s <= self.first_s)
        reach = len(kept) if kept.all() else int(np.argmin(kept))
        return float(np.max(sessions[:reach] / taken_s[:reach], initial=0.0))

    def expecting(
        self, values: Sequence[Value], ladders: Sequence[MeasuredLadder]
    ) -> Callable[[StepTime, Mapping], float]:
        return lambda step, point: self.of(step, point.get("chunk_frames", 1))


SPEECH = SpeechSlos()


@dataclass(frozen=True)
class Emulated:
    """A space, and the server of each of its points. ``figures``: the source of its times."""

    name: str
    figures: str
    space: Mapping[str, Sequence]
    server: Callable[[Mapping], Server]
    slos: SpeechSlos = SPEECH

    @cached_property
    def points(self) -> Space:
        columns = [[_part(knob, value) for value in values] for knob, values in self.space.items()]
        return Space(tuple(map(tuple, columns)))

    @cached_property
    def rungs(self) -> list[list[Rung]]:
        """The ladder of every point without noise; cached in a file until the code or its figures change."""
        path = ROOT / ".harness" / f"truth-{self.name}-{_digest()}.pickle"
        if not path.exists():
            made = [
                [self._rung(self.points.point(n), sessions) for sessions in SESSIONS] for n in range(self.points.size)
            ]
            path.parent.mkdir(exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_bytes(pickle.dumps(made))
            beside.replace(path)
        return pickle.loads(path.read_bytes())

    @cached_property
    def truth(self) -> np.ndarray:
        """The value of every point."""
        return np.array([self.slos.of(_step_time(ladder), self._chunk(n)) for n, ladder in enumerate(self.rungs)])

    def trial(self, number: int, seed: int) -> tuple[tuple[Rung, ...], float]:
        """The ladder and the value of a point in one trial; a trial with the same seed is always the same."""
        rng = np.random.default_rng([seed, number])
        whole = math.exp(_TRIAL_NOISE * rng.standard_normal())
        noisy = [_slowed(rung, whole * math.exp(_RUNG_NOISE * rng.standard_normal())) for rung in self.rungs[number]]
        return tuple(noisy), self.slos.of(_step_time(noisy), self._chunk(number))

    def _chunk(self, number: int) -> int:
        return self.points.point(number).get("chunk_frames", 1)

    def _rung(self, point: Mapping, sessions: int) -> Rung:
        server = self.server(point)
        seen = [observe(server, sessions, 1000 * sessions + start, _FRAMES) for start in range(_STARTS)]
        step_s = float(np.mean([each.step_s for each in seen]))
        executions, busy_s = sum(each.executions for each in seen), sum(each.busy_s for each in seen)
        stages = tuple(_counted(name, executions[row], busy_s[row]) for row, name in enumerate(wire.STAGES, start=1))
        return Rung(sessions, sessions / step_s, 0, 1, Summary(step_s=step_s), stages)


def spaces(quick: bool = False) -> list[Emulated]:
    """All spaces, reduced if ``quick``."""
    made = [_host(), _profile(), _device("1.5b", 8), _device("7b", 16), _chunks(), _held_out()]
    return made[:2] if quick else made


def _host() -> Emulated:
    """Stages as fitted in the sample run, on two cores shared by everything."""
    fit = Fit.of(json.loads(FIT.read_text())).deployments[2]
    times = {each.stage: each for each in fit.stages if isinstance(each, FittedStage)}
    batch_s = [_line(times[name].alpha_s, times[name].tau0_s) for name in wire.STAGES]
    space = {
        "delay_us": (0, 1000, 2000, 5000, 10_000, 25_000), f"{wire.DIFFUSION}.instances": (1, 2, 3),
        f"{wire.VOCODER}.instances": (1, 2), "max_batch": (8, 16, 32),
    }  # fmt: skip
    return _emulated("host", _source(FIT), space, batch_s, entry_s=5e-4, hop_s=3e-4, cores=2, interference=0.1)


def _profile() -> Emulated:
    """Measured batch times with all their steps, a separate delay for each stage, preferred batches."""
    profile = ProfiledTimes(PROFILE)
    batch_s = [
        _table(lambda b: 4e-3 * profile.step_ms([7600] * b)), _table(lambda b: 4e-3 * profile.denoise_ms([10] * b)),
        _table(lambda b: 2e-3 * profile.vocode_ms(b)),
    ]  # fmt: skip
    space = {
        f"{wire.LLM}.delay_us": (0, 1000, 5000, 20_000), f"{wire.DIFFUSION}.delay_us": (0, 1000, 5000, 20_000),
        f"{wire.VOCODER}.delay_us": (0, 1000, 5000, 20_000), f"{wire.VOCODER}.preferred_batch": (0, 8, 16),
    }  # fmt: skip
    return _emulated("profile", _source(PROFILE), space, batch_s, entry_s=4e-4, hop_s=2.5e-4, cores=4)


def _device(preset: str, tile: int) -> Emulated:
    """Stages at twice their roofline on one GPU, padded to whole tiles (steps); instances slow each other down."""
    space = {
        "delay_us": _DELAYS, "max_batch": (8, 16, 32, 64), f"{wire.LLM}.instances": (1, 2),
        f"{wire.DIFFUSION}.instances": (1, 2, 3),
    }  # fmt: skip
    batch_s, figures = _roofline(preset, tile)
    return _emulated(
        f"device-{preset}", figures, space, batch_s, entry_s=3e-4, hop_s=4e-4, cores=8, devices=1, interference=0.15
    )


def _roofline(preset: str, tile: int) -> tuple[list[np.ndarray], str]:
    """Batch times of the stages on a GPU, and where they come from."""
    roofline, context, state = Roofline(preset_config(preset), 2), 2 * 12_000, 300_000

    def seconds(cost) -> float:
        return 2e-3 * cost.floor_ms(GPU_GB_S, GPU_TFLOP_S) + 4e-4  # and the launch of its kernels

    def padded(batch: int) -> int:
        return math.ceil(batch / tile) * tile

    batch_s = [
        _table(lambda b: seconds(roofline.step(padded(b), context))),
        _table(lambda b: seconds(roofline.denoise(padded(b), 10)) + 10 * 3e-4),
        _table(lambda b: seconds(roofline.vocode(padded(b), state))),
    ]
    return batch_s, f"the roofline of preset {preset} at {GPU_GB_S} GB/s and {GPU_TFLOP_S} TFLOP/s, times 2"


def _chunks() -> Emulated:
    """A tight SLO on first audio: large chunks save sends but start late; the best is inside the space."""
    profile = ProfiledTimes(PROFILE)
    batch_s = [
        _table(lambda b: 3e-3 * profile.step_ms([7600] * b)), _table(lambda b: 3e-3 * profile.denoise_ms([10] * b)),
        _table(lambda b: 1.5e-3 * profile.vocode_ms(b)),
    ]  # fmt: skip
    space = {
        "chunk_frames": (1, 2, 4, 8), "diffusion_steps": (8, 10, 14), "delay_us": (0, 1000, 3000, 10_000),
        f"{wire.DIFFUSION}.preferred_batch": (0, 8), "entry.instances": (1, 2),
    }  # fmt: skip
    slos = SpeechSlos(first_s=0.55)
    return _emulated(
        "chunks", _source(PROFILE), space, batch_s, slos, entry_s=8e-4, hop_s=2.5e-4, cores=3,
        send_s=2.5e-3,
    )  # fmt: skip


def _held_out() -> Emulated:
    """Not used while developing the search: two GPUs behind a small host shared by entry and hops, early audio."""
    batch_s, figures = _roofline("1.5b", 4)
    space = {
        "chunk_frames": (1, 2, 4), "entry.instances": (1, 2, 4), f"{wire.DIFFUSION}.delay_us": (0, 2000, 10_000),
        "diffusion_steps": (8, 10), f"{wire.LLM}.max_batch": (16, 64), f"{wire.VOCODER}.instances": (1, 2),
    }  # fmt: skip
    return _emulated(
        "held-out", figures, space, batch_s, SpeechSlos(step_s=0.1, first_s=0.5), entry_s=6e-4, hop_s=3e-4, cores=2.5,
        devices=2, interference=0.25, send_s=1.2e-3,
    )  # fmt: skip


def _emulated(
    name: str, figures: str, space: Mapping, batch_s: list[np.ndarray], slos: SpeechSlos = SPEECH, *,
    entry_s: float, hop_s: float, cores: float, devices: float = 0.0, interference: float = 0.05, send_s: float = 0.0,
) -> Emulated:  # fmt: skip
    def server(point: Mapping) -> Server:
        def knobs(knob: str, of_entry: float) -> np.ndarray:
            return np.array([of_entry, *(point.get(f"{stage}.{knob}", _DEFAULTS[knob]) for stage in wire.STAGES)])

        entry = np.full(SESSIONS[-1] + 1, entry_s + send_s / point.get("chunk_frames", 1))
        steps = np.array([1.0, 1.0, point.get("diffusion_steps", 10) / 10, 1.0])
        tables = np.stack([entry, *batch_s]) * steps[:, None]
        instances = knobs("instances", point.get("entry.instances", 1))
        return Server(
            tables, knobs("delay_us", 0) / 1e6, knobs("preferred_batch", 0), knobs("max_batch", 1), instances,
            hop_s, cores, devices, interference,
        )  # fmt: skip

    return Emulated(name, figures, space, server, slos)


def _line(alpha_s: float, tau0_s: float) -> np.ndarray:
    return _table(lambda batch: alpha_s * batch + tau0_s)


def _table(seconds: Callable[[int], float]) -> np.ndarray:
    """Seconds of batches up to the most sessions; that of size 0 is not used."""
    return np.array([0.0, *(seconds(batch) for batch in range(1, SESSIONS[-1] + 1))])


def _source(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _digest() -> str:
    sources = (Path(__file__), Path(__file__).with_name("emulated_server.py"), FIT, PROFILE)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def _part(knob: str, value) -> dict:
    """What a value sets; a bare knob applies to all stages."""
    return {f"{stage}.{knob}": value for stage in wire.STAGES} if knob in _DEFAULTS else {knob: value}


def _step_time(rungs: Sequence[Rung]) -> StepTime:
    steps = tuple(rung.sessions / rung.frames_per_s for rung in rungs)
    return StepTime("piecewise", steps, tuple(float(rung.sessions) for rung in rungs))


def _slowed(rung: Rung, factor: float) -> Rung:
    stages = tuple(
        replace(
            stage, batches=tuple(replace(each, compute_ns=round(each.compute_ns * factor)) for each in stage.batches)
        )
        for stage in rung.stages
    )
    return replace(rung, frames_per_s=rung.frames_per_s / factor, stages=stages)


def _counted(name: str, executions: np.ndarray, busy_s: np.ndarray) -> StageStatistics:
    sizes = np.flatnonzero(executions)
    batches = tuple(BatchStatistics(int(b), int(executions[b]), round(1e9 * busy_s[b])) for b in sizes)
    requests = int(sizes @ executions[sizes])
    return StageStatistics(name, requests, int(executions.sum()), 0, round(1e9 * busy_s.sum()), batches)
