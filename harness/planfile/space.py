"""The search space of a plan: its knobs with their limits, and the points that their values make."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence

from harness import wire
from harness.planfile.sections import Value, hint
from harness.topology import ENGINE, KEY, TOPOLOGY, Knobs, applicable, has_knob

STAGE_KNOBS = {
    "delay_us": (0, 10_000_000),
    "max_batch": (1, 1024),
    "preferred_batch": (0, 1024),
    "instances": (1, 64),
}
KNOBS = {
    **STAGE_KNOBS,
    **{f"{stage}.{knob}": limits for stage in wire.STAGES for knob, limits in STAGE_KNOBS.items()},
    "entry.instances": (1, 64),
    f"{ENGINE}.max_batch": (1, 1024),
    f"{ENGINE}.instances": (1, 64),
    "chunk_frames": (1, wire.MAX_FRAMES),
    "diffusion_steps": (1, wire.MAX_DIFFUSION_STEPS),
}
"""Every knob of a search space, and its lowest and highest value. A bare stage knob sets that of all stages.

``topology`` is one too, with the values ``staged`` and ``fused``; knobs of ``engine`` belong to the fused topology.
Any other key of a config.pbtxt is set as ``<model>:<path>``, as ``set_key`` of ``deploy/config_keys.py`` takes it.
"""
Column = tuple[dict[str, Value], ...]
"""What each value of one key of a space sets."""


def check_knob(knob: str, values: tuple[Value, ...]) -> None:
    """Raises ValueError for an unknown knob, or values that it cannot have."""
    if not values or any(value in values[:index] for index, value in enumerate(values)):
        raise ValueError(f"{knob}: needs one value or more, each different, not {list(values)}")
    model, colon, _ = knob.partition(KEY)
    if colon:
        known = (*wire.MODELS, wire.ENGINE)
        if model not in known:
            raise ValueError(f"{knob}: unknown model; {hint(model, known)}")
        return
    if knob == TOPOLOGY:
        if not all(value in wire.TOPOLOGIES for value in values):
            raise ValueError(f"{knob}: must be {' or '.join(wire.TOPOLOGIES)}, not {list(values)}")
        return
    if knob not in KNOBS:
        raise ValueError(
            f"{knob}: unknown knob; {hint(knob, (TOPOLOGY, *KNOBS))}; or <model>:<path of a key of its config.pbtxt>"
        )
    low, high = KNOBS[knob]
    if not all(type(value) is int and low <= value <= high for value in values):
        raise ValueError(f"{knob}: needs different whole numbers from {low} to {high}, not {list(values)}")


def is_knob_of(topology: str, knob: str) -> bool:
    """Whether a topology has a knob, or any of those that a bare stage knob stands for."""
    return any(has_knob(topology, each) for each in _knobs_of(knob))


def columns_of(space: Mapping[str, Sequence[Value]], topology: str) -> tuple[Column, ...]:
    """The space of a plan as columns: a bare stage knob comes before those that name their stage.

    The topology comes first, so that a grid changes it, and restarts a server, as rarely as possible. ``topology``: of
    the plan, where the space names none.
    """
    space = space if topology == wire.STAGED else {TOPOLOGY: (topology,), **space}
    in_order = sorted(space.items(), key=lambda item: (item[0] != TOPOLOGY, item[0] not in STAGE_KNOBS))
    return tuple(tuple(_written_out(knob, value) for value in values) for knob, values in in_order)


def numbers_of(knob: str, columns: Sequence[Column]) -> list[int]:
    """The whole numbers that the points give a knob; the last column takes precedence."""
    own = [[value.get(knob) for value in column] for column in columns]
    numbers = [[each for each in values if isinstance(each, int)] for values in own]
    return next((values for values in reversed(numbers) if values), [])


def points_of(columns: Sequence[Column]) -> list[Knobs]:
    """Every combination of the columns, as ``{"<stage>.<knob>": value}``; one empty point where nothing is swept.

    A point has only the knobs of its topology: combinations that differ only in others are one point.
    """
    combined = (
        applicable({knob: value for part in parts for knob, value in part.items()})
        for parts in itertools.product(*columns)
    )
    return list({json.dumps(point, sort_keys=True): point for point in combined}.values())


def size_of(space: Mapping[str, Sequence[Value]], topologies: Sequence[str]) -> int:
    """Number of combinations of the space, counting only knobs that their topology has."""
    knobs = [(knob, len(values)) for knob, values in space.items() if knob != TOPOLOGY]
    return sum(math.prod(count for knob, count in knobs if is_knob_of(topology, knob)) for topology in topologies)


def _written_out(knob: str, value: Value) -> dict[str, Value]:
    return dict.fromkeys(_knobs_of(knob), value)


def _knobs_of(knob: str) -> list[str]:
    """The knobs that a key of a space sets: a bare stage knob stands for that of each stage."""
    return [f"{stage}.{knob}" for stage in wire.STAGES] if knob in STAGE_KNOBS else [knob]
