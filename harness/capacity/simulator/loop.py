"""Compiled: the events of a pool in order of time, among them failures, drains and autoscaling."""

from __future__ import annotations

import math

from harness.capacity.simulator.compiled import (
    ARRIVED,
    DOWN,
    DRAIN,
    DRAINING,
    END_OF_BLOCK,
    FAIL,
    GAVE_UP,
    GROW,
    LOSE,
    LOST,
    OFF,
    OVER,
    RAISE,
    RESTART,
    STARTING,
    UP,
    WAITING,
    compiled,
)
from harness.capacity.simulator.device import advance, count, empty, finish, leave, plan_end, rank
from harness.capacity.simulator.queues import admit, place, step_out
from harness.capacity.simulator.segments import end_segment, start_tasks, wait_for_turn
from harness.capacity.simulator.structures import first, pop
from harness.jit import kept

_NONE, _END, _OTHER, _TIMEOUT, _ARRIVAL = 0, 1, 2, 3, 4


@compiled
def _time_out(a, now):
    """Time out the session that has waited longest."""
    k = a.state[0].oldest
    d = a.slots[k].device
    step_out(a, k)
    leave(a, k, GAVE_UP, now)
    _settle_drained(a, d)
    admit(a, d, now)


@compiled
def _settle_drained(a, d):
    if d >= 0 and a.devices[d].state == DRAINING and a.devices[d].active + a.devices[d].waiting == 0:
        a.devices[d].state = OFF
        a.state[0].owned -= 1


@compiled
def _become(a, d, to):
    """Change the state of a device, and the counts of devices up and owned (all but OFF)."""
    device, state = a.devices[d], a.state[0]
    state.up += (to == UP) - (device.state == UP)
    state.starting += (to == STARTING) - (device.state == STARTING)
    state.owned += (to != OFF) - (device.state != OFF)
    device.state = to
    rank(a, d)


@compiled
def _fail(a, d, now):
    """Fail a device with its running and queued sessions; they are lost, or requeued in order of arrival."""
    device = a.devices[d]
    if device.state == OFF:
        return
    n, waited = empty(a, d, now), device.waiting
    plan_end(a, d)
    _become(a, d, DOWN)
    for _ in range(n):
        k = pop(a.targets[d], a.members[d], n)
        n -= 1
        _again(a, k, now)
    for _ in range(waited):
        k = device.head
        step_out(a, k)
        _again(a, k, now)


@compiled
def _again(a, k, now):
    s, mode = a.slots[k], a.setup[0].on_failure
    if s.segment > 0:  # what is stored of it counts
        s.done = s.since
        a.state[0].tasks -= 1
        wait_for_turn(a, k, s.turn)
        return
    if mode == LOSE:
        leave(a, k, LOST, now)
        return
    if mode == RESTART:
        s.done, s.heard_s = 0.0, -1.0
    place(a, k, now)


@compiled
def _drain(a, d):
    """Stop sending sessions to a device; it is switched off when it is empty."""
    device = a.devices[d]
    if device.state == UP:
        _become(a, d, DRAINING)
        _settle_drained(a, d)
    elif device.state == STARTING:
        _become(a, d, OFF)


@compiled
def _raise(a, d, now):
    if a.devices[d].state != UP:
        _become(a, d, UP)
        admit(a, d, now)


@compiled
def _wish(a, now):
    """Devices that the threshold policy wants: outside the band of sessions per device, those that restore the target.

    At least those of the schedule's floor and, below the present number, the most of its recent wishes.
    """
    setup, state = a.setup[0], a.state[0]
    sessions, coming = state.active + state.waiting, state.up + state.starting
    wished = coming
    if sessions > setup.high * coming or sessions < setup.low * coming:
        wished = math.ceil(sessions / setup.target)
    while state.floor < len(a.floors) and a.floors[state.floor].at_s <= now:
        state.floor += 1
    if state.floor > 0:
        wished = max(wished, a.floors[state.floor - 1].devices)
    a.wishes[state.wish] = wished
    state.wish = (state.wish + 1) % len(a.wishes)
    if wished < coming:
        most = 0
        for i in range(len(a.wishes)):
            most = max(most, a.wishes[i])
        wished = min(coming, most)
    return min(max(wished, setup.least), setup.most)


@compiled
def _grow(a, wanted, now):
    """Recall draining devices if the policy does so, and start others."""
    setup, state = a.setup[0], a.state[0]
    coming = state.up + state.starting
    for d in range(len(a.devices)):
        if setup.recalls and coming < wanted and a.devices[d].state == DRAINING:
            _raise(a, d, now)
            coming += 1
    for d in range(len(a.devices)):
        if coming < wanted and a.devices[d].state == OFF:
            _become(a, d, STARTING)
            a.devices[d].ready_s = now + setup.lag_s
            coming += 1


@compiled
def _shrink(a, wanted):
    """Drop devices that are starting, then drain those with the fewest sessions, or the newest."""
    setup, state = a.setup[0], a.state[0]
    coming = state.up + state.starting
    for d in range(len(a.devices)):
        if coming > wanted and a.devices[d].state == STARTING:
            _become(a, d, OFF)
            coming -= 1
    while coming > wanted:
        drained = first(a.loads)
        if setup.newest:
            for d in range(len(a.devices)):
                if a.devices[d].state == UP and a.devices[d].ready_s >= a.devices[drained].ready_s:
                    drained = d
        _drain(a, drained)
        coming -= 1


@compiled
def _scale(a, now):
    """Evaluate the threshold policy."""
    setup, state = a.setup[0], a.state[0]
    wanted, coming = _wish(a, now), state.up + state.starting
    if wanted > coming:
        state.scaled_s = now
        _grow(a, wanted, now)
    elif wanted < coming and now - state.scaled_s >= setup.hold_s:
        state.scaled_s = now
        _shrink(a, wanted)


@compiled
def _others(a, now):
    """Handle one event that is neither an arrival, nor an end, nor a time-out; ties are resolved in this order."""
    setup, state = a.setup[0], a.state[0]
    if state.window_ends_s <= now:
        state.window += 1
        state.window_ends_s = setup.window_start_s + (state.window + 1) * setup.window_s
    elif state.scheduled < len(a.schedule) and a.schedule[state.scheduled].at_s <= now:
        row = a.schedule[state.scheduled]
        state.scheduled += 1
        is_down = a.devices[row.device].state == DOWN
        if row.action == FAIL:
            _fail(a, row.device, now)
        elif row.action == DRAIN:
            _drain(a, row.device)
        elif row.action == RAISE or is_down:
            _raise(a, row.device, now)
    elif state.ready_s <= now:
        _raise(a, state.ready, now)
    else:
        _scale(a, now)
        state.tick_s += setup.every_s
    _plan_others(a)


@compiled
def _plan_others(a):
    """Find the next such event: end of a window, a row of the schedule, a device that becomes ready, or a tick."""
    state = a.state[0]
    state.ready_s = math.inf
    if state.starting > 0:
        for d in range(len(a.devices)):
            if a.devices[d].state == STARTING and a.devices[d].ready_s < state.ready_s:
                state.ready, state.ready_s = d, a.devices[d].ready_s
    state.other_s = min(state.window_ends_s, state.ready_s, state.tick_s)
    if state.scheduled < len(a.schedule):
        state.other_s = min(state.other_s, a.schedule[state.scheduled].at_s)


@compiled
def _arrive(a, row, now):
    """A session arrives and takes a slot."""
    state = a.state[0]
    k = state.free
    s, new = a.slots[k], a.arrivals[row]
    state.free = s.next
    s.arrival_s, s.frames, s.context, s.bytes, s.first_s = now, new.frames, new.context, new.bytes, new.first_s
    s.ttfa_ratio, s.rtf_ratio = new.ttfa_ratio, new.rtf_ratio
    s.class_index, s.pick, s.number = new.class_index, new.pick, state.arrived
    s.done, s.heard_s, s.lag_s, s.peak_s, s.tries = 0.0, -1.0, now, 0.0, 0
    s.segment, s.turn, s.since, s.until, s.extra = new.segment, new.turn, 0.0, new.frames, 0.0
    s.window = state.window if state.window < len(a.counts) else -1
    state.arrived += 1
    count(a, s, ARRIVED)
    if s.segment > 0:
        wait_for_turn(a, k, s.turn)
    else:
        place(a, k, now)


@compiled
def _end(a, now):
    """End the first session, or the segment of a task, that ends."""
    s = a.slots[a.members[first(a.ends), 0]]
    if s.until < s.frames:
        d = end_segment(a, now)
    else:
        a.state[0].tasks -= s.segment > 0
        d = finish(a, now)
    admit(a, d, now)


@compiled
def _next_event(a, last):
    """The next event and its time; ties are resolved in the order of the kinds' numbers."""
    state, setup = a.state[0], a.setup[0]
    kind, at_s = _END, a.ends[1]
    if state.other_s < at_s:
        kind, at_s = _OTHER, state.other_s
    if state.oldest >= 0 and a.slots[state.oldest].entered_s + setup.patience_s < at_s:
        kind, at_s = _TIMEOUT, a.slots[state.oldest].entered_s + setup.patience_s
    if setup.closed:
        if state.calling > 0 and a.call_s[0] < at_s:
            kind, at_s = _ARRIVAL, a.call_s[0]
    elif state.taken < len(a.arrivals):
        if a.arrivals[state.taken].arrival_s < at_s:
            kind, at_s = _ARRIVAL, a.arrivals[state.taken].arrival_s
    elif not last:
        return _NONE, math.inf  # an arrival of the next block may come first
    return kind, at_s


@compiled
def _accrue(a, now):
    """Add the time since the last event to the integrals of the window."""
    state = a.state[0]
    if 0 <= state.window < len(a.areas):
        area, passed_s = a.areas[state.window], now - state.now_s
        area.active_s += state.active * passed_s
        area.waiting_s += state.waiting * passed_s
        area.busy_s += state.busy * passed_s
        area.up_s += state.up * passed_s
        area.owned_s += state.owned * passed_s
        if passed_s > 0:
            area.most_owned = max(area.most_owned, float(state.owned))
    state.now_s = now


@compiled
def _is_short(a):
    """Whether the next event may need more slots, or more room for a device's sessions, than there are."""
    state, room = a.state[0], a.targets.shape[1]
    if state.free < 0:
        return True
    if a.setup[0].session_limit <= room:
        return False
    most = state.fullest
    if state.scheduled < len(a.schedule):
        device = a.devices[a.schedule[state.scheduled].device]
        most += device.active + device.waiting
    return state.stuck or most >= room


@kept
def run(a, last, stop_s):
    """Simulate a pool's block of arrivals; after the ``last`` block, until ``stop_s`` or until no session is left.

    Returns END_OF_BLOCK, OVER, or GROW where slots or heaps must be enlarged first.
    """
    state, setup = a.state[0], a.setup[0]
    if state.stuck:
        state.stuck = False
        for d in range(len(a.devices)):
            admit(a, d, state.now_s)
        start_tasks(a, state.now_s)
    while not _is_short(a):
        kind, at_s = _next_event(a, last)
        if kind == _NONE:
            return END_OF_BLOCK
        if at_s > stop_s or at_s == math.inf:
            _look(a, stop_s if stop_s < math.inf else state.now_s)
            return OVER
        _accrue(a, at_s)
        if kind == _END:
            _end(a, at_s)
        elif kind == _ARRIVAL and setup.closed:
            row = pop(a.call_s, a.calls, state.calling)
            state.calling -= 1
            _arrive(a, row, at_s)
        elif kind == _ARRIVAL:
            state.taken += 1
            _arrive(a, state.taken - 1, at_s)
        elif kind == _OTHER:
            _others(a, at_s)
        else:
            _time_out(a, at_s)
        if state.tasks_waiting > 0:
            start_tasks(a, at_s)
    return GROW


@compiled
def _look(a, now):
    """Record the progress of the sessions that have not left yet."""
    _accrue(a, now)
    for d in range(len(a.devices)):
        advance(a, d, now)
        for i in range(a.devices[d].active):
            s = a.slots[a.members[d, i]]
            s.done = max(s.until - (a.targets[d, i] - a.devices[d].clock), s.since)
            if len(a.kept) > 0:
                a.kept[s.number].frames_done = s.done
    for i in range(a.state[0].tasks_waiting if len(a.kept) > 0 else 0):
        s = a.slots[a.turn_slots[i]]
        a.kept[s.number].outcome, a.kept[s.number].frames_done = WAITING, s.done
    k = a.state[0].oldest
    while k >= 0 and len(a.kept) > 0:
        a.kept[a.slots[k].number].outcome = WAITING
        k = a.slots[k].newer
