"""What ``heldout.py`` learns from its fitted ladders: what a host adds to the stage times of a GPU, and a device of any
deployment at any mean context.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import stand_in
from heldout_cases import FITTED, Case

from harness import wire
from harness.capacity.fitting.contexts import context_of
from harness.capacity.fitting.fit import fit_run
from harness.capacity.models import memory
from harness.capacity.models.device import Device
from harness.capacity.planning.device_types import DeviceType
from harness.capacity.planning.staged import Rounds, Topology, rounds, staged_step_time
from harness.device_profile import Profile
from harness.planfile.plan import PlanSpec
from harness.records.schema import Trial
from harness.sweep.optimizer.surrogate import Surrogate

# Milliseconds that are tried, of a topology
BETWEEN_MS = {
    "hop_s": (0.4, 0.8, 1.2, 1.6),
    "apart_s": (0.0, 0.15, 0.3, 0.5, 0.8),
    "wake_s": (0.0, 0.15, 0.3, 0.5, 0.8),
    "host_each_s": (0.0, 0.2, 0.4),
}
# Steps alone do not tell sessions in one batch that wait for a delay from sessions in several that wait for the GPU
BATCH_WEIGHT = 0.3  # of relative errors of mean batches, beside those of steps
RUNG_ERROR = 0.03  # relative, of the step of one rung
MOST = 48  # sessions of a GPU that are modelled
GPU_TYPE = DeviceType.of_profile(Profile.of(stand_in.profile()))
VOICE_FRAMES = 160  # of the two speakers of a session


@dataclass(frozen=True)
class Model:
    """What the ladders said: devices as fitted; what the host adds to the GPU, the ``between`` of its topology; and
    what is left of the step time, over the knobs and the sessions.

    ``off``, ``batches_off``: root mean squares of log(modelled / measured) steps and mean batches.
    """

    devices: tuple[Device, ...]
    between: dict[str, float]
    rest: Surrogate
    off: float
    batches_off: float

    @classmethod
    def of(cls, trials: Sequence[Trial], requests: pd.DataFrame, spec: PlanSpec) -> Model:
        fit = fit_run(trials, requests, spec.traffic_mix(), spec.slo_list(), np.random.default_rng(1), stand_in.NAME)
        devices = tuple(Device.from_fit(each) for each in fit.deployments)
        measured = np.log([_step_s(rung) for trial in trials for rung in trial.rungs])
        batches = np.log([_batches(rung) for trial in trials for rung in trial.rungs])
        rungs = [(trial, rung, mean_context(trial, requests, spec)) for trial in trials for rung in trial.rungs]
        found = []
        for values in itertools.product(*(np.array(each) / 1e3 for each in BETWEEN_MS.values())):
            between = dict(zip(BETWEEN_MS, map(float, values), strict=True))
            shown = [_shown(GPU_TYPE.topology(t.deployment, context, **between), r) for t, r, context in rungs]
            modelled = np.log([each[0] for each in shown])
            off, batches_off = _rms(modelled - measured), _rms(np.log([each[1] for each in shown]) - batches)
            found.append((math.hypot(off, BATCH_WEIGHT * batches_off), off, batches_off, between, modelled))
        _, off, batches_off, between, modelled = min(found, key=lambda each: each[0])
        where = np.array([_place(trial.deployment, rung.sessions) for trial, rung, _ in rungs])
        rest = Surrogate.fit(where, modelled, measured, np.full(len(measured), RUNG_ERROR), np.random.default_rng(2))
        return cls(devices, between, rest, off, batches_off)

    def device(self, case: Case, context: float) -> Device:
        """One GPU of a held-out case whose sessions have ``context`` tokens on average; requests vary as those of the
        fitted deployment with the nearest delay.
        """
        topology = GPU_TYPE.topology(case.knobs, context, **self.between)
        step_time = staged_step_time(topology, MOST, np.random.default_rng(0), starts=8)
        places = np.array([_place(case.knobs, sessions) for sessions in step_time.knots])
        logarithms, _ = self.rest.moments(places, np.log(step_time.values))
        step_time = replace(step_time, values=tuple(np.exp(logarithms).tolist()))
        distances = [abs(_mean_delay(case.knobs) - _mean_delay(knobs)) for knobs in FITTED]
        near = self.devices[int(np.argmin(distances))]
        return replace(near, step_time=step_time, draws=(), max_sessions=float(MOST))


def _mean_delay(knobs: dict) -> float:
    return float(np.mean([knobs.get(f"{stage}.delay_us", 0) for stage in wire.STAGES]))


def _rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def _step_s(rung) -> float:
    """Seconds of a frame step at a rung."""
    return rung.sessions / rung.frames_per_s


def _batches(rung) -> list[float]:
    """Mean batch of each stage at a rung."""
    counted = {each.stage: each.requests / each.executions for each in rung.stages if each.executions}
    return [counted[stage] for stage in wire.STAGES]


def _shown(topology: Topology, rung) -> tuple[float, np.ndarray]:
    """Modelled seconds of a step, and the mean batch of each stage."""
    rng = np.random.default_rng(0)
    shown: list[Rounds] = [rounds(topology, max(round(rung.sessions), 1), rng) for _ in range(4)]
    return float(np.mean([each.step_s for each in shown])), np.mean([each.mean_batch for each in shown], axis=0)


def _place(knobs: dict, sessions: float) -> list[float]:
    """Coordinates of a rung for the Gaussian process: delays, instances and batch limits by stage; sessions."""
    delay = [knobs.get(f"{stage}.delay_us", 0) / 25_000 for stage in wire.STAGES]
    instances = [math.log2(knobs.get(f"{stage}.instances", 1)) for stage in wire.STAGES]
    batch = [math.log2(knobs.get(f"{stage}.max_batch", 32) / 32) / 5 for stage in wire.STAGES]
    return [*delay, *instances, *batch, math.log2(sessions) / 5]


def steady_context(spec: PlanSpec) -> float:
    """Mean context, in tokens, of a session found in progress: its prompt, and two per frame spoken so far."""
    rng, mix = np.random.default_rng(5), spec.traffic_mix()
    draws = [mix.sample_in_progress(rng) for _ in range(4000)]
    return float(np.mean([memory.prompt_tokens(d.frames, VOICE_FRAMES) + 2 * d.phase for d in draws]))


def mean_context(trial: Trial, requests: pd.DataFrame, spec: PlanSpec) -> float:
    """Mean context, in tokens, that the sessions of a trial had: a seed draws them, no model does."""
    own = requests[requests["trial_id"] == trial.trial_id]
    frames = context_of(list(trial.rungs), own).sum() / sum(rung.sessions for rung in trial.rungs)
    return _prompt_tokens(spec) + 2 * float(frames)


def contexts_of_rungs(trials: Sequence[Trial], requests: pd.DataFrame, spec: PlanSpec) -> dict[int, float]:
    """Mean context, in tokens, of the sessions of each rung, by the rung's start."""
    found, prompt = {}, _prompt_tokens(spec)
    for trial in trials:
        frames = context_of(list(trial.rungs), requests[requests["trial_id"] == trial.trial_id])
        found |= {r.start_ns: prompt + 2 * float(k) / r.sessions for r, k in zip(trial.rungs, frames, strict=True)}
    return found


def _prompt_tokens(spec: PlanSpec) -> float:
    rng, mix = np.random.default_rng(6), spec.traffic_mix()
    draws = [mix.sample_in_progress(rng) for _ in range(1000)]
    return float(np.mean([memory.prompt_tokens(each.frames, VOICE_FRAMES) for each in draws]))


def offered_context(start_frames: np.ndarray, frames: np.ndarray, start_s: np.ndarray, end_s: np.ndarray,
                    seconds: float) -> float:  # fmt: skip
    """Mean context, in tokens, over [0, seconds) of requests [N] whose sessions last from start_s to end_s."""
    begin_s, stop_s = np.clip(start_s, 0, seconds), np.clip(end_s, 0, seconds)
    inside_s = np.maximum(stop_s - begin_s, 0.0)
    share = np.clip(((begin_s + stop_s) / 2 - start_s) / np.maximum(end_s - start_s, 1e-9), 0, 1)
    prompt = np.array([memory.prompt_tokens(round(each), VOICE_FRAMES) for each in frames])
    return float(np.average(prompt + 2 * (start_frames + frames * share), weights=inside_s))
