"""A detailed event simulation of a staged server: the exhaustive truth that searches are compared with.

It shares no code with the search's own model, which also lets executions share processors. Requests of sessions share
cores and hop from stage to stage; Triton's batcher waits for preferred sizes and timers; instances of all stages share
a device and slow each other down while they run; batch times come from tables with steps in them; every execution
varies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from harness.capacity.simulator.compiled import compiled
from harness.jit import kept

_NOTHING_S = 1e-12  # less work than this is done


@dataclass(frozen=True)
class Server:
    """A deployment. ``batch_s`` [stages, batch]: seconds of each batch size alone on the device; entry first.

    Knobs [stages]: ``delay_s``, ``preferred`` (0 = none), ``most`` (largest batch), ``instances``. ``hop_s``: work of a
    hop on a core. ``cores``: of the host; ``devices``: executions that run at full speed on the device, 0 where stages
    run on the cores as well. ``interference``: slowdown of the device for every further execution on it.
    """

    batch_s: np.ndarray
    delay_s: np.ndarray
    preferred: np.ndarray
    most: np.ndarray
    instances: np.ndarray
    hop_s: float
    cores: float
    devices: float = 0.0
    interference: float = 0.0
    noise: float = 0.08


@dataclass(frozen=True)
class Observed:
    """Seconds of a frame step; by stage and batch size [stages, batch] executions and their total seconds."""

    step_s: float
    executions: np.ndarray
    busy_s: np.ndarray


class _World(NamedTuple):
    """Arrays by stage, by session and by worker (an instance of a stage), and the deployment."""

    batch_s: np.ndarray
    delay_s: np.ndarray
    preferred: np.ndarray
    most: np.ndarray
    queue: np.ndarray  # [stages, sessions + 1], a ring
    head: np.ndarray
    waiting: np.ndarray
    executions: np.ndarray  # [stages, batch]
    busy_s: np.ndarray
    hopping: np.ndarray  # by session: in a hop to stage ``at``
    at: np.ndarray
    came_s: np.ndarray
    hop_left_s: np.ndarray
    of_stage: np.ndarray  # by worker
    members: np.ndarray  # [workers, batch]
    size: np.ndarray  # of its batch, 0 where it is free
    left_s: np.ndarray
    began_s: np.ndarray
    hop_s: float
    cores: float
    devices: float
    interference: float
    noise: float


def observe(server: Server, sessions: int, seed: int, frames: int = 60, warm_up: int = 20) -> Observed:
    """Simulate this many sessions, for ``frames`` frames each after a warm-up."""
    world = _world(server, sessions, np.random.default_rng(seed))
    step_s = _run(world, sessions, frames, warm_up, seed)
    return Observed(step_s, world.executions, world.busy_s)


def _world(server: Server, sessions: int, rng: np.random.Generator) -> _World:
    (stages, width), workers = server.batch_s.shape, int(server.instances.sum())
    whole = np.int64
    return _World(
        server.batch_s, server.delay_s, server.preferred.astype(whole), server.most.astype(whole),
        np.zeros((stages, sessions + 1), whole), np.zeros(stages, whole), np.zeros(stages, whole),
        np.zeros((stages, width)), np.zeros((stages, width)), np.ones(sessions, bool), np.zeros(sessions, whole),
        np.zeros(sessions), server.hop_s * (0.5 + 20 * rng.random(sessions)),
        np.repeat(np.arange(stages), server.instances.astype(whole)), np.zeros((workers, width), whole),
        np.zeros(workers, whole), np.zeros(workers), np.zeros(workers), float(server.hop_s), float(server.cores),
        float(server.devices), float(server.interference), float(server.noise),
    )  # fmt: skip


@compiled
def _forget(w):
    for stage in range(w.executions.shape[0]):
        for size in range(w.executions.shape[1]):
            w.executions[stage, size] = w.busy_s[stage, size] = 0


@compiled
def _on_device(w, worker):
    return w.devices > 0 and w.of_stage[worker] > 0


@compiled
def _rates(w):
    """Speed of work on a core and on the device, shared by what runs there."""
    on_cores, on_device = 0, 0
    for k in range(len(w.at)):
        on_cores += w.hopping[k]
    for worker in range(len(w.size)):
        if w.size[worker] > 0 and _on_device(w, worker):
            on_device += 1
        elif w.size[worker] > 0:
            on_cores += 1
    core_rate = min(1.0, w.cores / max(on_cores, 1))
    if w.devices > 0:
        return core_rate, min(1.0, w.devices / max(on_device, 1)) / (1 + w.interference * max(on_device - 1, 0))
    return core_rate / (1 + w.interference * max(on_cores - w.cores, 0.0)), 0.0


@compiled
def _until_next(w, now, core_rate, device_rate):
    """Seconds to the next event: a hop or a batch ends, or a delay ends where an instance is free."""
    step_s = math.inf
    for k in range(len(w.at)):
        if w.hopping[k]:
            step_s = min(step_s, w.hop_left_s[k] / core_rate)
    for worker in range(len(w.size)):
        stage = w.of_stage[worker]
        if w.size[worker] > 0:
            step_s = min(step_s, w.left_s[worker] / (device_rate if _on_device(w, worker) else core_rate))
        elif w.waiting[stage] > 0:
            step_s = min(step_s, max(w.came_s[w.queue[stage, w.head[stage]]] + w.delay_s[stage] - now, 0.0))
    return step_s


@compiled
def _end_batches(w, now, step_s, core_rate, device_rate):
    """Advance batches; sessions of completed ones start their next hop. Returns how many frames were completed."""
    made = 0
    for worker in range(len(w.size)):
        if w.size[worker] == 0:
            continue
        w.left_s[worker] -= step_s * (device_rate if _on_device(w, worker) else core_rate)
        if w.left_s[worker] > _NOTHING_S:
            continue
        stage, size = w.of_stage[worker], w.size[worker]
        w.executions[stage, size] += 1
        w.busy_s[stage, size] += now - w.began_s[worker]
        for i in range(size):
            k = w.members[worker, i]
            w.hopping[k], w.hop_left_s[k] = True, w.hop_s
            w.at[k] = (stage + 1) % len(w.delay_s)
        made += size * (stage + 1 == len(w.delay_s))
        w.size[worker] = 0
    return made


@compiled
def _end_hops(w, now, work_s):
    """Advance hops; sessions that arrive join a queue."""
    for k in range(len(w.at)):
        if w.hopping[k]:
            w.hop_left_s[k] -= work_s
            if w.hop_left_s[k] <= _NOTHING_S:
                stage = w.at[k]
                w.hopping[k], w.came_s[k] = False, now
                w.queue[stage, (w.head[stage] + w.waiting[stage]) % w.queue.shape[1]] = k
                w.waiting[stage] += 1


@compiled
def _begin_batches(w, now):
    """Triton's batcher: all that wait once the first is late, before that only a preferred (or the largest) batch."""
    for worker in range(len(w.size)):
        stage = w.of_stage[worker]
        if w.size[worker] > 0 or w.waiting[stage] == 0:
            continue
        late = now >= w.came_s[w.queue[stage, w.head[stage]]] + w.delay_s[stage] - _NOTHING_S
        wanted = w.preferred[stage] if w.preferred[stage] > 0 else w.most[stage]
        if not late and w.waiting[stage] < wanted:
            continue
        size = min(w.waiting[stage], w.most[stage]) if late else wanted
        for i in range(size):
            w.members[worker, i] = w.queue[stage, w.head[stage]]
            w.head[stage] = (w.head[stage] + 1) % w.queue.shape[1]
        w.waiting[stage] -= size
        w.size[worker], w.began_s[worker] = size, now
        w.left_s[worker] = w.batch_s[stage, size] * math.exp(w.noise * (np.random.standard_normal() - w.noise / 2))


@kept
def _run(w, sessions, frames, warm_up, seed):
    """Run the simulation; returns the mean seconds of a frame step after the warm-up."""
    np.random.seed(seed)
    now, made, warm_s, warm_made = 0.0, 0, -1.0, 0
    while made < (frames + warm_up) * sessions:
        core_rate, device_rate = _rates(w)
        step_s = _until_next(w, now, core_rate, device_rate)
        now += step_s
        # hops first: those that start as a batch ends have made no progress yet
        _end_hops(w, now, step_s * core_rate)
        made += _end_batches(w, now, step_s, core_rate, device_rate)
        if warm_s < 0 and made >= warm_up * sessions:
            warm_s, warm_made = now, made
            _forget(w)
        _begin_batches(w, now)
    return (now - warm_s) * sessions / (made - warm_made)
