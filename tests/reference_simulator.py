"""The simulator again, slow and plain: lists that are searched, one loop. What the compiled one is held against."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from harness import wire
from harness.capacity.simulator.pool import Pool

FRAME_S = wire.SECONDS_PER_FRAME


@dataclass(eq=False)
class Session:
    number: int
    arrival_s: float
    frames: float
    context: float
    first_s: float
    ttfa_ratio: float
    pick: float
    bytes: int
    outcome: str = ""
    entered_s: float = math.nan
    start_s: float = math.nan
    first_audio_s: float = math.nan
    end_s: float = math.nan
    stall_s: float = math.nan
    device: int = -1
    active_at_start: int = 0
    done: float = 0.0
    target: float = math.nan
    made: float = 0.0  # frames that a listener who heard the start has been given, since ``start_s``
    lags: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Device:
    number: int
    state: str
    sessions: list[Session] = field(default_factory=list)
    queue: list[Session] = field(default_factory=list)
    clock: float = 0.0
    moved_s: float = 0.0
    context: float = 0.0
    end_s: float = math.inf
    ready_s: float = 0.0


class Reference:
    """``run(arrivals)`` plays a Pool; ``sessions`` then hold what became of each, ``log`` the loads after events."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self.devices = [Device(i, "up" if i < pool.devices else "off") for i in range(pool.places)]
        self.queue: list[Session] = []  # all that wait, in order of entering
        self.sessions: list[Session] = []
        self.log: list[tuple] = []
        self.turn = 0
        self.scaled_s = -math.inf
        self.wishes = [pool.devices] * (pool.autoscaler.wishes if pool.autoscaler else 0)

    # One device

    def step(self, device: Device) -> tuple[float, float]:
        """Seconds of a step, and by how many it grows a frame."""
        n = len(device.sessions)
        base, token = (table[n] for table in self.pool.tables(n))
        return base + token * device.context, token * self.pool.tokens_per_frame * n

    def advance(self, device: Device, now: float) -> None:
        if n := len(device.sessions):
            passed = now - device.moved_s
            step, bend = self.step(device)
            frames = passed / step
            if bend > 0:
                frames = 2 * passed / (step + math.sqrt(step * step + 2 * bend * passed))
            device.clock += frames
            device.context += self.pool.tokens_per_frame * n * frames
        device.moved_s = now
        self.look(device)

    def look(self, device: Device) -> None:
        for each in device.sessions:
            made = each.frames - (each.target - device.clock)
            each.lags.append(device.moved_s - each.start_s - FRAME_S * made)

    def plan(self, device: Device) -> None:
        device.end_s = math.inf
        if device.sessions:
            step, bend = self.step(device)
            left = max(min(each.target for each in device.sessions) - device.clock, 0.0)
            device.end_s = device.moved_s + left * (step + bend * left / 2)
        else:
            device.context = 0.0

    def start(self, session: Session, device: Device, now: float) -> None:
        self.advance(device, now)
        device.sessions.append(session)
        device.context += session.context + self.pool.tokens_per_frame * session.done
        session.target = device.clock + (session.frames - session.done)
        if math.isnan(session.start_s):
            session.start_s, session.device, session.active_at_start = now, device.number, len(device.sessions)
            first_s, steps = self.pool.first_audio
            session.first_audio_s = now + session.ttfa_ratio * (
                session.first_s + first_s + steps * self.step(device)[0]
            )
            session.lags = []
        session.lags.append(now - session.start_s - FRAME_S * session.done)
        session.outcome = "active"
        self.plan(device)

    def finish(self, device: Device, now: float) -> None:
        self.advance(device, now)
        session = min(device.sessions, key=lambda each: each.target)
        device.clock = session.target
        self.look(device)
        device.sessions.remove(session)
        device.context -= session.context + self.pool.tokens_per_frame * session.frames
        session.done = session.frames
        patience = session.first_audio_s - session.start_s + self.pool.start_buffer_s
        session.stall_s = max(max(session.lags) - patience, 0.0)
        self.leave(session, "done", now)
        if device.state == "draining" and not device.sessions and not device.queue:
            device.state = "off"
        self.plan(device)
        self.admit(device, now)

    def leave(self, session: Session, outcome: str, now: float) -> None:
        session.outcome, session.end_s = outcome, now

    # Where a session goes

    def fits(self, session: Session, device: Device) -> bool:
        room = self.pool.memory_bytes - sum(each.bytes for each in device.sessions)
        return len(device.sessions) < (self.pool.session_limit or math.inf) and session.bytes <= room

    def with_room(self, session: Session) -> Device | None:
        up = [each for each in self.devices if each.state == "up"]
        if not up:
            return None
        fewest = min(up, key=lambda each: len(each.sessions))
        if self.fits(session, fewest):
            return fewest
        fitting = [each for each in up if self.fits(session, each)]
        return min(fitting, key=lambda each: sum(one.bytes for one in each.sessions), default=None)

    def choose(self, session: Session) -> Device | None:
        up = [each for each in self.devices if each.state == "up"]
        if not up:
            return None
        if self.pool.routing == "least_loaded":
            return min(up, key=lambda each: len(each.sessions) + len(each.queue))
        if self.pool.routing == "random":
            return up[int(session.pick * len(up))]
        order = self.devices[self.turn :] + self.devices[: self.turn]
        device = next(each for each in order if each.state == "up")
        self.turn = (device.number + 1) % len(self.devices)
        return device

    def place(self, session: Session, now: float) -> None:
        shared = self.pool.routing == "shared"
        device = self.with_room(session) if shared else self.choose(session)
        queue = self.queue if shared or device is None else device.queue
        if device and not queue and self.fits(session, device):
            self.start(session, device, now)
            return
        limit = math.inf if self.pool.queue_limit is None else self.pool.queue_limit
        if len(queue) < limit and session.bytes <= self.pool.memory_bytes and (shared or device):
            session.outcome, session.entered_s = "waiting", now
            self.queue.append(session)
            if not shared:
                device.queue.append(session)
        else:
            self.leave(session, "refused", now)

    def admit(self, device: Device, now: float) -> None:
        while True:
            shared = self.pool.routing == "shared"
            queue = self.queue if shared else device.queue
            if not queue:
                return
            chosen = self.with_room(queue[0]) if shared else device
            if chosen is None or not self.fits(queue[0], chosen):
                return
            self.start(self.step_out(queue[0])[0], chosen, now)

    def step_out(self, session: Session) -> tuple[Session, Device | None]:
        self.queue.remove(session)
        device = next((each for each in self.devices if session in each.queue), None)
        if device:
            device.queue.remove(session)
        return session, device

    # What else happens

    def time_out(self, now: float) -> None:
        session, device = self.step_out(self.queue[0])
        self.leave(session, "gave up", now)
        if device and device.state == "draining" and not device.sessions and not device.queue:
            device.state = "off"
        self.admit(device, now)

    def fail(self, device: Device, now: float) -> None:
        if device.state == "off":
            return
        self.advance(device, now)
        for each in device.sessions:
            each.done = each.frames - (each.target - device.clock)
        struck = sorted(device.sessions, key=lambda each: each.number) + device.queue
        device.sessions, device.state = [], "down"
        self.plan(device)
        for each in struck:
            if each in self.queue:
                self.step_out(each)
            if self.pool.on_failure == "lose":
                self.leave(each, "lost", now)
                continue
            if self.pool.on_failure == "restart":
                each.done, each.start_s = 0.0, math.nan
            self.place(each, now)

    def drain(self, device: Device) -> None:
        if device.state == "up":
            device.state = "draining" if device.sessions or device.queue else "off"
        elif device.state == "starting":
            device.state = "off"

    def raise_(self, device: Device, now: float) -> None:
        if device.state != "up":
            device.state = "up"
            self.admit(device, now)

    def wish(self, now: float) -> int:
        policy = self.pool.autoscaler
        load = len(self.queue) + sum(len(each.sessions) for each in self.devices)
        coming = sum(each.state in ("up", "starting") for each in self.devices)
        inside = policy.low * coming <= load <= policy.high * coming
        wished = coming if inside else math.ceil(load / policy.target)
        wished = max([wished] + [count for at_s, count in policy.floors if at_s <= now][-1:])
        self.wishes = (self.wishes + [wished])[-policy.wishes :]
        if wished < coming:
            wished = min(coming, max(self.wishes))
        return min(max(wished, policy.least), policy.most)

    def scale(self, now: float) -> None:
        policy, wanted = self.pool.autoscaler, self.wish(now)
        coming = sum(each.state in ("up", "starting") for each in self.devices)
        if wanted > coming:
            self.scaled_s = now
            more = [each for each in self.devices if each.state == "draining" and policy.recalls]
            more += [each for each in self.devices if each.state == "off"]
            for each in more[: wanted - coming]:
                if each.state == "draining":
                    self.raise_(each, now)
                else:
                    each.state, each.ready_s = "starting", now + policy.lag_s
        elif wanted < coming and now - self.scaled_s >= policy.hold_s:
            self.scaled_s = now
            starting = [each for each in self.devices if each.state == "starting"]
            for each in starting[: coming - wanted]:
                each.state = "off"
            for _ in range(coming - wanted - len(starting)):
                up = [each for each in self.devices if each.state == "up"]
                fewest = min(up, key=lambda each: len(each.sessions) + len(each.queue))
                self.drain(max(up, key=lambda each: (each.ready_s, each.number)) if policy.newest else fewest)

    # The loop

    def run(self, arrivals, stop_s: float = math.inf) -> Reference:
        names = ("number", "arrival_s", "frames", "context", "first_s", "ttfa_ratio", "pick", "bytes")
        columns = [arrivals[name].tolist() for name in names[1:]]
        coming = [Session(*row) for row in zip(range(len(arrivals)), *columns, strict=True)]
        planned = sorted(self.pool.planned, key=lambda each: each.at_s)
        tick_s = self.pool.autoscaler.every_s if self.pool.autoscaler else math.inf
        while True:
            ends = min(self.devices, key=lambda each: each.end_s)
            readies = [each for each in self.devices if each.state == "starting"]
            ready = min(readies, key=lambda each: each.ready_s, default=None)
            events = [
                (ends.end_s, "end"),
                (planned[0].at_s if planned else math.inf, "planned"),
                (ready.ready_s if ready else math.inf, "ready"),
                (tick_s, "tick"),
                (self.queue[0].entered_s + self.pool.patience_s if self.queue else math.inf, "time out"),
                (coming[0].arrival_s if coming else math.inf, "arrival"),
            ]
            now, kind = min(events, key=lambda each: each[0])
            if now > stop_s or now == math.inf:
                break
            if kind == "end":
                self.finish(ends, now)
            elif kind == "planned":
                what = planned.pop(0)
                device = self.devices[what.device]
                if what.action == "fail":
                    self.fail(device, now)
                elif what.action == "drain":
                    self.drain(device)
                elif what.action == "raise" or device.state == "down":
                    self.raise_(device, now)
            elif kind == "ready":
                self.raise_(ready, now)
            elif kind == "tick":
                self.scale(now)
                tick_s += self.pool.autoscaler.every_s
            elif kind == "time out":
                self.time_out(now)
            else:
                self.sessions.append(coming.pop(0))
                self.place(self.sessions[-1], now)
            loads = [(len(each.sessions), len(each.queue), each.state) for each in self.devices]
            self.log.append((now, kind, loads, len(self.queue)))
        for device in self.devices:
            self.advance(device, stop_s if stop_s < math.inf else device.moved_s)
            for each in device.sessions:
                each.done = each.frames - (each.target - device.clock)
        return self
