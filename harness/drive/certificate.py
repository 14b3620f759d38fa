"""The certificate of one load test: it applies the gates of ``validity`` to what the test observed."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from harness.client.target import is_this_host
from harness.drive.generator import LoadSettings, arrival_times
from harness.drive.observed import Observed
from harness.drive.validity import (
    MAX_LATENESS_P99_S,
    Certificate,
    Due,
    Gate,
    certify,
    undisturbed,
    undisturbed_rungs,
    unhurried,
    worst_of,
)
from harness.records import metrics
from harness.records.load_log import mixture
from harness.records.load_test import HeldRung
from harness.records.summary import Summary

ERRORS_SHOWN = 3  # kinds of error; requests.csv lists all of them
_NS = 1e9


def window_start_ns(observed: Observed) -> int:
    """Start of the window, in ns.

    An open loop that started empty has a warm-up, which is cut. Other loads are at their level from the start, or never
    reach a steady one.
    """
    arrivals = observed.settings.load.arrivals
    if arrivals is None or observed.settings.load.steady or not arrivals.is_steady:
        return observed.start_ns
    return metrics.settled_ns(observed.results, observed.start_ns, observed.end_ns)


def certificate_of(observed: Observed, summary: Summary, start_ns: int) -> Certificate:
    """Judge the window [start_ns, end_ns), whose ``metrics.summarise`` is ``summary``."""
    lateness_s, notes = _lateness_s(observed, summary.lateness_p99_s)
    certificate = certify(
        replace(summary, lateness_p99_s=lateness_s),
        submitted=observed.readers.submitted,
        recorded=observed.recorded,
        due=_due(observed, start_ns),
        slos=observed.settings.mix.slos,
        unsteady=_unsteady(observed.settings),
        failures=_failures(observed),
        notes=(
            *_errors(observed),
            *observed.readers.notes,
            *_servers(observed),
            *notes,
            *observed.host.events,
            *_repeats(observed.rungs),
        ),
    )
    certificate = replace(certificate, gates=(*certificate.gates, *_disturbance(observed, start_ns)))
    faults = (*observed.faults, *observed.readers.faults, *mixture(observed.results), *_unknown_clocks(observed))
    return replace(certificate, gates=(*(Gate("load", False, fault) for fault in faults), *certificate.gates))


def _failures(observed: Observed) -> str:
    """How many requests failed, of all that were sent, inside the window or not; "" where none did."""
    failed, requests = len(observed.failed()), len(observed.results)
    return f"{failed} of {requests} requests failed ({100 * failed / requests:.3g}%)" if failed else ""


def _errors(observed: Observed) -> Iterator[str]:
    """The most frequent kinds of error, each with its first message (messages of one kind may differ in numbers)."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for result in observed.failed():
        kinds[re.sub(r"\d+", "", result.error)].append(result.error)
    for errors in sorted(kinds.values(), key=len, reverse=True)[:ERRORS_SHOWN]:
        yield f"{len(errors)} failed with: {errors[0]}"


def _servers(observed: Observed) -> Iterator[str]:
    servers = observed.by_server()
    if len(servers) > 1:
        shares = ", ".join(f"{each.address} {each.requests}" for each in servers)
        yield f"requests to each of {len(servers)} servers, {observed.target.balance}: {shares}"
    for each in servers:
        if each.reconnects:
            yield f"connections to {each.address} that were lost and re-established: {each.reconnects}"
        if each.passed_over:
            yield f"requests that skipped {each.address} because it was down: {each.passed_over}"
        if each.forgotten:
            yield (
                f"{each.address} reports at least {each.forgotten} fewer requests than were sent: "
                "the server, or its entry model, was restarted (or several servers answer at this address)"
            )
    for address in sorted(_clockless(observed, emulated=False)):
        yield f"{address} does not give its configuration: its time is taken to be undilated"


def _unknown_clocks(observed: Observed) -> Iterator[str]:
    """Emulated servers that may run with time dilation, which nobody knows."""
    for address in sorted(_clockless(observed, emulated=True)):
        yield (
            f"{address} emulates a GPU and does not give its configuration, so its time dilation is not known: let "
            "this client ask for it (ModelConfig of Triton, --grpc-restricted-protocol)"
        )


def _clockless(observed: Observed, *, emulated: bool) -> set[str]:
    """Servers that did not tell their time dilation, either those that emulate a GPU or the others."""
    emulating = {each.target for each in observed.results if each.emulated}
    return {each for each in observed.readers.connections.clockless if (each in emulating) == emulated}


def _unsteady(settings: LoadSettings) -> str:
    """Why the load is not expected to be steady; "" where it is."""
    if settings.load.sessions:
        return "not required: the load of a ladder rises by design"
    arrivals = settings.load.arrivals
    if arrivals is not None and not arrivals.is_steady:
        return f"not required: the rate of {arrivals.kind} arrivals changes by design"
    return ""


def _disturbance(observed: Observed, start_ns: int) -> Iterator[Gate]:
    """Whether others took CPU that the test needed: over its window, or in too many rungs of a ladder.

    With time dilation also whether the servers' host was too busy, where that is this host.
    """
    if observed.host.samples:
        if observed.settings.load.sessions:
            yield undisturbed_rungs(observed.rungs)
        else:
            yield undisturbed(observed.host.load(start_ns, observed.end_ns), observed.settings.max_others)
    if observed.dilation != 1 and not is_this_host(observed.target):
        yield Gate("host share", None, "not testable: a server is on another host, whose CPU is not known here")
    elif observed.dilation != 1:
        yield unhurried(_busiest(observed, start_ns), observed.dilation)


def _busiest(observed: Observed, start_ns: int) -> float | None:
    """The share of the host that the run used: over the window, or in the busiest rung of a ladder. None: not known."""
    windows = [(start_ns, observed.end_ns)]
    if observed.settings.load.sessions:
        windows = [(each.start_ns, each.end_ns) for each in observed.rungs if not each.disturbed]
    loads = [load for window in windows if (load := observed.host.load(*window))]
    return max((load.own / load.cores for load in loads), default=None)


def _repeats(rungs: Sequence[HeldRung]) -> Iterator[str]:
    """The disturbed rungs of a ladder: what became of them, and what others took at most."""
    disturbed = [each for each in rungs if each.disturbed]
    if disturbed:
        last = {each.users: each for each in rungs}
        again = [each.users for each in disturbed if each is not last[each.users]]
        left_out = [each.users for each in disturbed if each is last[each.users]]
        counts = (("measured again", again), ("left out", left_out))
        words = "; ".join(f"{what}: rungs of {', '.join(map(str, users))} sessions" for what, users in counts if users)
        yield f"disturbed and {words}; {worst_of(disturbed).disturbed}"


def _due(observed: Observed, start_ns: int) -> Due | None:
    settings, origin_ns, end_ns = observed.settings, observed.start_ns, observed.end_ns
    arrivals = settings.load.arrivals
    if arrivals is None:
        return None
    due_ns = (origin_ns + round(time_s * _NS) for time_s in arrival_times(settings))
    due_ns = list(itertools.takewhile(lambda each: each < end_ns, due_ns))
    inside = [each for each in due_ns if each >= start_ns]
    from_s, to_s = ((edge_ns - origin_ns) / _NS for edge_ns in (start_ns, end_ns))
    ended_by_count = len(due_ns) == settings.load.iterations
    expected = math.nan if ended_by_count else arrivals.expected(to_s) - arrivals.expected(from_s)
    return Due(arrivals, len(inside), expected, _farthest_s(observed, inside, start_ns))


def _farthest_s(observed: Observed, due_ns: Sequence[int], start_ns: int) -> float:
    """The largest difference between due times as recorded and as the process generates them; 0 if counts differ."""
    own_ns = sorted(each.due_ns for each in observed.results if start_ns <= each.due_ns < observed.end_ns)
    if len(own_ns) != len(due_ns):
        return 0.0
    return max((abs(one - other) for one, other in zip(own_ns, due_ns, strict=True)), default=0) / _NS


def _lateness_s(observed: Observed, lateness_s: float) -> tuple[float, list[str]]:
    """The lateness to judge: that of chunks, or of the readers' own timers where chunk lateness says nothing."""
    lag_p99_s = observed.readers.lag_p99_s
    if not observed.readers.share_servers_clock:
        return lag_p99_s, ["chunk lateness is not known: the clock of the server is not that of the readers"]
    if not lateness_s > MAX_LATENESS_P99_S >= lag_p99_s:
        return lateness_s, []
    return lag_p99_s, [
        f"chunks came up to {lateness_s * 1e3:.0f} ms (p99) after the server had stamped them; the readers "
        f"were on time to {lag_p99_s * 1e3:.1f} ms (p99), so the server delivered them late"
    ]
