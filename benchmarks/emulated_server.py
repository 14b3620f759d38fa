"""A staged server in detail, event by event: the exhaustive truth that searches are held against.

It shares nothing with the search's own model: requests of sessions that share cores hop from stage to stage,
Triton's batcher waits for preferred sizes and timers, instances of all stages share a device and slow each other down
while they run, batch times come from tables with steps in them, and every execution varies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np

ENTRY, STAGES = 0, 4  # the entry, then the three stages of the frame path
_IDLE, _HOP, _WAITING, _RUNNING = 0, 1, 2, 3


@dataclass(frozen=True)
class Server:
    """A deployment. ``batch_s`` [stages, batch]: seconds alone on the device of a batch of so many; entry first.

    Knobs [stages]: ``delay_s``, ``preferred`` (0 = none), ``most`` (largest batch), ``instances``. ``hop_s``: work of a
    hop on a core. ``cores``: of the host; ``devices``: executions that run at full speed on the device, 0 where stages
    run on the cores as well. ``interference``: how much slower the device is for every further execution on it.
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
    """Seconds of a frame step; by stage and batch size [stages, batch] executions and the seconds that they took."""

    step_s: float
    executions: np.ndarray
    busy_s: np.ndarray


def observe(server: Server, sessions: int, seed: int, frames: int = 60, warm_up: int = 20) -> Observed:
    """So many sessions for so many frames each."""
    step_s, executions, busy_s = _run(
        server.batch_s, server.delay_s, server.preferred.astype(np.int64), server.most.astype(np.int64),
        server.instances.astype(np.int64), server.hop_s, server.cores, server.devices, server.interference,
        server.noise, sessions, frames, warm_up, seed,
    )  # fmt: skip
    return Observed(step_s, executions, busy_s)


@numba.njit(cache=True)
def _run(batch_s, delay_s, preferred, most, instances, hop_s, cores, devices, interference, noise, sessions, frames,
         warm_up, seed):  # fmt: skip
    np.random.seed(seed)
    stages, width = batch_s.shape
    workers = int(instances.sum())
    of_stage, members = np.zeros(workers, np.int64), np.zeros((workers, width), np.int64)
    sizes, left_s, began_s = np.zeros(workers, np.int64), np.zeros(workers), np.zeros(workers)
    worker = 0
    for stage in range(stages):
        for _ in range(instances[stage]):
            of_stage[worker] = stage
            worker += 1
    queue, head, waiting = (
        np.zeros((stages, sessions + 1), np.int64),
        np.zeros(stages, np.int64),
        np.zeros(stages, np.int64),
    )
    state, at, came_s = np.full(sessions, _HOP), np.zeros(sessions, np.int64), np.zeros(sessions)
    hop_left_s, made = hop_s * (0.5 + np.random.random(sessions) * 20), np.zeros(sessions, np.int64)
    executions, busy_s = np.zeros((stages, width)), np.zeros((stages, width))
    now, counting_from, made_then, total = 0.0, -1.0, 0, 0
    goal, opening = frames * sessions, warm_up * sessions
    while total < goal + opening:
        hopping, on_device, on_cores = 0, 0, 0
        for k in range(sessions):
            hopping += state[k] == _HOP
        for w in range(workers):
            if sizes[w] > 0:
                if devices > 0 and of_stage[w] > 0:
                    on_device += 1
                else:
                    on_cores += 1
        core_rate = min(1.0, cores / max(hopping + on_cores, 1))
        device_rate = min(1.0, devices / max(on_device, 1)) / (1 + interference * max(on_device - 1, 0))
        if devices == 0:
            core_rate = core_rate / (1 + interference * max(on_cores - cores, 0.0))
        step = math.inf
        for k in range(sessions):
            if state[k] == _HOP:
                step = min(step, hop_left_s[k] / core_rate)
        for w in range(workers):
            if sizes[w] > 0:
                rate = device_rate if devices > 0 and of_stage[w] > 0 else core_rate
                step = min(step, left_s[w] / rate)
        for stage in range(stages):
            if waiting[stage] > 0:
                for w in range(workers):
                    if of_stage[w] == stage and sizes[w] == 0:
                        step = min(step, max(came_s[queue[stage, head[stage]]] + delay_s[stage] - now, 0.0))
                        break
        now += step
        for w in range(workers):
            if sizes[w] == 0:
                continue
            stage = of_stage[w]
            left_s[w] -= step * (device_rate if devices > 0 and stage > 0 else core_rate)
            if left_s[w] > 1e-12:
                continue
            if counting_from >= 0:
                executions[stage, sizes[w]] += 1
                busy_s[stage, sizes[w]] += now - began_s[w]
            for i in range(sizes[w]):
                k = members[w, i]
                state[k], hop_left_s[k] = _HOP, hop_s
                at[k] += 1
                if at[k] == stages:
                    at[k] = 0
                    made[k] += 1
                    total += 1
            sizes[w] = 0
        for k in range(sessions):
            if state[k] == _HOP:
                hop_left_s[k] -= step * core_rate
                if hop_left_s[k] <= 1e-12:
                    stage = at[k]
                    state[k], came_s[k] = _WAITING, now
                    queue[stage, (head[stage] + waiting[stage]) % (sessions + 1)] = k
                    waiting[stage] += 1
        if counting_from < 0 and total >= opening:
            counting_from, made_then = now, total
        for w in range(workers):
            stage = of_stage[w]
            if sizes[w] > 0 or waiting[stage] == 0:
                continue
            late = now >= came_s[queue[stage, head[stage]]] + delay_s[stage] - 1e-12
            wanted = preferred[stage] if preferred[stage] > 0 else most[stage]
            if not late and waiting[stage] < wanted:
                continue
            size = min(waiting[stage], most[stage]) if late else wanted
            for i in range(size):
                members[w, i] = queue[stage, head[stage]]
                state[members[w, i]] = _RUNNING
                head[stage] = (head[stage] + 1) % (sessions + 1)
            waiting[stage] -= size
            sizes[w], began_s[w] = size, now
            left_s[w] = batch_s[stage, size] * math.exp(noise * np.random.standard_normal() - noise * noise / 2)
    seconds = now - counting_from
    return seconds * sessions / (total - made_then), executions, busy_s
