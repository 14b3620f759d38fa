"""When a run counts: each gate with its figure and its limit, and VALID or INVALID from all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from harness.arrivals import Arrivals
from harness.metrics import LATE_SEND_S, MIN_PARTS

MAX_RATE_ERROR = 0.01
MAX_LATE_SENDS_SHARE = 0.01
MAX_LATENESS_P99_S = 0.010
MAX_LITTLE_RESIDUAL = 0.05
MIN_RESIDENCES = 20  # in a shorter window, requests cut off at its ends exceed Little's limit by themselves
TREND_P_VALUE = 0.01
_SIGMAS = 4  # of the number of arrivals: one run in 16,000 is beyond


@dataclass(frozen=True)
class Gate:
    """One thing that was looked at. ``passed`` None: it could not be tested, or is not ``asked`` of such a load."""

    name: str
    passed: bool | None
    says: str
    asked: bool = True


@dataclass(frozen=True)
class Certificate:
    """The gates of one run, and notes that judge nothing. ``failures``: how many requests failed, "" if none did."""

    gates: tuple[Gate, ...]
    notes: tuple[str, ...] = ()
    failures: str = ""

    @property
    def valid(self) -> bool:
        return all(gate.passed is not False for gate in self.gates)

    @property
    def verdict(self) -> str:
        """In one line. VALID is the measurement, not the server: what that failed is said at once."""
        if not self.valid:
            return "INVALID: " + "; ".join(gate.says for gate in self.gates if gate.passed is False)
        return f"VALID, but {self.failures}" if self.failures else "VALID"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is INVALID, then what could not be tested, then the notes."""
        failed = (gate.says for gate in self.gates if gate.passed is False)
        untested = (f"{gate.name}: {gate.says}" for gate in self.gates if gate.passed is None and gate.asked)
        return (*failed, *untested, *filter(None, [self.failures]), *self.notes)


@dataclass(frozen=True)
class Due:
    """What the arrival process had in the window: ``count`` with its seed, ``expected`` in the mean of all seeds.

    ``expected`` is NaN where the test ended by the count itself.
    """

    arrivals: Arrivals
    count: int
    expected: float


def certify(
    summary: Mapping[str, float],
    *,
    submitted: int,
    recorded: int,
    due: Due | None = None,
    unsteady: str = "",
    failures: str = "",
    notes: tuple[str, ...] = (),
) -> Certificate:
    """Judge a ``metrics.summarise``. ``due`` None is a closed loop; ``unsteady`` says why steadiness is not asked for.

    ``failures`` are said, not judged: it is a true measurement of a server that fails requests. ``lateness_p99_s`` is
    judged as it stands in ``summary``: NaN where it is not known.
    """
    gates = [_recorder(submitted, recorded), _audio(summary), _timestamps(summary)]
    if due is not None:
        gates = [*_schedule(summary, due), *gates]
    steadiness = [Gate("steady state", None, unsteady, asked=False)] if unsteady else _steadiness(summary)
    return Certificate((*gates, *steadiness), notes, failures)


def _schedule(summary: Mapping[str, float], due: Due) -> Iterator[Gate]:
    """Sends against what was due, and what was due against the process: exactly, and in its statistics."""
    offered, sent = summary["offered_rate_per_s"], summary["achieved_rate_per_s"]
    says = f"{sent:.4g} requests/s were sent of {offered:.4g} due"
    apart = abs(sent - offered) > MAX_RATE_ERROR * offered
    yield Gate("sends", not apart, says + (f": more than {MAX_RATE_ERROR:.0%} apart" if apart else ""))
    yield _punctuality(summary["late_sends_share"], round(sent * summary["seconds"]))
    requests = int(summary["requests"])
    says = f"{requests} requests were due, and the process has {due.count} in the window"
    yield Gate("arrivals", requests == due.count, says + ("" if requests == due.count else ": they must be equal"))
    if due.arrivals.kind != "trace" and not math.isnan(due.expected):
        yield _rate(requests, due)


def _punctuality(share: float, sends: int) -> Gate:
    """One send may be late in any run: of fewer than 100, even one would be more than the share allowed."""
    if math.isnan(share):
        return Gate("punctuality", None, "not testable: nothing was sent")
    late = share > MAX_LATE_SENDS_SHARE and round(share * sends) > 1
    says = f"{share:.1%} of sends were later than {LATE_SEND_S * 1e3:g} ms"
    limit = f"{MAX_LATE_SENDS_SHARE:.0%}" + (", or one send" if sends * MAX_LATE_SENDS_SHARE < 1 else "")
    return Gate("punctuality", not late, _against(says, late, limit))


def _rate(requests: int, due: Due) -> Gate:
    """A count of N arrivals has variance near N x burstiness (1 for Poisson, whatever its rate does; 0 if constant)."""
    burstiness = {"constant": 0.0, "gamma": due.arrivals.burstiness}.get(due.arrivals.kind, 1.0)
    allowed = max(MAX_RATE_ERROR * due.expected, _SIGMAS * math.sqrt(burstiness * due.expected), 1.0)
    says = f"{requests} requests were due where {due.expected:.1f} within {allowed:.1f} were to be expected"
    if due.expected < MIN_RESIDENCES * burstiness:
        return Gate("rate", None, f"not testable: window too short, {says}")
    return Gate("rate", abs(requests - due.expected) <= allowed, says)


def _recorder(submitted: int, recorded: int) -> Gate:
    says = f"{recorded} requests were recorded of {submitted} submitted"
    return Gate("records", submitted == recorded, says + ("" if submitted == recorded else ": they must be equal"))


def _audio(summary: Mapping[str, float]) -> Gate:
    frames = summary["frames_per_s"] * summary["seconds"]
    says = f"{frames:.0f} frames were received in the window"
    return Gate("audio", frames > 0, says + ("" if frames > 0 else ": at least 1 is needed"))


def _timestamps(summary: Mapping[str, float]) -> Gate:
    lateness_s = summary["lateness_p99_s"]
    if math.isnan(lateness_s):
        return Gate("timestamps", None, "not testable: no chunk came whose time at the server is known")
    late = lateness_s > MAX_LATENESS_P99_S
    says = f"chunks were stamped up to {lateness_s * 1e3:.1f} ms late (p99)"
    return Gate("timestamps", not late, _against(says, late, f"{MAX_LATENESS_P99_S * 1e3:g} ms"))


def _steadiness(summary: Mapping[str, float]) -> Iterator[Gate]:
    seconds, residence_s, residual = summary["seconds"], summary["residence_s"], summary["littles_residual"]
    if seconds >= MIN_RESIDENCES * residence_s and not math.isnan(residual):
        off = residual > MAX_LITTLE_RESIDUAL
        yield Gate(
            "Little's law",
            not off,
            _against(f"Little's law is off by {residual:.1%}", off, f"{MAX_LITTLE_RESIDUAL:.0%}"),
        )
    else:
        yield _too_short("Little's law", seconds, MIN_RESIDENCES * residence_s)
    for key, name in (("sessions_trend_p", "sessions"), ("ttfa_trend_p", "times to first audio")):
        p_value = summary[key]
        if math.isnan(p_value):
            yield _too_short(name, seconds, MIN_PARTS * summary["memory_s"])
        elif p_value < TREND_P_VALUE:
            yield Gate(name, False, f"{name} kept rising (Mann-Kendall p = {p_value:.2g}): below {TREND_P_VALUE:g}")
        else:
            yield Gate(name, True, f"{name} did not keep rising (Mann-Kendall p = {p_value:.2g})")


def _too_short(name: str, seconds: float, needed_s: float) -> Gate:
    needed = f", it would need {needed_s:.0f} s" if needed_s > seconds else ", too few requests in it"
    return Gate(name, None, f"not testable: window too short ({seconds:.0f} s{needed})")


def _against(says: str, broken: bool, limit: str) -> str:
    return f"{says}: above {limit}" if broken else f"{says} (limit {limit})"
