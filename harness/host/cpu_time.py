"""CPU time of this host and of each of its processes, read from /proc."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class HostTime:
    """CPU time of the host since boot, in seconds, of ``cores`` together, read at ``at_s`` of the monotonic clock.

    ``idle_s`` includes waiting for disks. ``interrupts_s`` belongs to no process. ``counted_s`` is the sum of all.
    """

    at_s: float
    cores: int
    idle_s: float
    stolen_s: float
    interrupts_s: float
    counted_s: float

    @classmethod
    def read(cls) -> HostTime:
        """Raises OSError where there is no /proc/stat."""
        with (_PROC / "stat").open() as file:
            at_s = time.monotonic()
            whole, *each = [line.split()[1:9] for line in file if line.startswith("cpu")]
        user, nice, system, idle, waiting, irq, soft_irq, stolen = (int(ticks) / _TICKS_PER_S for ticks in whole)
        interrupts_s = irq + soft_irq
        counted_s = user + nice + system + idle + waiting + interrupts_s + stolen
        return cls(at_s, len(each), idle + waiting, stolen, interrupts_s, counted_s)


@dataclass(frozen=True, slots=True)
class ProcessTime:
    """CPU seconds of one process since it started: its own, and those of children that it has waited for."""

    pid: int
    parent: int
    name: str
    started: int  # ticks since boot; tells two processes of one pid apart
    own_s: float
    reaped_s: float

    @property
    def total_s(self) -> float:
        return self.own_s + self.reaped_s

    def same_as(self, other: ProcessTime | None) -> bool:
        return other is not None and (self.pid, self.started) == (other.pid, other.started)


def processes() -> dict[int, ProcessTime]:
    """Every process that is visible from here, by pid."""
    found = {}
    for entry in os.listdir(_PROC):
        if entry.isdigit() and (process := _process(entry)):
            found[process.pid] = process
    return found


def descendants(processes: Mapping[int, ProcessTime], roots: Iterable[int]) -> set[int]:
    """The pids of ``roots`` that exist, and of everything below them."""
    children = defaultdict(list)
    for each in processes.values():
        children[each.parent].append(each.pid)
    found, todo = set(), [pid for pid in roots if pid in processes]
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children[pid]
    return found


def used_s(before: Mapping[int, ProcessTime], now: Mapping[int, ProcessTime]) -> dict[int, float]:
    """CPU seconds that each process of ``now`` used since ``before``, with those of children that ended meanwhile.

    What a child had used by ``before`` is taken from its nearest living ancestor, whose time of children it is part of
    once the child was waited for. Where nobody waits for children, the last part of their time is lost.
    """
    ended: dict[int, float] = defaultdict(float)
    for each in before.values():
        if not each.same_as(now.get(each.pid)):
            ended[_survivor(each, before, now)] += each.total_s
    return {pid: _used_s(before.get(pid), each, ended[pid]) for pid, each in now.items()}


def used_by(used: Mapping[int, float], members: Set[int]) -> float:
    """CPU seconds of ``used_s`` of some processes together."""
    return sum(used.get(pid, 0.0) for pid in members)


def _used_s(before: ProcessTime | None, now: ProcessTime, ended_s: float) -> float:
    known = before if now.same_as(before) else None
    own_s, total_s = (now.own_s - known.own_s, now.total_s - known.total_s) if known else (now.own_s, now.total_s)
    return max(total_s - ended_s, own_s, 0.0)


def _survivor(process: ProcessTime, before: Mapping[int, ProcessTime], now: Mapping[int, ProcessTime]) -> int:
    """The pid of the nearest ancestor that still exists; 0 where there is none."""
    parent = before.get(process.parent)
    while parent is not None and not parent.same_as(now.get(parent.pid)):
        parent = before.get(parent.parent)
    return parent.pid if parent else 0


def _process(pid: str) -> ProcessTime | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            head, _, rest = file.read().rpartition(b")")
    except OSError:  # it has ended
        return None
    name, fields = head.partition(b"(")[2].decode(errors="replace"), rest.split()
    user, system, reaped_user, reaped_system = (int(ticks) / _TICKS_PER_S for ticks in fields[11:15])
    return ProcessTime(int(pid), int(fields[1]), name, int(fields[19]), user + system, reaped_user + reaped_system)
