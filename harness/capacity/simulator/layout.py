"""What the compiled loop works on: arrays of records, and how they begin and grow."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness import jit
from harness.capacity.simulator.compiled import COMPILED_FILES, GOOD, STAY

COLUMNS, METRICS = GOOD + 1, STAY + 1
_FOLDER = Path(__file__).parent


def sources() -> str:
    """A name that changes with any file of compiled code."""
    files = [Path(jit.__file__), *(_FOLDER / name for name in COMPILED_FILES)]
    text = b"".join(file.read_bytes() for file in files)
    return f"compiled_from_{hashlib.sha256(text).hexdigest()[:16]}"


def record(**fields: str) -> np.dtype:
    return np.dtype([(name, kind) for kind, names in fields.items() for name in names.split()], align=True)


ARRIVAL = record(f8="arrival_s frames context first_s ttfa_ratio rtf_ratio pick segment turn", i8="bytes class_index")
"""An arriving session. ``context``: tokens of its prompt, and of the frames taken as spoken, at its start.

``first_s``: seconds to its first audio besides those of the pool. ``ttfa_ratio``, ``rtf_ratio``: its scatter, by which
its time from start to first audio and its RTF are multiplied. ``bytes``: reserved for it. ``pick``: uniform in 0 to 1,
used by random routing. ``segment``: of a task, its frames between two points at which it may give way to streams; 0 for
a stream. ``turn``: waiting tasks start in ascending order of it. ``class_index`` -1: not counted. In a closed loop
``arrival_s`` is the time that its user thinks before.
"""

SLOT = record(
    f8="arrival_s frames context first_s ttfa_ratio rtf_ratio pick entered_s start_s heard_s ttfa_s done lag_s peak_s "
    "segment turn claim_s since until extra",
    i8="bytes class_index window number tries device next older newer",
)
"""A session that is here. ``heard_s``: from its start to its first audio, -1 before. ``done``: frames made on devices
before this one. ``since``, ``until``: its frames as it started on this device, and as it is to leave it; ``extra``:
frames in whose time a task is started or resumed. ``claim_s``: when a task was last taken from those that wait. Behind
real time: now - frame_s x the device's clock - ``lag_s``, or now - ``lag_s`` off any device; ``peak_s``: the most that
it was at an event. ``next``: in the queue of its device, or the next free slot; ``older``, ``newer``: neighbours in the
queue of all that wait.
"""

DEVICE = record(f8="clock moved_s context step_s ready_s", i8="active waiting bytes state head tail")
"""``clock`` (frames), ``context`` (tokens of all its sessions) and ``step_s`` are as of ``moved_s``; ``head`` and
``tail`` are those of its queue."""

SETUP = record(
    f8="memory patience_s first_s first_steps start_buffer_s frame_s tokens_per_frame window_start_s window_s "
    "every_s lag_s hold_s target high low between_s between_frame_s",
    i8="session_limit queue_limit routing on_failure closed windows_per_batch least most recalls newest "
    "shared_sessions task_slots",
    i1=sources(),
)

STATE = record(
    f8="now_s window_ends_s other_s ready_s tick_s scaled_s",
    i8="free oldest newest arrived taken calling active waiting busy up starting owned turn fullest stuck "
    "window scheduled ready wish floor tasks tasks_waiting",
)

PLANNED = record(f8="at_s", i8="action device")
FLOOR = record(f8="at_s", i8="devices")
AREA = record(f8="active_s waiting_s busy_s up_s owned_s most_owned")
KEPT = record(f8="start_s first_audio_s end_s stall_s frames_done", i8="outcome device active_at_start")


class Arrays(NamedTuple):
    """All that a pool is. ``targets``, ``members`` [devices, room]: of each device a heap of the clock at which
    sessions end, and their slots. ``ends``, ``loads``, ``fills``: trees of minima over the devices: time of the next
    end, sessions, bytes. ``counts`` [windows, classes, columns], ``bins`` [batches, classes, metrics, bins], ``sums``
    without the last, ``limits`` [classes, metrics]. ``wishes``: devices that the autoscaler last wished for, in a ring;
    ``floors``: its rows. ``turns``, ``turn_slots``: a heap of the tasks that wait.
    """

    setup: np.ndarray
    state: np.ndarray
    arrivals: np.ndarray
    slots: np.ndarray
    devices: np.ndarray
    targets: np.ndarray
    members: np.ndarray
    ends: np.ndarray
    loads: np.ndarray
    fills: np.ndarray
    base_s: np.ndarray
    token_s: np.ndarray
    schedule: np.ndarray
    wishes: np.ndarray
    floors: np.ndarray
    call_s: np.ndarray
    calls: np.ndarray
    counts: np.ndarray
    areas: np.ndarray
    bins: np.ndarray
    sums: np.ndarray
    limits: np.ndarray
    kept: np.ndarray
    turns: np.ndarray
    turn_slots: np.ndarray
