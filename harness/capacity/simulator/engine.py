"""Drives the compiled loop: builds its arrays, feeds it arrivals block by block, and makes them larger as needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from harness import wire
from harness.capacity.simulator.compiled import GROW, OFF, RTF, STALL, TTFA, UP
from harness.capacity.simulator.layout import (
    AREA,
    ARRIVAL,
    COLUMNS,
    DEVICE,
    FLOOR,
    KEPT,
    METRICS,
    PLANNED,
    SETUP,
    SLOT,
    STATE,
    Arrays,
)
from harness.capacity.simulator.loop import run
from harness.capacity.simulator.pool import ACTIONS, ON_FAILURE, ROUTINGS, Pool
from harness.capacity.simulator.structures import BINS
from harness.errors import InputError

_UNLIMITED = 1 << 60
_LEAST_ROOM = 16
_LEAST_SLOTS = 64
_OF_SCALER = "least", "most", "target", "high", "low", "every_s", "lag_s", "hold_s", "recalls", "newest"
LIMITED = {"ttfa_s": TTFA, "rtf": RTF, "stall_s": STALL}


@dataclass(frozen=True)
class Counting:
    """What is counted: sessions by class that arrive in ``seconds`` after the warm-up, in ``windows`` equal parts.

    Distributions are kept for each of ``batches`` groups of windows; their variation gives the intervals.
    ``limits`` by class: ``{"ttfa_s": 1.0, "rtf": 0.9, "stall_s": 0}``; a session that meets all of its class's is good.
    """

    classes: tuple[str, ...]
    seconds: float
    warm_up_s: float = 0.0
    windows: int = 20
    batches: int = 20
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (0 < self.seconds < math.inf and 0 <= self.warm_up_s < math.inf):
            raise InputError("what is counted lasts more than 0 seconds, after a warm-up of 0 or more")
        if self.batches < 1 or self.windows < 1 or self.windows % self.batches:
            raise InputError(f"{self.windows} windows cannot be divided evenly into {self.batches} batches")
        for name, limits in self.limits.items():
            if name not in self.classes or not set(limits) <= set(LIMITED):
                known = f"{', '.join(LIMITED)} of {', '.join(self.classes)}"
                raise InputError(f"a limit is one on {known}, not {dict(limits)} of {name}")

    @property
    def stop_s(self) -> float:
        return self.warm_up_s + self.seconds

    @property
    def window_s(self) -> float:
        return self.seconds / self.windows

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of windows, batches and classes."""
        return self.windows, self.batches, len(self.classes)

    def table(self) -> np.ndarray:
        """Limits [classes, metrics], infinite where there is none."""
        table = np.full((len(self.classes), METRICS), math.inf)
        for name, limits in self.limits.items():
            for metric, limit in limits.items():
                table[self.classes.index(name), LIMITED[metric]] = limit
        return table


class SimulationEngine:
    """A pool in progress. ``feed`` it arrivals, then ``finish``; ``counting`` and ``keep`` say what to record.

    ``keep``: the first sessions, in order of arrival, that are recorded individually (``arrays.kept``). ``callers``:
    users of a closed loop. There is then one block of arrivals: when a user's session is over, it thinks and takes the
    next.
    """

    def __init__(self, pool: Pool, counting: Counting | None = None, *, keep: int = 0, callers: int | None = None):
        self.pool, self.counting = pool, counting
        room = min(pool.session_limit or _LEAST_ROOM, _LEAST_ROOM)
        base_s, token_s = pool.tables(room)
        windows, batches, classes = counting.shape if counting else (0, 0, 0)
        self.arrays = Arrays(
            setup=_setup(pool, counting, callers is not None),
            state=_state(pool, counting),
            arrivals=np.zeros(0, ARRIVAL),
            slots=np.zeros(0, SLOT),
            devices=_devices(pool),
            targets=np.zeros((pool.places, room)),
            members=np.zeros((pool.places, room), np.int64),
            ends=_tree(pool.places, 0),
            loads=_tree(pool.places, pool.devices),
            fills=_tree(pool.places, pool.devices),
            base_s=base_s,
            token_s=token_s,
            schedule=_schedule(pool),
            wishes=np.full(pool.autoscaler.wishes if pool.autoscaler else 1, pool.devices),
            floors=np.array(list(pool.autoscaler.floors) if pool.autoscaler else [], FLOOR),
            call_s=np.zeros(callers or 0),
            calls=np.zeros(callers or 0, np.int64),
            counts=np.zeros((windows, classes, COLUMNS), np.int64),
            areas=np.zeros(windows, AREA),
            bins=np.zeros((batches, classes, METRICS, BINS), np.int64),
            sums=np.zeros((batches, classes, METRICS)),
            limits=counting.table() if counting else np.zeros((0, METRICS)),
            kept=_kept(keep),
            turns=np.zeros(0),
            turn_slots=np.zeros(0, np.int64),
        )
        self._grow_slots(_LEAST_SLOTS)

    def feed(self, arrivals: np.ndarray, *, last: bool = False, stop_s: float = math.inf) -> None:
        """Simulate a block of arrivals [n], in order of time and after those before."""
        state = self.arrays.state[0]
        state["taken"] = 0
        self.arrays = self.arrays._replace(arrivals=arrivals)
        if self.arrays.setup[0]["closed"]:
            self._seat(arrivals)
        while run(self.arrays, last, stop_s) == GROW:
            self._grow()

    def finish(self, stop_s: float = math.inf) -> None:
        """Simulate until ``stop_s``, or until no session is left."""
        if self.pool.autoscaler and stop_s == math.inf:
            raise InputError("an autoscaler never ends: say when to stop")
        self.feed(np.zeros(0, ARRIVAL), last=True, stop_s=stop_s)

    def _seat(self, arrivals: np.ndarray) -> None:
        """Let every user of a closed loop start to think."""
        users = min(len(self.arrays.call_s), len(arrivals))
        order = np.argsort(arrivals["arrival_s"][:users], kind="stable")  # a sorted array is a heap
        self.arrays.call_s[:users], self.arrays.calls[:users] = arrivals["arrival_s"][order], order
        state = self.arrays.state[0]
        state["calling"] = state["taken"] = users

    def _grow(self) -> None:
        if self.arrays.state[0]["free"] < 0:
            self._grow_slots(2 * len(self.arrays.slots))
        else:
            self._grow_room(2 * self.arrays.targets.shape[1])

    def _grow_slots(self, size: int) -> None:
        old = len(self.arrays.slots)
        slots = np.zeros(size, SLOT)
        slots[:old] = self.arrays.slots
        slots["next"][old:] = np.arange(old + 1, size + 1)
        slots["next"][-1] = -1
        self.arrays.state[0]["free"] = old
        turns, turn_slots = (np.pad(each, (0, size - old)) for each in (self.arrays.turns, self.arrays.turn_slots))
        self.arrays = self.arrays._replace(slots=slots, turns=turns, turn_slots=turn_slots)

    def _grow_room(self, room: int) -> None:
        room = min(room, self.pool.session_limit or room)
        base_s, token_s = self.pool.tables(room)
        more = ((0, 0), (0, room - self.arrays.targets.shape[1]))
        targets, members = np.pad(self.arrays.targets, more), np.pad(self.arrays.members, more)
        self.arrays = self.arrays._replace(targets=targets, members=members, base_s=base_s, token_s=token_s)


def _setup(pool: Pool, counting: Counting | None, closed: bool) -> np.ndarray:
    setup = np.zeros(1, SETUP)
    values = {
        "memory": pool.memory_bytes,
        "patience_s": pool.patience_s,
        "first_s": pool.first_audio[0],
        "first_steps": pool.first_audio[1],
        "start_buffer_s": pool.start_buffer_s,
        "frame_s": wire.SECONDS_PER_FRAME,
        "tokens_per_frame": pool.tokens_per_frame,
        "between_s": pool.between_segments[0],
        "between_frame_s": pool.between_segments[1],
        "session_limit": pool.session_limit or _UNLIMITED,
        "shared_sessions": _UNLIMITED if pool.shared_sessions is None else pool.shared_sessions,
        "task_slots": _UNLIMITED if pool.task_slots is None else pool.task_slots,
        "queue_limit": _UNLIMITED if pool.queue_limit is None else pool.queue_limit,
        "routing": ROUTINGS.index(pool.routing),
        "on_failure": ON_FAILURE.index(pool.on_failure),
        "closed": closed,
        "windows_per_batch": counting.windows // counting.batches if counting else 1,
        "window_start_s": counting.warm_up_s if counting else math.inf,
        "window_s": counting.window_s if counting else math.inf,
    }
    if scaler := pool.autoscaler:
        values |= {name: getattr(scaler, name) for name in _OF_SCALER}
    for name, value in values.items():
        setup[name] = value
    return setup


def _state(pool: Pool, counting: Counting | None) -> np.ndarray:
    state = np.zeros(1, STATE)
    window_s = counting.warm_up_s if counting else math.inf
    tick_s = pool.autoscaler.every_s if pool.autoscaler else math.inf
    planned_s = min((each.at_s for each in pool.planned), default=math.inf)
    values: dict[str, float] = {
        "free": -1,
        "oldest": -1,
        "newest": -1,
        "up": pool.devices,
        "owned": pool.devices,
        "window": -1,
    }
    values |= {"window_ends_s": window_s, "ready_s": math.inf, "tick_s": tick_s, "scaled_s": -math.inf}
    values["other_s"] = min(window_s, tick_s, planned_s)
    for name, value in values.items():
        state[name] = value
    return state


def _devices(pool: Pool) -> np.ndarray:
    devices = np.zeros(pool.places, DEVICE)
    devices["state"][: pool.devices], devices["state"][pool.devices :] = UP, OFF
    devices["head"] = devices["tail"] = -1
    return devices


def _schedule(pool: Pool) -> np.ndarray:
    rows = sorted(pool.planned, key=lambda each: each.at_s)
    return np.array([(each.at_s, ACTIONS[each.action], each.device) for each in rows], PLANNED)


def _tree(leaves: int, zeros: int) -> np.ndarray:
    """A tree of minima with this many leaves; the first ``zeros`` of them are 0, the others infinite."""
    half = 1 << (leaves - 1).bit_length()
    tree = np.full(2 * half, math.inf)
    tree[half : half + zeros] = 0.0
    for node in range(half - 1, 0, -1):
        tree[node] = min(tree[2 * node], tree[2 * node + 1])
    return tree


def _kept(keep: int) -> np.ndarray:
    kept = np.zeros(keep, KEPT)
    for name in ("start_s", "first_audio_s", "end_s", "stall_s"):
        kept[name] = np.nan
    kept["outcome"] = kept["device"] = -1
    return kept


def arrivals_of(
    arrival_s: np.ndarray,
    frames: np.ndarray,
    *,
    context: np.ndarray | float = 0.0,
    bytes_: np.ndarray | int = 0,
    first_s: np.ndarray | float = 0.0,
    ttfa_ratio: np.ndarray | float = 1.0,
    rtf_ratio: np.ndarray | float = 1.0,
    pick: np.ndarray | float = 0.0,
    segment: np.ndarray | float = 0.0,
    turn: np.ndarray | float = 0.0,
    class_index: np.ndarray | int = 0,
) -> np.ndarray:
    """A block of arrivals [n] from columns; see ``layout.ARRIVAL``. Raises InputError for invalid values."""
    arrival_s, frames = np.asarray(arrival_s, dtype=float), np.asarray(frames, dtype=float)
    if arrival_s.shape != frames.shape or arrival_s.ndim != 1:
        raise InputError(f"one number of frames per arrival: {frames.shape} against {arrival_s.shape}")
    if not np.all(np.isfinite(arrival_s)):
        raise InputError("arrivals are finite")
    if not np.all(np.isfinite(frames) & (frames > 0)):
        raise InputError("every session has more than 0 frames")
    block = np.empty(len(frames), ARRIVAL)
    columns = {"arrival_s": arrival_s, "frames": frames, "context": context, "first_s": first_s}
    columns |= {
        "ttfa_ratio": ttfa_ratio,
        "rtf_ratio": rtf_ratio,
        "pick": pick,
        "segment": segment,
        "turn": turn,
        "bytes": bytes_,
        "class_index": class_index,
    }
    for name, values in columns.items():
        block[name] = values
    return block
