"""Frame steps of sessions that cycle through stages which share processors: a compiled event simulation.

Tasks on a resource share it evenly (processor sharing): each of k executions and hops on c cores runs at
min(1, c / k) of full speed, less ``drag`` for each of the k - c in excess (caches and context switches: the contention
of the Universal Scalability Law). A stage starts a batch when an instance is free and the batch is full or its first
session has waited for the delay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from harness.capacity.simulator.compiled import compiled
from harness.jit import kept

HOST, DEVICE = 0, 1  # resources
_DONE = 1e-12  # seconds of work
_NOISES = 1024


@dataclass(frozen=True)
class Station:
    """A stage. ``time_s``: seconds of work on its resource for batches of 1, 2, ...; extrapolated linearly beyond.

    A batch starts when ``full`` sessions wait, or when the first has waited ``delay_s``: then with up to ``most`` of
    them.
    """

    time_s: tuple[float, ...]
    delay_s: float = 0.0
    full: int = 1
    most: int = 1
    instances: int = 1
    on: int = HOST

    def table(self, sizes: int) -> np.ndarray:
        """Seconds of batches of size 0 to ``sizes`` - 1."""
        known, (first, last) = len(self.time_s), (self.time_s[0], self.time_s[-1])
        slope = (last - first) / (known - 1) if known > 1 else 0.0
        beyond = last + slope * np.arange(1, max(sizes - known, 0))
        return np.concatenate([[0.0], self.time_s, beyond])[:sizes]


@dataclass(frozen=True)
class Round:
    """Stations in order, with ``hop_s`` of work on the host before each; ``room``: tasks at full speed, by resource."""

    stations: tuple[Station, ...]
    hop_s: float = 0.0
    room: tuple[float, float] = (math.inf, 1.0)
    drag: float = 0.0
    noise: float = 0.05


@dataclass(frozen=True, eq=False)
class StepTimes:
    """Mean seconds of a frame step; by station and batch size [stations, batch] executions and their seconds."""

    step_s: float
    executions: np.ndarray
    busy_s: np.ndarray


class _World(NamedTuple):
    work: np.ndarray  # [stations, batch]: seconds
    delay_s: np.ndarray
    knobs: np.ndarray  # knobs: full, most, on, head of the queue
    waiting: np.ndarray
    queue: np.ndarray  # [stations, sessions], ring buffers
    came_s: np.ndarray  # by session
    at: np.ndarray
    arrives: np.ndarray  # by session: the host's clock when its hop ends; infinite if it is not in a hop
    station_of: np.ndarray  # by worker (an instance of a station)
    size: np.ndarray
    members: np.ndarray
    ends: np.ndarray  # by worker: its resource's clock when its batch ends
    began_s: np.ndarray
    clock: np.ndarray  # by resource: seconds of work that each task on it has received so far
    running: np.ndarray  # by resource: hops and executions
    room: np.ndarray
    noise: np.ndarray
    executions: np.ndarray
    busy_s: np.ndarray
    hop_s: float
    drag: float


def turns(round_: Round, sessions: int, rng: np.random.Generator, *, frames: int = 32, warm_up: int = 12) -> StepTimes:
    """Simulate ``sessions`` sessions with random starts, for ``frames`` frames each on average after the warm-up."""
    world = _world(round_, sessions, rng)
    step_s = _run(world, frames, warm_up)
    return StepTimes(step_s, world.executions, world.busy_s)


def _world(round_: Round, sessions: int, rng: np.random.Generator) -> _World:
    stations, whole = round_.stations, np.int64
    workers = sum(each.instances for each in stations)
    alone_s = sum(each.time_s[0] + each.delay_s + round_.hop_s for each in stations)
    sigma = math.sqrt(math.log1p(round_.noise**2))
    return _World(
        np.array([each.table(sessions + 1) for each in stations]), np.array([each.delay_s for each in stations]),
        np.array([(each.full, each.most, each.on, 0) for each in stations], whole),
        np.zeros(len(stations), whole), np.zeros((len(stations), sessions), whole), np.zeros(sessions),
        np.zeros(sessions, whole), np.sort(rng.random(sessions)) * alone_s,
        np.repeat(np.arange(len(stations)), [each.instances for each in stations]), np.zeros(workers, whole),
        np.zeros((workers, sessions), whole), np.full(workers, math.inf), np.zeros(workers), np.zeros(2),
        np.array([sessions, 0], whole), np.array(round_.room, float), rng.lognormal(-(sigma**2) / 2, sigma, _NOISES),
        np.zeros((len(stations), sessions + 1)), np.zeros((len(stations), sessions + 1)), float(round_.hop_s),
        float(round_.drag),
    )  # fmt: skip


@compiled
def _speed(w, resource):
    running, room = w.running[resource], w.room[resource]
    return min(1.0, room / max(running, 1)) / (1 + w.drag * max(running - room, 0.0))


@compiled
def _until_next(w, now):
    """Seconds to the next event: a hop or a batch ends, or the first in a queue is due while an instance is free."""
    first = math.inf
    for k in range(len(w.at)):
        first = min(first, w.arrives[k])
    wait_s = max(first - w.clock[0], 0.0) / _speed(w, 0)
    for worker in range(len(w.size)):
        station = w.station_of[worker]
        on = w.knobs[station, 2]
        if w.size[worker] > 0:
            wait_s = min(wait_s, max(w.ends[worker] - w.clock[on], 0.0) / _speed(w, on))
        elif w.waiting[station] > 0:
            k = w.queue[station, w.knobs[station, 3]]
            wait_s = min(wait_s, max(w.came_s[k] + w.delay_s[station] - now, 0.0))
    return wait_s


@compiled
def _end_batches(w, now):
    """Move the sessions of batches that end to their next hop; returns how many frames were completed."""
    made = 0
    for worker in range(len(w.size)):
        station = w.station_of[worker]
        on = w.knobs[station, 2]
        if w.size[worker] == 0 or w.ends[worker] > w.clock[on] + _DONE:
            continue
        size = w.size[worker]
        for i in range(size):
            k = w.members[worker, i]
            w.at[k], w.arrives[k] = (station + 1) % len(w.waiting), w.clock[0] + w.hop_s
        made += size * (station + 1 == len(w.waiting))
        w.executions[station, size] += 1
        w.busy_s[station, size] += now - w.began_s[worker]
        w.running[on] -= 1
        w.running[0] += size
        w.size[worker] = 0
    return made


@compiled
def _end_hops(w, now):
    for k in range(len(w.at)):
        if w.arrives[k] <= w.clock[0] + _DONE:
            station = w.at[k]
            w.queue[station, (w.knobs[station, 3] + w.waiting[station]) % len(w.at)] = k
            w.arrives[k], w.came_s[k] = math.inf, now
            w.waiting[station] += 1
            w.running[0] -= 1


@compiled
def _begin_batches(w, now, drawn):
    for worker in range(len(w.size)):
        station = w.station_of[worker]
        full, most, on, head = w.knobs[station]
        if w.size[worker] > 0 or w.waiting[station] == 0:
            continue
        late = now >= w.came_s[w.queue[station, head]] + w.delay_s[station] - _DONE
        if not late and w.waiting[station] < full:
            continue
        size = min(w.waiting[station], most) if late else full
        for i in range(size):
            w.members[worker, i] = w.queue[station, (head + i) % len(w.at)]
        w.knobs[station, 3] = (head + size) % len(w.at)
        w.waiting[station] -= size
        work_s = w.work[station, size] * w.noise[drawn % len(w.noise)]
        w.size[worker], w.began_s[worker], w.ends[worker] = size, now, w.clock[on] + work_s
        w.running[on] += 1
        drawn += 1
    return drawn


@kept
def _run(w, frames, warm_up):
    """Run the simulation; returns the mean seconds of a frame step after the warm-up."""
    sessions = len(w.at)
    now, made, warm_s, warm_made, drawn = 0.0, 0, -1.0, 0, 0
    while made < (frames + warm_up) * sessions:
        wait_s = _until_next(w, now)
        now += wait_s
        for resource in range(2):
            w.clock[resource] += wait_s * _speed(w, resource)
        made += _end_batches(w, now)
        _end_hops(w, now)
        if warm_s < 0 and made >= warm_up * sessions:
            warm_s, warm_made = now, made
            w.executions[:] = 0
            w.busy_s[:] = 0
        drawn = _begin_batches(w, now, drawn)
    return (now - warm_s) * sessions / (made - warm_made)
