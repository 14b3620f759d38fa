"""A load test of speech, whatever drives it: its settings, one process's share of it, and the ledger of Results."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from harness import arrivals, wire
from harness.client import address_of
from harness.errors import HarnessError, InputError
from harness.metrics import MAX_LATENESS_P99_S, certificate, per_request, summarise
from harness.readers import ReaderPool
from harness.recording import RecordsWriter
from harness.records import Outcome, Request, Result
from harness.spec import load_plan
from harness.workload import MIXES, Mix, ScriptSource, requests

ARRIVALS = ("poisson", "constant")
EVERY_USER = "every user"  # what --steady without a number means
AHEAD_NS = 500_000_000  # a request is with its reader this long before it is due
LEAD_IN_NS = 1_000_000_000  # over which the sessions of a steady open loop begin, before its window

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadSettings:
    """What a load test does. ``rate_per_s`` None is a closed loop: each user sends one request after another.

    ``steady``: sessions that begin at a random phase of their length; None = none. In a closed loop every user's
    first request is one, whatever the number; an open loop starts with this many.
    """

    mix: Mix
    scripts: ScriptSource = field(default_factory=ScriptSource)
    seed: int = 1
    rate_per_s: float | None = None
    arrivals: str = "poisson"
    steady: int | None = None
    readers: int = 1
    records: Path | None = None
    ladder: tuple[int, ...] = ()
    rung_s: float = 10.0

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise InputError(f"--arrivals {self.arrivals!r} is not known; {_hint(self.arrivals, ARRIVALS)}")
        if self.rate_per_s is not None:
            arrivals.constant(self.rate_per_s)  # refuses impossible rates
            if self.ladder:
                raise InputError("--ladder holds numbers of users (a closed loop): leave out --rate")
        if any(low >= high for low, high in itertools.pairwise((0, *self.ladder))):
            raise InputError(f"--ladder {self.ladder} must rise from rung to rung, from 1 user or more")
        if self.readers < 1 or self.seed < 0:
            raise InputError("--readers must be 1 or more and --seed 0 or more")
        if not (self.rung_s > 0 and math.isfinite(self.rung_s)):
            raise InputError(f"--rung-seconds {self.rung_s} must be above 0")

    @property
    def loop(self) -> str:
        return "closed" if self.rate_per_s is None else "open"


def traffic_of(
    mix: Mix | str, plan: str | None, scripts: str | None, chunk_frames: int | None
) -> tuple[Mix, ScriptSource]:
    """The mix and the scripts that options name; ``plan`` brings its own of both. Raises InputError."""
    source = ScriptSource()
    if plan:
        spec = load_plan(plan)
        mix, source = spec.traffic_mix(), spec.script_source()
    elif isinstance(mix, str):
        if mix not in MIXES:
            raise InputError(f"no mix is named {mix!r}; {_hint(mix, MIXES)}")
        mix = MIXES[mix]
    if scripts:
        source = ScriptSource.from_folder(scripts)
    if chunk_frames is not None:
        if not 1 <= chunk_frames <= wire.MAX_FRAMES:
            raise InputError(f"--chunk-frames {chunk_frames} must lie in 1 to {wire.MAX_FRAMES}")
        mix = replace(mix, chunk_frames=chunk_frames)
    return mix, source


def _hint(word: str, known) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"


class Share:
    """One process's share of a load test: its readers, its requests and, in an open loop, its arrivals.

    ``index`` of ``of`` says which share; every Result goes to ``on_result``, from the thread of a reader.
    """

    def __init__(
        self, settings: LoadSettings, url: str, on_result: Callable[[Result], None], index: int = 0, of: int = 1
    ):
        self._settings, self._on_result, self._index, self._of = settings, on_result, index, of
        self._stopping = threading.Event()
        self._gate = threading.Lock()  # between a last submit and the pool's close
        new, steady, self._arrivals_rng = np.random.default_rng([settings.seed, index]).spawn(3)
        self._new = requests(settings.mix, new, settings.scripts)
        self._steady = requests(settings.mix, steady, settings.scripts, steady=True)
        self.pool = ReaderPool(url, settings.readers)
        self.start_ns = time.monotonic_ns()
        if settings.loop == "open":
            self.start_ns += AHEAD_NS + (LEAD_IN_NS if settings.steady else 0)
            threading.Thread(target=self._keep_schedule, daemon=True).start()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def speak(self, first: bool = False) -> Result | None:
        """Closed loop: send the next request now and wait for its Result. None when the test is over."""
        fresh = self._steady if first and self._settings.steady is not None else self._new
        request = next(fresh)
        ticket = self._submit(replace(request, due_ns=time.monotonic_ns()), "closed")
        if ticket is None:
            return None
        try:
            return ticket.wait()
        except BaseException:  # the user was taken away: its request goes with it
            ticket.cancel()
            raise

    def wait_for_end(self) -> None:
        """Open loop: what a user does, since arrivals come from the schedule."""
        self._stopping.wait()

    def finish(self, grace_s: float) -> None:
        """Send nothing more; requests under way get ``grace_s``. Afterwards every Result has been handed on."""
        with self._gate:
            self._stopping.set()
        self.pool.close(grace_s)

    def _submit(self, request: Request, loop: str):
        with self._gate:
            return None if self.stopping else self.pool.submit(request, loop, self._on_result)

    def _keep_schedule(self) -> None:
        try:
            for request in self._scheduled():
                wait_s = (request.due_ns - AHEAD_NS - time.monotonic_ns()) / 1e9
                if wait_s > 0:
                    self._stopping.wait(wait_s)
                else:
                    time.sleep(0)  # behind, or a burst: let the others run
                if self._submit(request, "open") is None:
                    return
        except HarnessError as error:
            log.error("the schedule of arrivals ended: %s", error)

    def _scheduled(self) -> Iterator[Request]:
        sources = (
            (self._steady, lead_in(self._settings, self._index, self._of)),
            (self._new, arrivals_of(self._settings, self._arrivals_rng, self._index, self._of)),
        )
        for fresh, due in sources:
            for due_s in due:
                yield replace(next(fresh), due_ns=self.start_ns + round(due_s * 1e9))


def arrivals_of(settings: LoadSettings, rng: np.random.Generator, index: int = 0, of: int = 1) -> Iterator[float]:
    """One share's arrivals of an open loop, in seconds from its start; all shares together are the whole process."""
    if settings.arrivals == "constant":
        return itertools.islice(arrivals.constant(settings.rate_per_s), index, None, of)
    return arrivals.poisson(settings.rate_per_s / of, rng)


def lead_in(settings: LoadSettings, index: int = 0, of: int = 1) -> Iterator[float]:
    """When one share's sessions in progress begin: spread evenly over the second before the start (so below 0 s)."""
    sessions = settings.steady or 0
    return ((number / sessions - 1) * LEAD_IN_NS / 1e9 for number in range(index, sessions, of))


@dataclass(frozen=True)
class Report:
    """How a test went. ``lines`` are for a terminal; ``reasons`` why it is INVALID, then what a reader should know."""

    summary: dict[str, float]
    valid: bool
    reasons: tuple[str, ...]
    lines: tuple[str, ...]


class Ledger:
    """Every Result of one test, written to the records folder as it comes, and what they add up to."""

    def __init__(self, settings: LoadSettings, url: str, folder: Path | None):
        self.settings, self.url = settings, url
        self.results: list[Result] = []
        self.never_sent = 0
        self.submitted = self.lost = 0
        self.lag_p99_s = math.nan  # how late the readers' own timers ran
        self.remarks: list[str] = []  # each makes the test INVALID
        self.start_ns = time.monotonic_ns()
        self._rungs = 0  # that have been held
        self._writer = RecordsWriter(folder, self._run()) if folder else None

    def take(self, result: Result) -> None:
        """Requests cut off before they were due are only counted: they were never part of the load."""
        if not result.sent_ns and result.outcome is Outcome.UNFINISHED:
            self.never_sent += 1
            return
        self.results.append(result)
        if self._writer:
            self._writer.result(result)

    def all_users_run(self, now_ns: int) -> None:
        """The window begins; on every rung after the first it has begun."""
        if not self._rungs:
            self.start_ns = now_ns

    def rung(self, users: int, start_ns: int, end_ns: int) -> None:
        self._rungs += 1
        if self._writer:
            self._writer.rung({"users": users, "start_ns": start_ns, "end_ns": end_ns})

    def close(self, end_ns: int) -> Report:
        """Fold the Results of [start, ``end_ns``) into a report and end the records file."""
        end_ns = max(end_ns, self.start_ns + 1)
        summary = summarise(self.results, self.start_ns, end_ns)
        judged, notes = self._judged(summary)
        valid, reasons = certificate(
            judged,
            loop=self.settings.loop,
            offered_rate_per_s=self.settings.rate_per_s,
            submitted=self.submitted,
            recorded=len(self.results) + self.never_sent - self.lost,
        )
        valid, reasons = valid and not self.remarks, (*self.remarks, *reasons, *notes)
        report = Report(summary, valid, reasons, tuple(_lines(self.results, self.never_sent, summary, valid, reasons)))
        if self._writer:
            self._writer.end(self._end(report, end_ns))
        return report

    def _judged(self, summary: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """The summary as its gates apply to this test, and what a reader should know of that."""
        judged, notes = dict(summary), []
        if self.settings.ladder:  # its load rises by design: every gate but those of steadiness holds, over all rungs
            judged |= dict.fromkeys(("littles_residual", "sessions_trend_p", "ttfa_trend_p"), math.nan)
        lateness_s = summary["lateness_p99_s"]
        if not is_this_host(self.url):
            judged["lateness_p99_s"] = self.lag_p99_s
            notes.append("chunk lateness is not known: the server is on another host, with another clock")
        elif lateness_s > MAX_LATENESS_P99_S >= self.lag_p99_s:
            judged["lateness_p99_s"] = self.lag_p99_s
            notes.append(
                f"chunks came up to {lateness_s * 1e3:.0f} ms (p99) after the server had stamped them; the readers "
                f"were on time to {self.lag_p99_s * 1e3:.1f} ms (p99), so the server delivered them late"
            )
        return judged, notes

    def _run(self) -> dict:
        settings = self.settings
        return {
            "url": self.url,
            "loop": settings.loop,
            "rate_per_s": settings.rate_per_s,
            "arrivals": settings.arrivals if settings.loop == "open" else None,
            "mix": settings.mix.name,
            "chunk_frames": settings.mix.chunk_frames,
            "seed": settings.seed,
            "steady": settings.steady,
            "readers": settings.readers,
            "ladder": list(settings.ladder),
        }

    def _end(self, report: Report, end_ns: int) -> dict:
        return {
            "start_ns": self.start_ns,
            "end_ns": end_ns,
            "submitted": self.submitted,
            "never_sent": self.never_sent,
            "lost": self.lost,
            "lag_p99_s": self.lag_p99_s,
            "valid": report.valid,
            "reasons": list(report.reasons),
            "summary": report.summary,
        }


def is_this_host(url: str) -> bool:
    """Whether a server shares our clock: only an address of this host can be bound to."""
    host = address_of(url)[0].rpartition(":")[0].strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _lines(
    results: list[Result], never_sent: int, summary: dict[str, float], valid: bool, reasons: tuple[str, ...]
) -> Iterator[str]:
    counts = Counter(result.outcome for result in results)
    yield "Speech"
    yield "  requests     " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome)
    if never_sent:
        yield f"               and {never_sent} prepared but not yet due when the test ended"
    yield from _audio_lines(results)
    yield f"  {'':<12} {'TTFA p50':>9} {'p95':>7} {'RTF p50':>9} {'p95':>7} {'stall p95':>10} {'C100':>7}"
    for name in ("all", *sorted({result.traffic_class for result in results})):
        prefix = "" if name == "all" else f"{name}."
        values = (summary.get(prefix + key, math.nan) for key in _COLUMNS)
        ttfa50, ttfa95, rtf50, rtf95, stall95, c100 = values
        yield (
            f"  {name:<12} {_figure(ttfa50, 's'):>9} {_figure(ttfa95, 's'):>7} {_figure(rtf50):>9} {_figure(rtf95):>7}"
            f" {_figure(stall95, 's'):>10} {_figure(100 * c100, '%', 1):>7}"
        )
    yield f"  {'VALID' if valid else 'INVALID'}{': ' if reasons else ''}" + "\n    ".join(("", *reasons))


_COLUMNS = ("ttfa_p50_s", "ttfa_p95_s", "rtf_p50", "rtf_p95", "stall_p95_s", "c100")


def _audio_lines(results: list[Result]) -> Iterator[str]:
    rows = per_request(results)
    done = rows[rows["outcome"] == str(Outcome.DONE)]
    cut = rows[rows["outcome"] == str(Outcome.UNFINISHED)]
    asked, delivered = (done["frames"] * wire.SAMPLES_PER_FRAME).sum(), done["samples"].sum()
    equal = "equal" if asked == delivered else "NOT EQUAL"
    rate = wire.SAMPLE_RATE_HZ
    yield f"  audio        {asked / rate:.1f} s asked of the done, {delivered / rate:.1f} s delivered by them: {equal}"
    yield f"               {cut['audio_s'].sum():.1f} s delivered by the unfinished"
    yield f"  stalls       {rows['stalls'].sum():.0f}, {rows['stall_total_s'].sum():.2f} s in all (no start buffer)"


def _figure(value: float, unit: str = "", digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}{unit}"


def settings_of(values: dict, mix: Mix | str) -> LoadSettings:
    """Settings from options as they come from a command line or a form. Raises InputError naming the option."""
    if values.get("steady") == EVERY_USER:
        if values.get("rate_per_s"):
            raise InputError("--steady in an open loop needs the number of sessions it starts with: --steady 12")
        values = {**values, "steady": 0}
    numbers = {name: _number(values, name, kind) for name, kind in _NUMBERS.items()}
    traffic, scripts = traffic_of(
        values.get("mix") or mix, values.get("plan"), values.get("scripts"), numbers["chunk_frames"]
    )
    chosen = {field.name for field in dataclasses.fields(LoadSettings)}
    given = {name: value for name, value in numbers.items() if name in chosen and value is not None}
    return LoadSettings(
        mix=traffic,
        scripts=scripts,
        arrivals=values.get("arrivals") or "poisson",
        records=Path(values["records"]) if values.get("records") else None,
        ladder=_ladder(values.get("ladder") or ""),
        **given,
    )


_NUMBERS = {
    "seed": int,
    "rate_per_s": float,
    "steady": int,
    "readers": int,
    "chunk_frames": int,
    "rung_s": float,
}


def _number(values: dict, name: str, kind: type):
    text = values.get(name)
    if text is None or text == "":
        return None
    try:
        return kind(text)
    except ValueError:
        option = {"rate_per_s": "rate", "rung_s": "rung-seconds"}.get(name, name.replace("_", "-"))
        raise InputError(f"--{option} {text!r} is not {'a whole' if kind is int else 'a'} number") from None


def _ladder(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(users) for users in str(text).split(",") if text)
    except ValueError:
        raise InputError(f"--ladder {text!r} must be numbers of users with commas between, such as 1,2,4,8") from None
