"""The gates of a run, each with its figure and its limit, and the verdict VALID or INVALID from all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scipy.special import ndtri

from harness.drive.disturbance import HostLoad
from harness.drive.stop_rule import MIN_RUNGS
from harness.records.load_test import HeldRung
from harness.records.metrics import LATE_SEND_S
from harness.records.slo import Slo
from harness.records.steadiness import MIN_PARTS, slowest_memory_s
from harness.records.summary import Summary
from harness.traffic.arrivals import Arrivals

MAX_RATE_ERROR = 0.01
MAX_LATE_SENDS_SHARE = 0.01
MAX_LATENESS_P99_S = 0.010
MAX_LITTLE_RESIDUAL = 0.05
MAX_LOAD_RISE = 0.05  # of their own mean
MAX_STEP_RISE = 0.10  # of its own mean, not of an SLO: capacity is fitted from step times, however fast they are
MAX_SESSIONS_RISE = 0.25
MAX_TTFA_RISE = 0.10  # of the SLO
MAX_TTFA_RISE_OF_MEAN = 0.20  # where there is no SLO
FALSE_ALARMS = 0.02  # at most, over all steadiness tests of one run together, if each standard error were known
POWER = 0.9  # of finding a rise of twice the limit; below it the gate is not testable
MIN_MEMORIES = 10  # in a shorter window the spread of the sessions is unknown
MIN_LENGTHS_CV2 = 0.25  # floor: a server of equal requests does not run like clockwork
MIN_ARRIVALS = 20  # fewer are not tested for their number
MIN_ARRIVALS_OF_TREND = 25_000  # of a random process: fewer cannot tell a rise of 10% from chance
FARTHEST_DUE_S = 0.1
MAX_BUSY = 0.6  # of a host with time dilation: beyond it, its own queues show in the emulated times
_SIGMAS = 4  # tolerance of the number of arrivals: one run in 16,000 is beyond


@dataclass(frozen=True)
class Gate:
    """One check. ``passed`` None: it could not be tested, or (``asked`` False) does not apply to this kind of load."""

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
        """The verdict in one line. VALID judges the measurement, not the server; failed requests are named too."""
        if not self.valid:
            return "INVALID: " + "; ".join(gate.says for gate in self.gates if gate.passed is False)
        return f"VALID, but {self.failures}" if self.failures else "VALID"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the run is INVALID or, where it is VALID, what could not be tested; then the notes."""
        found = [gate.says for gate in self.gates if gate.passed is False]
        if self.valid:
            found = [f"{gate.name}: {gate.says}" for gate in self.gates if gate.passed is None and gate.asked]
        return (*found, *filter(None, [self.failures]), *self.notes)


@dataclass(frozen=True)
class Due:
    """The arrivals due in the window: ``count`` with this seed, ``expected`` on average over seeds.

    ``expected`` is NaN where the number of requests ended the test. ``farthest_s``: the largest difference between a
    request's due time and the time that the process generates.
    """

    arrivals: Arrivals
    count: int
    expected: float
    farthest_s: float = 0.0

    @property
    def burstiness(self) -> float:
        """Variance of the number of arrivals / its mean: 1 for Poisson whatever its rate does, 0 if constant."""
        return {"constant": 0.0, "gamma": self.arrivals.burstiness}.get(self.arrivals.kind, 1.0)


@dataclass(frozen=True)
class Trend:
    """The rise of a figure over a window, its standard error and the limit, all as shares of ``scale``.

    ``scale``: the name of the unit. ``needed_s``: the shortest window in which the error is known. ``shrinks``: the
    error falls with the window to the power of minus this.
    """

    name: str
    rise: float
    error: float
    limit: float
    scale: str
    needed_s: float = 0.0
    shrinks: float = 0.5
    verb: str = "rose"

    def judged(self, seconds: float, sigmas: float) -> Gate:
        """Fail where the rise exceeds the limit and ``sigmas`` standard errors.

        Not testable where a rise of twice the limit would be found with a probability below POWER.
        """
        found = self._found(sigmas)
        if not math.isnan(self.error) and self.rise > max(self.limit, sigmas * self.error):
            return Gate(self.name, False, f"{self._says}: above {self.limit:.0%}")
        if math.isnan(self.rise) or math.isnan(self.error) or found > 2 * self.limit:
            return Gate(self.name, None, self._untestable(seconds, self.window_s(seconds, sigmas)))
        return Gate(self.name, True, f"{self._says} (limit {self.limit:.0%})")

    def _found(self, sigmas: float) -> float:
        """The smallest rise that is found with probability POWER."""
        power = ndtri(POWER) * self.error
        return max(sigmas * self.error, self.limit) + power

    def window_s(self, seconds: float, sigmas: float) -> float:
        """The shortest window in which a rise of twice the limit is found with probability POWER."""
        found = self._found(sigmas)
        if math.isnan(found):
            return self.needed_s
        return max(self.needed_s, seconds * (found / (2 * self.limit)) ** (1 / self.shrinks))

    @property
    def _says(self) -> str:
        rose = f"{self.name} {self.verb} by {self.rise:.1%} of {self.scale} over the window"
        return f"{rose} (standard error {self.error:.1%})"

    def _untestable(self, seconds: float, window_s: float) -> str:
        if window_s <= seconds:
            return f"not testable: too few requests in this window of {_duration(seconds)}"
        rise = f"a rise of {2 * self.limit:.0%} of {self.scale}"
        return (
            f"not testable: this window of {_duration(seconds)} is too short; "
            f"finding {rise} reliably would take about {_duration(window_s)}"
        )


def undisturbed(load: HostLoad | None, max_others: float) -> Gate:
    """Judge the CPU that others took during a test. ``load`` None: it is not known."""
    if load is None:
        return Gate("other load", None, "not testable: who used this host's CPU is not known")
    if disturbed := load.disturbed(max_others):
        fix = f"stop what else runs here, or raise max_others ({max_others:.0%})"
        return Gate("other load", False, f"{disturbed}: {fix}")
    return Gate("other load", True, f"{load.says()} (limit {max_others:.0%} of those that the run needs)")


def undisturbed_rungs(rungs: Sequence[HeldRung]) -> Gate:
    """Judge a ladder by its rungs: disturbed ones are left out, and MIN_RUNGS must remain."""
    usable, disturbed = [each for each in rungs if not each.disturbed], [each for each in rungs if each.disturbed]
    says = f"{len(usable)} rungs were measured undisturbed"
    if disturbed and len(usable) < MIN_RUNGS:
        fix = f"at least {MIN_RUNGS} are needed: stop what else runs here, or raise max_others"
        return Gate("other load", False, f"only {says}, since {worst_of(disturbed).disturbed}; {fix}")
    if all(each.others_share is None for each in rungs):
        return undisturbed(None, 0.0)
    return Gate("other load", True, says)


def unhurried(used_share: float | None, dilation: float) -> Gate:
    """Judge the share of a host that a run with time dilation used. None: it is not known."""
    if used_share is None:
        return Gate("host share", None, "not testable: who used this host's CPU is not known")
    says = f"harness and server used {used_share:.0%} of this host with time dilated {dilation:g} times"
    if used_share > MAX_BUSY:
        return Gate("host share", False, f"{says}: above {MAX_BUSY:.0%}; give a higher --dilate, or auto")
    return Gate("host share", True, f"{says} (limit {MAX_BUSY:.0%})")


def worst_of(rungs: Sequence[HeldRung]) -> HeldRung:
    """The rung during which others took most."""
    return max(rungs, key=lambda each: (each.others_share or 0.0) + (each.stolen_share or 0.0))


def certify(
    summary: Summary,
    *,
    submitted: int,
    recorded: int,
    due: Due | None = None,
    slos: Sequence[Slo] = (),
    unsteady: str = "",
    failures: str = "",
    notes: tuple[str, ...] = (),
) -> Certificate:
    """Judge a ``metrics.summarise``.

    ``due`` None is a closed loop. ``unsteady``: why steadiness is not required, or "". ``failures`` are named, not
    judged: a measurement of a server that fails requests may still be true. ``lateness_p99_s`` is judged as it stands
    in ``summary``: NaN where it is unknown. TTFA may rise by a share of its SLO in ``slos``.
    """
    gates = [_recorder(summary, submitted, recorded), _audio(summary), _timestamps(summary)]
    if due is not None:
        gates = [*_schedule(summary, due), *gates]
    steadiness = [Gate("steady state", None, unsteady, asked=False)] if unsteady else _steadiness(summary, due, slos)
    return Certificate((*gates, *steadiness), notes, failures)


def _schedule(summary: Summary, due: Due) -> Iterator[Gate]:
    """Requests sent against those due, and those due against the process: exactly, and statistically."""
    offered, sent = summary.offered_rate_per_s, summary.achieved_rate_per_s
    says = f"{sent:.4g} requests/s were sent of {offered:.4g} due"
    apart = abs(sent - offered) > MAX_RATE_ERROR * offered
    yield Gate("sends", not apart, says + (f": more than {MAX_RATE_ERROR:.0%} apart" if apart else ""))
    yield _punctuality(summary.late_sends_share, round(sent * summary.seconds))
    requests = int(summary.requests)
    yield _arrivals(requests, due)
    if due.arrivals.kind != "trace" and not math.isnan(due.expected):
        yield _rate(requests, due)


def _arrivals(requests: int, due: Due) -> Gate:
    says = f"{requests} requests were due, and the process has {due.count} in the window"
    if requests != due.count:
        return Gate("arrivals", False, f"{says}: they must be equal")
    apart = due.farthest_s > FARTHEST_DUE_S
    says += f", at the same times to {due.farthest_s * 1e3:.0f} ms"
    return Gate("arrivals", not apart, _against(says, apart, f"{FARTHEST_DUE_S * 1e3:g} ms"))


def _punctuality(share: float, sends: int) -> Gate:
    """Share of late sends. One send may be late in any run: of fewer than 100, one alone would exceed the share."""
    if math.isnan(share):
        return Gate("punctuality", None, "not testable: nothing was sent")
    late = share > MAX_LATE_SENDS_SHARE and round(share * sends) > 1
    says = f"{share:.1%} of sends were later than {LATE_SEND_S * 1e3:g} ms"
    limit = f"{MAX_LATE_SENDS_SHARE:.0%}" + (", or one send" if sends * MAX_LATE_SENDS_SHARE < 1 else "")
    return Gate("punctuality", not late, _against(says, late, limit))


def _rate(requests: int, due: Due) -> Gate:
    burstiness = due.burstiness
    allowed = max(MAX_RATE_ERROR * due.expected, _SIGMAS * math.sqrt(burstiness * due.expected), 1.0)
    says = f"{requests} requests were due; {due.expected:.1f} +- {allowed:.1f} were expected"
    if due.expected < MIN_ARRIVALS * burstiness:
        return Gate("rate", None, f"not testable: window too short, {says}")
    return Gate("rate", abs(requests - due.expected) <= allowed, says)


def _recorder(summary: Summary, submitted: int, recorded: int) -> Gate:
    says = f"{recorded} requests were recorded of {submitted} submitted"
    if submitted != recorded:
        return Gate("records", False, f"{says}: they must be equal")
    impossible = int(summary.impossible)
    says += f", {impossible} of them ended or received audio before they were sent" if impossible else ""
    return Gate("records", not impossible, says)


def _audio(summary: Summary) -> Gate:
    frames = summary.frames_per_s * summary.seconds
    says = f"{frames:.0f} frames were received in the window"
    return Gate("audio", frames > 0, says + ("" if frames > 0 else ": at least 1 is needed"))


def _timestamps(summary: Summary) -> Gate:
    lateness_s = summary.lateness_p99_s
    if math.isnan(lateness_s):
        return Gate("timestamps", None, "not testable: no chunk came whose time at the server is known")
    late = lateness_s > MAX_LATENESS_P99_S
    says = f"chunks were stamped up to {lateness_s * 1e3:.1f} ms late (p99)"
    return Gate("timestamps", not late, _against(says, late, f"{MAX_LATENESS_P99_S * 1e3:g} ms"))


def _steadiness(summary: Summary, due: Due | None, slos: Sequence[Slo]) -> Iterator[Gate]:
    trends = [_little(summary, due), _sessions(summary, due), _step(summary)]
    if due is not None and 0 < due.burstiness * MIN_ARRIVALS_OF_TREND <= summary.requests:
        trends.append(_load(summary, due))
    classes = sorted(summary.classes)
    sigmas = -float(ndtri(FALSE_ALARMS / (len(trends) + len(classes))))
    for trend in trends:
        yield trend.judged(summary.seconds, sigmas)
    for name in classes:
        yield _first_audio(summary, name, slos, sigmas)


def _little(summary: Summary, due: Due | None) -> Trend:
    """Little's law, N = X R, with a correction for sessions that the window's ends cut.

    For completed requests, X R differs from N by the ages of the sessions open at both ends, and by nothing else. Where
    sessions do not end, their ages grow. Sessions of one burst have equal ages, and users of a closed loop may run in
    step, so their ages together are no more certain than the age of one.
    """
    needed_s = MIN_MEMORIES * summary.memory_s
    alike = max(due.burstiness, 1.0) if due else max(summary.sessions, 1.0)
    error = summary.littles_error * math.sqrt(alike) if summary.seconds >= needed_s else math.nan
    return Trend("Little's law", summary.littles_residual, error, MAX_LITTLE_RESIDUAL, "N", needed_s, 1.0, "is off")


def _sessions(summary: Summary, due: Due | None) -> Trend:
    """Whether the number of sessions rose.

    A queue in steady state keeps its spread; in a window of few relaxation times it may drift like a random walk. Then
    its variance grows by (that of arrivals + that of ends) per second, and the variance of a fitted line's rise is 6/5
    of the total. A busy server completes requests with the dispersion of their lengths.
    """
    seconds, burstiness = summary.sessions_rise_seconds, due.burstiness if due else 1.0
    memory_s, mean = slowest_memory_s(summary, burstiness), summary.sessions
    variance = 12 * summary.sessions_variance * memory_s / seconds
    if seconds < MIN_MEMORIES * memory_s:
        dispersion = burstiness + max(summary.lengths_cv2, MIN_LENGTHS_CV2)
        variance = 1.2 * dispersion * summary.requests / summary.seconds * seconds
    rise, error = (each / mean if mean else math.nan for each in (summary.sessions_rise, math.sqrt(variance)))
    return Trend("sessions", rise, error, MAX_SESSIONS_RISE, "their mean", MIN_MEMORIES * memory_s)


def _step(summary: Summary) -> Trend:
    return Trend("step time", summary.step_rise, summary.step_rise_error, MAX_STEP_RISE, "its mean")


def _load(summary: Summary, due: Due) -> Trend:
    error = math.sqrt(12 * due.burstiness / summary.requests) if summary.requests else math.nan
    return Trend("rate of arrivals", summary.load_rise, error, MAX_LOAD_RISE, "its mean")


def _first_audio(summary: Summary, name: str, slos: Sequence[Slo], sigmas: float) -> Gate:
    limits = [each.limit for each in slos if each.traffic_class == name and each.metric == "ttfa_s"]
    own, what = summary.classes[name], f"first audio of {name}"
    scale_s = max(min(limits), 1e-9) if limits else own.ttfa_mean_s
    limit, scale = (MAX_TTFA_RISE, "its SLO") if limits else (MAX_TTFA_RISE_OF_MEAN, "its mean")
    if own.ttfa_span_s <= limit * scale_s:
        says = f"{what} stayed within {own.ttfa_span_s:.3g} s (limit {limit:.0%} of {scale}, {scale_s:.3g} s)"
        return Gate(what, True, says)
    rise, error = (each / scale_s if scale_s else math.nan for each in (own.ttfa_rise_s, own.ttfa_rise_error_s))
    needed_s = MIN_PARTS * slowest_memory_s(summary)
    return Trend(what, rise, error, limit, scale, needed_s).judged(summary.seconds, sigmas)


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"


def _against(says: str, broken: bool, limit: str) -> str:
    return f"{says}: above {limit}" if broken else f"{says} (limit {limit})"
