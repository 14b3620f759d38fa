"""A pool of equal devices as one states it: steps, limits, queue, routing, and what happens to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.capacity.models.device import Device
from harness.capacity.simulator import compiled as names
from harness.errors import InputError

StepTime = Callable[[np.ndarray], np.ndarray]

ROUTINGS = ("shared", "least_loaded", "round_robin", "random")
ON_FAILURE = ("lose", "restart", "resume")
ACTIONS = {"fail": names.FAIL, "repair": names.REPAIR, "drain": names.DRAIN, "raise": names.RAISE}
SHORTEST_S, LONGEST_S = 1e-9, 1e6  # of a step or a batch: beyond them, sums of times lose what was before
TOKENS_PER_FRAME = 2  # one in the branch with the prompt, one in the branch without


@dataclass(frozen=True)
class Planned:
    """At ``at_s``, ``device`` fails (unless it is off), is repaired (if it failed), drained, or raised (to service)."""

    at_s: float
    action: str
    device: int

    def __post_init__(self) -> None:
        if self.action not in ACTIONS or not math.isfinite(self.at_s):
            raise InputError(f"a device can {', '.join(ACTIONS)} at a time, not {self.action!r} at {self.at_s}")


@dataclass(frozen=True)
class Autoscaler:
    """A threshold policy, evaluated every ``every_s`` seconds.

    Load is sessions (in progress and waiting) per device (up and starting). Above ``high`` or below ``low`` the pool
    goes to ceil(sessions / target) devices, within ``least`` to ``most``: draining devices return at once if it
    ``recalls`` them, others are up ``lag_s`` later; the least loaded are drained, or the ``newest`` if it says so,
    ``hold_s`` or more after the last change.

    With ``stabilise_s`` it goes down to no fewer than it wished for at any evaluation in that time before, as
    Kubernetes does. ``floors``: rows of (seconds, devices), ascending; from each time on it wishes for at least
    so many. ``least`` to ``most`` are up or starting; ``places``: of all devices, draining and failed ones too (None:
    ``most``, so that each of those delays a new one).
    """

    least: int
    most: int
    target: float
    high: float
    low: float
    every_s: float = 60.0
    lag_s: float = 300.0
    hold_s: float = 600.0
    stabilise_s: float = 0.0
    recalls: bool = True
    newest: bool = False
    floors: tuple[tuple[float, int], ...] = ()
    places: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InputError(f"an autoscaler for {self.least} to {self.most} devices: minimum 1, maximum not below it")
        if self.places is not None and self.places < self.most:
            raise InputError(f"an autoscaler of at most {self.most} devices needs as many places, not {self.places}")
        if not 0 <= self.low < self.target <= self.high < math.inf:
            raise InputError(
                f"low {self.low:g}, target {self.target:g} and high {self.high:g} sessions a device must be in order"
            )
        if not (0 < self.every_s < math.inf and 0 <= self.lag_s < math.inf and 0 <= self.hold_s < math.inf):
            raise InputError("an autoscaler's every_s must be above 0; its lag_s and hold_s must be 0 or more")
        if not 0 <= self.stabilise_s < math.inf:
            raise InputError("an autoscaler's stabilise_s must be 0 or more, and finite")
        times_s = [at_s for at_s, _ in self.floors]
        if times_s != sorted(times_s) or any(devices < 0 for _, devices in self.floors):
            raise InputError("an autoscaler's floors are in order of time, each of 0 devices or more")

    @property
    def wishes(self) -> int:
        """The number of evaluations, the present one included, whose wishes count."""
        return math.floor(self.stabilise_s / self.every_s) + 1


@dataclass(frozen=True)
class Pool:
    """``devices`` equal ones; a frame step with n sessions and K tokens in all takes step_time(n) + token_s(n) K.

    ``token_s`` is a number or a function of n, in seconds per token; a session grows by ``tokens_per_frame``. At most
    ``session_limit`` sessions run on a device, and the bytes reserved for them are at most ``memory_bytes``.

    ``routing``: "shared": one queue in front of the pool; its first goes to the device with the fewest sessions or, if
    that has no room, to the one with the most free bytes. "least_loaded", "round_robin", "random": a session goes to
    a device at once, and waits in that device's queue. Queues are first come, first served: nobody overtakes
    a session for which there is no room. Beyond ``queue_limit`` sessions in a queue, or after ``patience_s`` in it, a
    session is rejected as busy. (The server's own queue is that of a device.)

    ``first_audio`` = (seconds, steps) from the start of a session. Playback starts ``start_buffer_s`` later.
    ``on_failure``: sessions on a device that fails, queued ones too, are lost; or they join the end of the queue again,
    to ``restart`` from the first frame or ``resume`` where they were. ``planned``: failures, drains, returns.

    Tasks (arrivals with segments) run in what streams leave of ``shared_sessions``, at most ``task_slots`` at once, and
    always resume. One holds its session from its claim: for ``first_audio`` before its first frame is made, and for
    ``between_segments`` = (seconds, seconds per frame spoken before) at the start of each later segment.
    """

    devices: int
    step_time: StepTime
    token_s: float | StepTime = 0.0
    session_limit: int | None = None
    memory_bytes: float = math.inf
    routing: str = "shared"
    queue_limit: int | None = None
    patience_s: float = math.inf
    first_audio: tuple[float, float] = (0.0, 1.0)
    start_buffer_s: float = 0.5
    on_failure: str = "lose"
    tokens_per_frame: float = TOKENS_PER_FRAME
    autoscaler: Autoscaler | None = None
    planned: tuple[Planned, ...] = ()
    shared_sessions: int | None = None
    task_slots: int | None = None
    between_segments: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.devices < 1 or (self.session_limit is not None and self.session_limit < 1):
            raise InputError("a pool has 1 device or more, with room for 1 session or more")
        if self.routing not in ROUTINGS:
            raise InputError(f"unknown routing {self.routing!r}: use one of {', '.join(ROUTINGS)}")
        if self.on_failure not in ON_FAILURE:
            raise InputError(f"unknown on_failure {self.on_failure!r}: use one of {', '.join(ON_FAILURE)}")
        if (self.queue_limit is not None and self.queue_limit < 0) or not self.patience_s >= 0:
            raise InputError("a queue holds 0 sessions or more, and patience is 0 seconds or more")
        numbers = (*self.first_audio, self.start_buffer_s, self.tokens_per_frame, *self.between_segments)
        if min(0 if each is None else each for each in (self.shared_sessions, self.task_slots)) < 0:
            raise InputError("streams and tasks share 0 sessions or more, and 0 tasks or more run at once")
        if not self.memory_bytes > 0 or not all(0 <= each < math.inf for each in numbers):
            raise InputError("memory is above 0; first audio, start buffer and tokens of a frame are 0 or more")
        if self.autoscaler and not self.autoscaler.least <= self.devices <= self.autoscaler.most:
            raise InputError(f"a pool begins with as many devices as its autoscaler allows, not {self.devices}")
        if any(not 0 <= each.device < self.places for each in self.planned):
            raise InputError(f"something is planned for a device that is not one of 0 to {self.places - 1}")

    @classmethod
    def of(cls, device: Device, devices: int, **more) -> Pool:
        """A pool of devices as fitted."""
        return cls(devices, device.step_time, first_audio=device.first_audio, **more)

    @property
    def places(self) -> int:
        """The largest possible number of devices."""
        return (self.autoscaler.places or self.autoscaler.most) if self.autoscaler else self.devices

    def tables(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a step without context, and seconds per token, at 0 to ``most`` sessions. Raises InputError."""
        n = np.arange(1, most + 1, dtype=float)
        base = np.asarray(self.step_time(n), dtype=float)
        token_s = self.token_s(n) if callable(self.token_s) else self.token_s
        token = np.broadcast_to(np.asarray(token_s, dtype=float), n.shape).astype(float)
        if not (base.shape == n.shape and np.all((base >= SHORTEST_S) & (base <= LONGEST_S))):
            raise InputError(
                f"a frame step takes more than 0 seconds at any number of sessions: {SHORTEST_S:g} to {LONGEST_S:g} s"
            )
        if not np.all(np.isfinite(token) & (token >= 0)):
            raise InputError("a token of context takes 0 seconds or more")
        return np.concatenate([[np.nan], base]), np.concatenate([[np.nan], token])


def random_failures(
    devices: int, seconds: float, mean_up_s: float, repair_s: float, rng: np.random.Generator
) -> tuple[Planned, ...]:
    """Failures of each device after exponential times of mean ``mean_up_s``, each repaired ``repair_s`` later."""
    if not (mean_up_s > 0 and repair_s > 0 and math.isfinite(seconds)):
        raise InputError("the times between failures and to repair are above 0 seconds, and there is an end")
    planned = []
    for device in range(devices):
        at_s = rng.exponential(mean_up_s)
        while at_s < seconds:
            planned += [Planned(at_s, "fail", device), Planned(at_s + repair_s, "repair", device)]
            at_s += repair_s + rng.exponential(mean_up_s)
    return tuple(sorted(planned, key=lambda each: each.at_s))
