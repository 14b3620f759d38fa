"""Compiled: where a session goes, and the queues in which it waits; first come, first served."""

from __future__ import annotations

import math

from harness.capacity.simulator.compiled import LEAST_LOADED, REFUSED, ROUND_ROBIN, SHARED, UP, compiled
from harness.capacity.simulator.device import fits, leave, rank, start
from harness.capacity.simulator.structures import first


@compiled
def with_room(a, size):
    """The device with the fewest sessions; where it has no room, that with the most free bytes; -1 if none has room."""
    if a.loads[1] == math.inf:
        return -1
    d = first(a.loads)
    if fits(a, d, size):
        return d
    if a.setup[0].memory < math.inf and a.fills[1] < math.inf:
        d = first(a.fills)
        if fits(a, d, size):
            return d
    return -1


@compiled
def _choose(a, s):
    """The device to which a session is sent, busy or not; -1 where none is up."""
    state, total = a.state[0], len(a.devices)
    routing = a.setup[0].routing
    if state.up == 0:
        return -1
    if routing == LEAST_LOADED:
        return first(a.loads)
    if routing == ROUND_ROBIN:
        d = state.turn
        while a.devices[d].state != UP:
            d = (d + 1) % total
        state.turn = (d + 1) % total
        return d
    place = min(int(s.pick * state.up), state.up - 1)
    if state.up == total:
        return place
    d = 0
    while place > 0 or a.devices[d].state != UP:
        place -= a.devices[d].state == UP
        d += 1
    return d


@compiled
def _enter(a, k, d, now):
    """Join the end of the queue of a device, or of the pool (-1)."""
    s, state = a.slots[k], a.state[0]
    s.entered_s, s.device, s.next = now, d, -1
    s.older, s.newer = state.newest, -1
    if state.newest >= 0:
        a.slots[state.newest].newer = k
    else:
        state.oldest = k
    state.newest = k
    state.waiting += 1
    if d >= 0:
        device = a.devices[d]
        if device.head < 0:
            device.head = k
        else:
            a.slots[device.tail].next = k
        device.tail = k
        device.waiting += 1
        rank(a, d)


@compiled
def step_out(a, k):
    """Remove the first session of a queue."""
    s, state = a.slots[k], a.state[0]
    if s.older >= 0:
        a.slots[s.older].newer = s.newer
    else:
        state.oldest = s.newer
    if s.newer >= 0:
        a.slots[s.newer].older = s.older
    else:
        state.newest = s.older
    state.waiting -= 1
    if s.device >= 0:
        device = a.devices[s.device]
        device.head = s.next
        device.waiting -= 1
        rank(a, s.device)


@compiled
def admit(a, d, now):
    """Admit sessions waiting at device ``d``, or in front of the pool, while the first one fits."""
    if a.setup[0].routing == SHARED:
        while a.state[0].oldest >= 0:
            k = a.state[0].oldest
            d = with_room(a, a.slots[k].bytes)
            if d < 0:
                return
            step_out(a, k)
            start(a, k, d, now)
        return
    while d >= 0 and a.devices[d].head >= 0 and fits(a, d, a.slots[a.devices[d].head].bytes):
        k = a.devices[d].head
        step_out(a, k)
        start(a, k, d, now)


@compiled
def place(a, k, now):
    """Start a session if there is room, otherwise queue it, or reject it as busy."""
    s, setup, state = a.slots[k], a.setup[0], a.state[0]
    if setup.routing == SHARED:
        d, waiting, nobody = -1, state.waiting, state.oldest < 0
        chosen = with_room(a, s.bytes) if nobody else -1
        has_room = chosen >= 0
    else:
        d = chosen = _choose(a, s)
        if d < 0:
            leave(a, k, REFUSED, now)
            return
        waiting = a.devices[d].waiting
        has_room = a.devices[d].head < 0 and fits(a, d, s.bytes)
    if has_room:
        start(a, k, chosen, now)
    elif waiting < setup.queue_limit and s.bytes <= setup.memory:
        _enter(a, k, d, now)
    else:
        leave(a, k, REFUSED, now)
