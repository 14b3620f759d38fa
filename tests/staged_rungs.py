"""What the rungs of a ladder show of a staged server whose times are known."""

import math

import numpy as np

from harness import wire
from harness.records.schema import BatchStatistics, Rung, StageStatistics
from harness.records.summary import Summary
from harness.sweep.optimizer.closed_queue import HOST, Round, Station, turns

SESSIONS = 1, 4, 8, 16, 32


def server(delay_us=0, instances=1, room=(math.inf, HOST), hop_s=0.0005, entry_s=0.0005, chunk_s=0.0, entries=1):
    """What a staged server of known times shows: 3, 6 and 9 ms and 0.4, 0.8 and 1.2 ms more for each in the batch."""
    own = [Station((entry_s + chunk_s,), instances=entries)]
    for n in (1, 2, 3):
        times = tuple(n * (3e-3 + 4e-4 * b) for b in range(1, 33))
        own.append(Station(times, delay_us / 1e6, 32, 32, instances, room[1]))
    rooms = (room[0], math.inf) if room[1] == HOST else (math.inf, room[0])
    return tuple(rung(Round(tuple(own), hop_s, rooms), n) for n in SESSIONS)


def rung(round_, sessions):
    shown = turns(round_, sessions, np.random.default_rng(9), frames=100)
    stages = []
    for name, executions, busy_s in zip(wire.STAGES, shown.executions[1:], shown.busy_s[1:], strict=True):
        sizes = np.flatnonzero(executions)
        batches = tuple(BatchStatistics(int(b), int(executions[b]), round(1e9 * busy_s[b])) for b in sizes)
        counts = int(sizes @ executions[sizes]), int(executions.sum()), 0, round(1e9 * busy_s.sum())
        stages.append(StageStatistics(name, *counts, batches))
    summary = Summary(frames_per_s=sessions / shown.step_s, ttfa_p95_s=5 * shown.step_s, sessions=sessions)
    return Rung(sessions, sessions / shown.step_s, 0, 1, summary, tuple(stages))


def steps_of(rungs):
    return np.array([each.sessions / each.frames_per_s for each in rungs])


def point(delay_us=0, instances=1):
    knobs = {"delay_us": delay_us, "instances": instances}
    return {f"{stage}.{knob}": value for stage in wire.STAGES for knob, value in knobs.items()}
