"""Whether others took CPU that a run needed: a pure decision on samples of the host."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LEAST_NEEDED = 0.5  # cores: a run that uses less is judged as if it used this much
LEAST_S = 0.5  # of samples; a shorter window is not judged


@dataclass(frozen=True)
class HostSample:
    """The host over the ``seconds`` up to ``at_ns``. Shares are of all cores; NaN where unknown, as at first.

    ``other_share`` is what neither the harness nor the server used; a little below 0 at times, since the clocks of the
    kernel differ. ``others``: the name, pid and cores of the processes that used most of it.
    """

    at_ns: int
    seconds: float
    stolen_share: float  # by the hypervisor
    busy_share: float
    own_share: float  # of harness and server
    other_share: float
    server_memory_bytes: int = 0  # of the server and its children; 0 if it runs on another host
    others: tuple[tuple[str, int, float], ...] = ()

    @property
    def felt_share(self) -> float:
        """What of ``other_share`` was missing to the run.

        All where nothing was idle, nothing where as much was idle as the run used, and in proportion in between: the
        scheduler finds an idle core most of the time, but not always, and two cores may be two threads of one.
        """
        idle_share = max(1 - self.busy_share - self.stolen_share, 0.0)
        if self.own_share <= 0:
            return 0.0 if idle_share else self.other_share
        return self.other_share * max(1 - idle_share / self.own_share, 0.0)


@dataclass(frozen=True)
class HostLoad:
    """A window: mean cores (of ``cores``) that the run used, that others used, and that the hypervisor took.

    ``felt``: of the last two, what was missing to the run. ``most``: who used most of the others' time.
    """

    cores: int
    own: float
    others: float
    stolen: float
    felt: float
    most: str = ""

    @property
    def felt_share(self) -> float:
        """What was missing to the run, as a share of the cores that it needs."""
        return self.felt / max(self.own, LEAST_NEEDED)

    @property
    def others_share(self) -> float:
        """Of all cores."""
        return self.others / self.cores

    @property
    def stolen_share(self) -> float:
        """Of all cores."""
        return self.stolen / self.cores

    def says(self) -> str:
        """What others and the hypervisor took."""
        stolen = f", and the hypervisor {self.stolen:.2f}" if self.stolen >= 0.005 else ""
        return f"others took {self.others:.2f} of {self.cores} cores{stolen}"

    def disturbed(self, max_others: float) -> str:
        """Why the window is disturbed: more than ``max_others`` of the cores that the run needs was missing; or ""."""
        if self.felt_share <= max_others:
            return ""
        most = f" ({self.most})" if self.most else ""
        of = f"{self.felt_share:.0%} of the {self.own:.2f} that it used"
        return f"{self.says()}: about {self.felt:.2f} were missing to the run, {of}{most}"


def load_between(samples: Sequence[HostSample], cores: int, start_ns: int, end_ns: int) -> HostLoad | None:
    """The means over [start_ns, end_ns), each sample weighted by its overlap; None where they are unknown."""
    inside = list(_overlaps(samples, start_ns, end_ns))
    seconds = sum(weight for _, weight in inside)
    if seconds < LEAST_S:
        return None

    def mean(name: str) -> float:
        return cores * max(sum(getattr(each, name) * weight for each, weight in inside) / seconds, 0.0)

    own, others, stolen = mean("own_share"), mean("other_share"), mean("stolen_share")
    felt = mean("felt_share") + stolen
    return HostLoad(cores, own, others, stolen, felt, _most(inside, seconds))


def _overlaps(samples: Sequence[HostSample], start_ns: int, end_ns: int) -> Iterator[tuple[HostSample, float]]:
    """The samples whose shares are known, each with its seconds inside the window."""
    for each in samples:
        inside_s = (min(each.at_ns, end_ns) - max(each.at_ns - each.seconds * 1e9, start_ns)) / 1e9
        if inside_s > 0 and not math.isnan(each.other_share):
            yield each, inside_s


def _most(inside: Sequence[tuple[HostSample, float]], seconds: float) -> str:
    """Who used most of the others' time, and how many cores on average."""
    used: dict[str, float] = defaultdict(float)
    pids: dict[str, set[int]] = defaultdict(set)
    for sample, weight in inside:
        for name, pid, cores in sample.others:
            used[name] += cores * weight / seconds
            pids[name].add(pid)
    if not used:
        return ""
    name = max(used, key=lambda each: used[each])
    who = f"process {min(pids[name])}" if len(pids[name]) == 1 else f"{len(pids[name])} processes"
    return f"{name}, {who}, took {used[name]:.2f}"
