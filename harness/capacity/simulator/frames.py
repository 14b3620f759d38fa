"""Compiled: the frame loop of one device, stage by stage: queues, delays, batches, instances, and a shared GPU.

Sessions go round the stages for ever; a stage takes those that wait, in order, when an instance is free and either a
full batch is there or the first has waited out the delay, at least ``wake_s``. All that happens at one time is seen
together.
"""

from __future__ import annotations

import math

from harness.capacity.simulator.compiled import compiled
from harness.jit import kept


@compiled
def _next_s(w):
    """The time of the next event: a session reaches a stage, a batch ends, or a delay ends at a free instance."""
    loop = w.loop[0]
    now = w.sessions[w.coming[loop.first]].came_s if loop.on_way > 0 else math.inf
    if loop.begun < len(w.sessions):
        now = min(now, w.sessions[loop.begun].came_s)
    for i in range(len(w.instances)):
        now = min(now, w.instances[i].end_s)
    for i in range(len(w.stages)):
        stage = w.stages[i]
        if stage.free > 0 and stage.waiting > 0:
            now = min(now, w.sessions[stage.head].came_s + max(stage.delay_s, loop.wake_s))
    return now


@compiled
def _send(w, k, at_s):
    """Send a session to a stage; those on the way are kept in the order of their arrival."""
    loop, size = w.loop[0], len(w.coming)
    w.sessions[k].came_s = at_s
    place = loop.first + loop.on_way
    while place > loop.first and w.sessions[w.coming[(place - 1) % size]].came_s > at_s:
        w.coming[place % size] = w.coming[(place - 1) % size]
        place -= 1
    w.coming[place % size] = k
    loop.on_way += 1


@compiled
def _end_batch(w, instance, now):
    """Send the sessions of a batch to the next stage; after the last stage, one after another, and count a frame."""
    loop, k, stage = w.loop[0], instance.head, w.stages[instance.stage]
    at_s, apart = now + loop.hop_s, loop.apart_s > 0 and instance.stage == len(w.stages) - 1
    instance.end_s = math.inf
    stage.free += 1
    while k >= 0:
        s = w.sessions[k]
        following = s.next
        s.stage += 1
        if s.stage == len(w.stages):
            s.stage = 0
            s.frames += 1
            if loop.warm_up < s.frames <= loop.frames:
                w.gaps_s[k, s.frames - loop.warm_up - 1] = now - s.made_s
            loop.left -= s.frames == loop.frames
            s.made_s = now
        _send(w, k, at_s)
        if apart:
            at_s += loop.apart_s * w.apart[loop.spaced % len(w.apart)]
            loop.spaced += 1
        k = following


@compiled
def _come(w, now):
    """Put sessions that start, or that have reached their next stage, into its queue."""
    loop = w.loop[0]
    while loop.begun < len(w.sessions) and w.sessions[loop.begun].came_s <= now:
        _join(w, loop.begun)
        loop.begun += 1
    while loop.on_way > 0 and w.sessions[w.coming[loop.first]].came_s <= now:
        k = w.coming[loop.first]
        loop.first, loop.on_way = (loop.first + 1) % len(w.coming), loop.on_way - 1
        _join(w, k)


@compiled
def _join(w, k):
    stage = w.stages[w.sessions[k].stage]
    w.sessions[k].next = -1
    if stage.waiting == 0:
        stage.head = k
    else:
        w.sessions[stage.tail].next = k
    stage.tail = k
    stage.waiting += 1


@compiled
def _take(w, stage, size):
    """Remove the first ``size`` sessions from a stage's queue; returns the last of them."""
    last = stage.head
    for _ in range(size - 1):
        last = w.sessions[last].next
    stage.head = w.sessions[last].next
    w.sessions[last].next = -1
    stage.waiting -= size
    return last


@compiled
def _begin(w, i, now):
    """Give a free instance a batch, if one is ready."""
    loop, instance = w.loop[0], w.instances[i]
    stage = w.stages[instance.stage]
    if instance.end_s == math.inf and instance.ahead > 0:
        instance.head = instance.ahead_head
        _execute(w, i, instance.ahead, now)
        instance.ahead = 0
    if instance.ahead > 0:
        if stage.delay_s > 0:
            _join_ahead(w, instance)
        return
    if stage.waiting == 0 or (instance.end_s < math.inf and loop.prefetch == 0):
        return
    if stage.waiting < stage.max_batch and w.sessions[stage.head].came_s + max(stage.delay_s, loop.wake_s) > now:
        return
    size, head = min(stage.waiting, stage.max_batch), stage.head
    last = _take(w, stage, size)
    stage.free -= 1
    if instance.end_s < math.inf:
        instance.ahead_head, instance.ahead, instance.ahead_tail = head, size, last
    else:
        instance.head = head
        _execute(w, i, size, now)


@compiled
def _join_ahead(w, instance):
    """Add sessions that arrive while a batch waits for its instance to that batch, as far as there is room."""
    stage = w.stages[instance.stage]
    size, head = min(stage.waiting, stage.max_batch - instance.ahead), stage.head
    if size > 0:
        last = _take(w, stage, size)
        w.sessions[instance.ahead_tail].next = head
        instance.ahead_tail = last
        instance.ahead += size


@compiled
def _execute(w, i, size, now):
    """Execute an instance's batch."""
    loop, instance = w.loop[0], w.instances[i]
    stage = w.stages[instance.stage]
    takes_s = (stage.tau0_s + stage.alpha_s * size) * w.noise[loop.drawn % len(w.noise)]
    loop.drawn += 1
    instance.end_s = (max(now, loop.gpu_free_s) if loop.one_gpu else now) + takes_s
    loop.gpu_free_s = max(loop.gpu_free_s, instance.end_s)
    instance.end_s += loop.host_s + stage.host_s + (loop.host_each_s + stage.host_each_s) * size
    stage.executions += 1
    stage.served += size


@kept
def run(w):
    """Run until each session has made ``frames`` frames; ``gaps_s`` holds the times after the warm-up."""
    while w.loop[0].left > 0:
        now = _next_s(w)
        for i in range(len(w.instances)):
            if w.instances[i].end_s <= now:
                _end_batch(w, w.instances[i], now)
        _come(w, now)
        for i in range(len(w.instances)):
            _begin(w, i, now)
