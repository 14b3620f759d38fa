"""The frame step of a staged deployment, predicted from its stages' service times, delays, batch limits and instances.

Every session cycles through the stages, one frame per round. The rounds are simulated, batch by batch; their mean time
at n sessions is the step time of a device, used to simulate sessions (``simulator``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from harness import wire
from harness.capacity.models.service import ServiceTime
from harness.capacity.models.steps import StepTime
from harness.capacity.simulator import frames as compiled_frames
from harness.capacity.simulator.layout import record, sources
from harness.capacity.simulator.pool import LONGEST_S, SHORTEST_S
from harness.errors import InconclusiveError, InputError
from harness.records.fit import FittedDeployment, FittedStage
from harness.topology import Knobs, frame_path, number_of, owner_of, topology_of

_STAGE = record(f8="alpha_s tau0_s delay_s host_s host_each_s", i8="max_batch free waiting head tail executions served")
_SESSION = record(f8="came_s made_s", i8="stage next frames")
_INSTANCE = record(f8="end_s", i8="stage head ahead_head ahead ahead_tail")
_LOOP = record(
    f8="hop_s apart_s wake_s host_s host_each_s gpu_free_s",
    i8="begun first on_way left frames warm_up one_gpu prefetch drawn spaced",
    i1=sources(),
)
_KNOBS = "delay_us", "max_batch", "instances"
ENGINE_BATCH = 64  # of the fused engine in the repository
_NOISES = 4096  # drawn once, then reused cyclically


@dataclass(frozen=True)
class StageModel:
    """A stage of a deployment: a batch of b takes alpha_s b + tau0_s seconds; the knobs are those of its Triton model.

    ``delay_s``: how long the first in the queue waits for a full batch of ``max_batch``. If the service time is GPU
    time only, an instance is also busy for host_s + host_each_s b seconds of host time.
    """

    name: str
    alpha_s: float
    tau0_s: float
    delay_s: float = 0.0
    max_batch: int = 32
    instances: int = 1
    host_s: float = 0.0
    host_each_s: float = 0.0

    def __post_init__(self) -> None:
        times = self.alpha_s, self.tau0_s, self.delay_s, self.host_s, self.host_each_s
        if not all(0 <= each <= LONGEST_S for each in times) or self.alpha_s + self.tau0_s < SHORTEST_S:
            raise InputError(
                f"{self.name}: times must be 0 to {LONGEST_S:g} s, and a batch of one at least {SHORTEST_S:g} s"
            )
        if self.max_batch < 1 or self.instances < 1:
            raise InputError(f"{self.name}: max_batch and instances must be 1 or more")

    @classmethod
    def of(cls, name: str, service: ServiceTime, **knobs: Any) -> StageModel:
        """From a fitted service time."""
        return cls(name, service.alpha_s, service.tau0_s, **knobs)

    def time_s(self, batch: float) -> float:
        return self.alpha_s * batch + self.tau0_s

    def alone_s(self) -> float:
        """Seconds of a batch of one, including host time."""
        return self.time_s(1) + self.host_s + self.host_each_s


@dataclass(frozen=True)
class Topology:
    """Stages in order; ``hop_s`` from each to the next.

    ``apart_s``: mean time (exponential) between the sessions of a batch on their way from the last stage to the first;
    the entry sends them one after another. ``wake_s``: how long a stage collects sessions at least before it takes
    them. Without both, a delay in one stage gathers all sessions in one batch for ever, which Triton's never does: on
    emulated stages such steps were predicted 20 to 25% too fast; with both, 3% (``benchmarks/capacity/heldout.py``).

    ``one_gpu``: executions of all stages take turns on one GPU; around its turn a stage is also busy for ``host_s``,
    and ``host_each_s`` per session in the batch, in addition to its own host times.

    ``prefetch``: as in Triton, a busy instance already takes its next batch. Sessions that arrive while that batch
    waits join the following one if the stage has no delay, and this very batch if it has one. Without it, ladders on
    emulated stages that take turns were predicted 14% too fast; with it, 3%.

    ``noise``: relative standard deviation of an execution's time (lognormal). Without any, rounds may lock into a
    pattern that does not last in reality.
    """

    stages: tuple[StageModel, ...]
    hop_s: float = 0.0
    one_gpu: bool = False
    noise: float = 0.05
    host_s: float = 0.0
    host_each_s: float = 0.0
    prefetch: bool = False
    apart_s: float = 0.0
    wake_s: float = 0.0

    def __post_init__(self) -> None:
        hops = self.hop_s, self.apart_s, self.wake_s, self.host_s, self.host_each_s
        if not self.stages or not (all(0 <= each <= LONGEST_S for each in hops) and 0 <= self.noise <= 1):
            raise InputError("a topology needs 1 stage or more, hops of 0 seconds or more, and noise of 0 to 1")

    @classmethod
    def of_fit(cls, fit: FittedDeployment, knobs: Knobs | None = None, **more) -> Topology:
        """The stages of a deployment of fit.json, with its knobs or, where given, those of ``knobs``.

        The fused engine is one stage, which has no batching delay: it batches all ready sessions immediately.

        Raises InconclusiveError where the service time of a stage is unknown.
        """
        services, turned = {each.stage: each for each in fit.stages}, {**fit.deployment, **(knobs or {})}
        stages = []
        for name in frame_path(turned):
            service = services.get(name)
            if not isinstance(service, FittedStage):
                reason = service.inconclusive if service else "no execution of it was counted"
                raise InconclusiveError(f"{name}: {reason}")
            owner = owner_of(name)
            own = {knob: number_of(turned, f"{owner}.{knob}", 0) for knob in _KNOBS if f"{owner}.{knob}" in turned}
            if name == wire.ENGINE:
                largest = max((point.batch_size for point in service.points), default=0)
                own.setdefault("max_batch", max(ENGINE_BATCH, largest))  # on a GPU the limit is higher
            delay_s = own.pop("delay_us", 0) / 1e6
            stages.append(StageModel(name, service.alpha_s, service.tau0_s, delay_s, **own))
        return cls(tuple(stages), **({"prefetch": topology_of(turned) == wire.STAGED} | more))

    def completed(self, step_time: StepTime) -> Topology:
        """Add the time of a measured single-session step beyond its stages and delays.

        It is divided among the hops between stages; with a single stage it is the time between two turns of its loop.
        """
        if len(self.stages) > 1:
            return replace(self, hop_s=hop_of(step_time, self))
        return replace(self, host_s=self.host_s + hop_of(step_time, self))

    def alone_s(self) -> float:
        """Seconds of a frame of a single session: it waits out every delay, unless a batch of one is full."""
        between_s = self.hop_s + self.host_s + self.host_each_s
        waits_s = (max(each.delay_s, self.wake_s) if each.max_batch > 1 else 0.0 for each in self.stages)
        return sum(each.alone_s() + between_s for each in self.stages) + sum(waits_s)


def hop_of(step_time: StepTime, topology: Topology) -> float:
    """Seconds of a hop: the rest of a measured single-session step beyond its stages and delays, per hop."""
    return max(float(step_time(1)) - topology.alone_s(), 0.0) / len(topology.stages)


@dataclass(frozen=True, eq=False)
class Rounds:
    """Times between frames at some number of sessions: ``gaps_s`` [sessions, frames]; mean batch of each stage."""

    gaps_s: np.ndarray
    mean_batch: tuple[float, ...]

    @property
    def step_s(self) -> float:
        return float(self.gaps_s.mean())


class _Arrays(NamedTuple):
    loop: np.ndarray
    stages: np.ndarray
    sessions: np.ndarray
    instances: np.ndarray
    coming: np.ndarray
    noise: np.ndarray
    apart: np.ndarray
    gaps_s: np.ndarray


def rounds(
    topology: Topology, sessions: int, rng: np.random.Generator, *, frames: int = 200, warm_up: int = 50
) -> Rounds:
    """Simulate sessions with random starts within a round, for ``frames`` frames each after the warm-up."""
    if sessions < 1 or frames < 1 or warm_up < 0:
        raise InputError("rounds need 1 session and 1 frame or more, after a warm-up of 0 or more")
    arrays = _arrays(topology, sessions, frames, warm_up)
    arrays.sessions["came_s"] = np.sort(rng.random(sessions)) * topology.alone_s()
    sigma = math.sqrt(math.log1p(topology.noise**2))
    arrays.noise[:] = rng.lognormal(-(sigma**2) / 2, sigma, len(arrays.noise)) if sigma else 1.0
    if topology.apart_s:
        arrays.apart[:] = rng.exponential(1.0, len(arrays.apart))
    compiled_frames.run(arrays)
    return Rounds(arrays.gaps_s, tuple((arrays.stages["served"] / arrays.stages["executions"]).tolist()))


def _arrays(topology: Topology, sessions: int, frames: int, warm_up: int) -> _Arrays:
    stages = np.zeros(len(topology.stages), _STAGE)
    for number, each in enumerate(topology.stages):
        for name in ("alpha_s", "tau0_s", "delay_s", "host_s", "host_each_s", "max_batch"):
            stages[number][name] = getattr(each, name)
        stages[number]["free"] = each.instances * (1 + topology.prefetch)
    instances = np.zeros(sum(each.instances for each in topology.stages), _INSTANCE)
    instances["stage"] = np.repeat(np.arange(len(stages)), [each.instances for each in topology.stages])
    instances["end_s"] = math.inf
    loop = np.zeros(1, _LOOP)
    for name in ("hop_s", "apart_s", "wake_s", "host_s", "host_each_s", "one_gpu", "prefetch"):
        loop[name] = getattr(topology, name)
    loop["frames"], loop["warm_up"], loop["left"] = frames + warm_up, warm_up, sessions
    noise = np.ones(_NOISES if topology.noise else 1)
    apart = np.ones(_NOISES if topology.apart_s else 1)
    coming, gaps_s = np.zeros(sessions, np.int64), np.zeros((sessions, frames))
    return _Arrays(loop, stages, np.zeros(sessions, _SESSION), instances, coming, noise, apart, gaps_s)


def staged_step_time(topology: Topology, most_sessions: int, rng: np.random.Generator, starts: int = 4) -> StepTime:
    """The step time of the deployment at 1 to ``most_sessions``: the mean round at several numbers, interpolated.

    Each is the mean of several ``starts``: the start times of sessions may determine for long how they share batches.
    """
    knots = step_knots(most_sessions, [each.max_batch for each in topology.stages])
    values = [float(np.mean([rounds(topology, n, rng).step_s for _ in range(starts)])) for n in knots]
    if len(knots) == 1:
        return StepTime("linear", (values[0], 0.0))
    return StepTime("piecewise", tuple(values), tuple(map(float, knots)))


def step_knots(most_sessions: int, max_batches: Sequence[int]) -> list[int]:
    """Numbers of sessions to simulate: every one up to 8, then 15% apart; and those around full batches."""
    knots, n = {1, most_sessions}, 1
    while n < most_sessions:
        knots.add(n)
        n = n + 1 if n < 8 else math.ceil(n * 1.15)
    for batch in max_batches:
        knots |= {batch, batch + 1, 2 * batch, 2 * batch + 1}
    return sorted(each for each in knots if each <= most_sessions)
