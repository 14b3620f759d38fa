"""Compiled: one device and its sessions, which advance together on its frame clock.

With n sessions whose contexts hold K tokens, a frame step takes S = base_s[n] + token_s[n] K seconds, and K grows by
g n tokens a frame (g a session). So x frames take S x + b x^2 / 2 seconds, b = token_s[n] g n: time and frames are
exact functions of each other between two events, and no event is needed for a frame. The clock is continuous; that a
real session waits for the step in progress, at its start and at its end, is at most one step each.
"""

from __future__ import annotations

import math

from harness.capacity.simulator.compiled import (
    ACTIVE,
    DONE,
    DRAINING,
    GOOD,
    OFF,
    RTF,
    SHARED,
    STALL,
    STAY,
    TTFA,
    UP,
    WAIT,
    compiled,
)
from harness.capacity.simulator.structures import bin_of, first, pop, push, put


@compiled
def note(a, s, metric, value):
    """Count a value of a session in its batch."""
    if s.window >= 0 and s.class_index >= 0:
        batch = s.window // a.setup[0].windows_per_batch
        a.bins[batch, s.class_index, metric, bin_of(value)] += 1
        if value < math.inf:
            a.sums[batch, s.class_index, metric] += value


@compiled
def count(a, s, column):
    if s.window >= 0 and s.class_index >= 0:
        a.counts[s.window, s.class_index, column] += 1


@compiled
def leave(a, k, outcome, now):
    """Remove a session that is over, and free its slot. In a closed loop its user starts to think again."""
    s, state = a.slots[k], a.state[0]
    count(a, s, outcome)
    if outcome != DONE and s.tries == 0:
        note(a, s, TTFA, math.inf)
    if len(a.kept) > 0:
        kept = a.kept[s.number]
        kept.outcome, kept.end_s, kept.frames_done = outcome, now, s.done
    s.next, state.free = state.free, k
    if a.setup[0].closed and state.taken < len(a.arrivals):
        push(a.call_s, a.calls, state.calling, now + a.arrivals[state.taken].arrival_s, state.taken)
        state.taken += 1
        state.calling += 1


@compiled
def advance(a, d, now):
    """Advance a device's frame clock to now: the root of t = S x + b x^2 / 2, in the form without cancellation."""
    device = a.devices[d]
    n = device.active
    if n > 0:
        passed_s, step_s = now - device.moved_s, a.base_s[n] + a.token_s[n] * device.context
        bend = a.token_s[n] * a.setup[0].tokens_per_frame * n
        frames = passed_s / step_s
        if bend > 0:
            frames = 2 * passed_s / (step_s + math.sqrt(step_s * step_s + 2 * bend * passed_s))
        device.clock += frames
        device.context += a.setup[0].tokens_per_frame * n * frames
        device.step_s = step_s + bend * frames
    device.moved_s = now


@compiled
def plan_end(a, d):
    """Find when the next session of a device ends, after its sessions changed.

    Sessions fall behind real time while a step takes longer than a frame lasts. Between two events a step only grows,
    so the lag of all of them can only peak at an event, where the step falls below a frame's duration.
    """
    device, frame_s = a.devices[d], a.setup[0].frame_s
    n = device.active
    if n == 0:
        device.context, device.step_s = 0.0, 0.0
        put(a.ends, d, math.inf)
        return
    step_s, bend = a.base_s[n] + a.token_s[n] * device.context, a.token_s[n] * a.setup[0].tokens_per_frame * n
    if device.step_s > frame_s and step_s <= frame_s:
        for i in range(n):
            s = a.slots[a.members[d, i]]
            s.peak_s = max(s.peak_s, device.moved_s - frame_s * device.clock - s.lag_s)
    left = max(a.targets[d, 0] - device.clock, 0.0)
    put(a.ends, d, device.moved_s + left * (step_s + bend * left / 2))
    device.step_s = step_s


@compiled
def rank(a, d):
    """Update a device's load in the trees that routing reads."""
    device, setup = a.devices[d], a.setup[0]
    put(a.loads, d, float(device.active + device.waiting) if device.state == UP else math.inf)
    if setup.routing == SHARED and setup.memory < math.inf:
        is_open = device.state == UP and device.active < setup.session_limit
        put(a.fills, d, float(device.bytes) if is_open else math.inf)


@compiled
def fits(a, d, size):
    """Whether a session of this many bytes can start. If a heap is full, it waits until the heap has grown."""
    device, setup = a.devices[d], a.setup[0]
    if device.active >= a.targets.shape[1] and device.active < setup.session_limit:
        a.state[0].stuck = True
        return False
    return device.active < setup.session_limit and device.bytes + size <= setup.memory


@compiled
def start(a, k, d, now):
    """Start, or resume, a session on a device with room for it."""
    advance(a, d, now)
    s, device, setup, state = a.slots[k], a.devices[d], a.setup[0], a.state[0]
    _set_out(a, s, d)
    push(a.targets[d], a.members[d], device.active, device.clock + s.extra + (s.until - s.done), k)
    device.active += 1
    device.bytes += s.bytes
    device.context += s.context + setup.tokens_per_frame * s.done
    state.active += 1
    state.busy += device.active == 1
    state.fullest = max(state.fullest, device.active)
    if s.heard_s < 0:
        _begin(a, s, d, now)
    behind_s = now - s.lag_s
    s.peak_s = max(s.peak_s, behind_s)
    s.lag_s = now - setup.frame_s * device.clock - behind_s
    s.device = d
    s.tries += 1
    plan_end(a, d)
    rank(a, d)


@compiled
def _set_out(a, s, d):
    """Find how far a session goes: to its end or that of its segment, after the time in which a task is made ready.

    A stream holds its session while its prompt is read too, but for that its first audio alone is counted.
    """
    s.since, s.until, s.extra = s.done, s.frames, 0.0
    if s.segment > 0:
        s.until = min(s.done + s.segment, s.frames)
        device, setup = a.devices[d], a.setup[0]
        n, context = device.active + 1, device.context + s.context + setup.tokens_per_frame * s.done
        step_s = a.base_s[n] + a.token_s[n] * context
        if s.done > 0:
            s.extra = (setup.between_s + setup.between_frame_s * s.done) / step_s
        else:
            s.extra = (setup.first_s + s.first_s) / step_s + max(setup.first_steps - 1.0, 0.0)


@compiled
def _begin(a, s, d, now):
    """Note the wait and the TTFA of a session before its first frame."""
    device = a.devices[d]
    step_s = a.base_s[device.active] + a.token_s[device.active] * device.context
    s.start_s, s.heard_s = now, s.ttfa_ratio * (s.first_s + a.setup[0].first_s + a.setup[0].first_steps * step_s)
    s.lag_s, s.peak_s = now, 0.0
    if s.tries == 0:
        s.ttfa_s = now - s.arrival_s + s.heard_s
        note(a, s, WAIT, now - s.arrival_s)
        note(a, s, TTFA, s.ttfa_s)
    if len(a.kept) > 0:
        kept = a.kept[s.number]
        kept.start_s, kept.first_audio_s, kept.outcome = now, now + s.heard_s, ACTIVE
        kept.device, kept.active_at_start = d, device.active


@compiled
def step_off(a, now):
    """Take the session whose turn on a device ends first of all off that device; returns its slot."""
    d = first(a.ends)
    device, setup, state = a.devices[d], a.setup[0], a.state[0]
    advance(a, d, now)
    device.clock = a.targets[d, 0]
    k = pop(a.targets[d], a.members[d], device.active)
    s = a.slots[k]
    device.active -= 1
    device.bytes -= s.bytes
    device.context -= s.context + setup.tokens_per_frame * (s.until + s.extra)
    state.active -= 1
    state.busy -= device.active == 0
    s.done = s.until
    return k


@compiled
def settle(a, d):
    """Bring a device up to date after a session has left it."""
    device = a.devices[d]
    if device.state == DRAINING and device.active + device.waiting == 0:
        device.state = OFF
        a.state[0].owned -= 1
    plan_end(a, d)
    rank(a, d)


@compiled
def finish(a, now):
    """End the session that finishes first of all; returns its device."""
    k, setup = step_off(a, now), a.setup[0]
    s = a.slots[k]
    d = s.device
    behind_s = max(s.peak_s, now - setup.frame_s * a.devices[d].clock - s.lag_s)
    _judge(a, s, now, max(behind_s - s.heard_s - setup.start_buffer_s, 0.0))
    leave(a, k, DONE, now)
    settle(a, d)
    return d


@compiled
def _judge(a, s, now, stall_s):
    """Record the metrics of a completed session, and whether it met the limits of its class."""
    if len(a.kept) > 0:
        a.kept[s.number].stall_s = stall_s
    if s.window >= 0 and s.class_index >= 0:
        rtf = s.rtf_ratio * (now - s.start_s) / (s.frames * a.setup[0].frame_s)
        note(a, s, RTF, rtf)
        note(a, s, STALL, stall_s)
        note(a, s, STAY, now - s.arrival_s)
        limits = a.limits[s.class_index]
        if s.ttfa_s <= limits[TTFA] and rtf <= limits[RTF] and stall_s <= limits[STALL]:
            count(a, s, GOOD)


@compiled
def empty(a, d, now):
    """Remove the sessions of a device, each with the frames that it has made, ordered by number in its heap."""
    advance(a, d, now)
    device, state, frame_s = a.devices[d], a.state[0], a.setup[0].frame_s
    n = device.active
    for i in range(n):
        k = a.members[d, i]
        s = a.slots[k]
        s.done = s.until - (a.targets[d, i] - device.clock)
        behind_s = now - frame_s * device.clock - s.lag_s
        s.peak_s, s.lag_s = max(s.peak_s, behind_s), now - behind_s
        push(a.targets[d], a.members[d], i, float(s.number), k)
    device.active, device.bytes = 0, 0
    state.active -= n
    state.busy -= n > 0
    return n
