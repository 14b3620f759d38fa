"""Compiled: tasks, which run in segments beside the streams of a pool and give way to them at a segment's end.

Streams come first. ``shared_sessions`` is what streams and tasks have together, as the studio's ``--sessions``: tasks
run in what the streams leave of it, and those that were claimed last give way. A task that waits keeps its ``turn``.
"""

from __future__ import annotations

import math

from harness.capacity.simulator.compiled import apart, compiled
from harness.capacity.simulator.device import settle, start, step_off
from harness.capacity.simulator.queues import with_room
from harness.capacity.simulator.structures import pop, push

GOES_ON = -math.inf  # the turn of a task that keeps its claim


@compiled
def allowance(a):
    """The tasks that may run now."""
    state, setup = a.state[0], a.setup[0]
    streams = state.active - state.tasks + state.waiting
    return max(min(setup.shared_sessions - streams, setup.task_slots), 0)


@compiled
def wait_for_turn(a, k, turn):
    state = a.state[0]
    push(a.turns, a.turn_slots, state.tasks_waiting, turn, k)
    state.tasks_waiting += 1


@apart
def start_tasks(a, now):
    """Start waiting tasks, in the order of their turns, while they may and the first one fits."""
    state = a.state[0]
    while state.tasks_waiting > 0 and (a.turns[0] == GOES_ON or state.tasks < allowance(a)):
        k = a.turn_slots[0]
        d = with_room(a, a.slots[k].bytes)
        if d < 0:
            return
        if a.turns[0] > GOES_ON:
            a.slots[k].claim_s = now
        pop(a.turns, a.turn_slots, state.tasks_waiting)
        state.tasks_waiting -= 1
        state.tasks += 1
        start(a, k, d, now)


@compiled
def _rank(a, s):
    """How many running tasks were claimed before this one."""
    rank = 0
    for d in range(len(a.devices)):
        for i in range(a.devices[d].active):
            other = a.slots[a.members[d, i]]
            if other.segment > 0:
                is_before = other.claim_s < s.claim_s or (other.claim_s == s.claim_s and other.number < s.number)
                rank += is_before
    return rank


@apart
def end_segment(a, now):
    """End the segment of a task, which goes on at once unless it has to give way; returns its device."""
    k = step_off(a, now)
    s = a.slots[k]
    a.state[0].tasks -= 1
    settle(a, s.device)
    wait_for_turn(a, k, GOES_ON if _rank(a, s) < allowance(a) else s.turn)
    return s.device
