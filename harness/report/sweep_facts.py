"""What the sweep's page shows, derived from a run's stored records: answers of the points, effects, Pareto front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness import wire
from harness.capacity.fitting.knob_effects import Effects, decompose
from harness.errors import InconclusiveError
from harness.records.schema import Trial
from harness.report import words
from harness.report.facts import Point, StageShare, SweptDeployment
from harness.topology import Knobs, KnobValue, has_knob, number_of, topology_of

FRAME_S = wire.SECONDS_PER_FRAME
_DELAY = "delay_us"
OFTEN_QUOTED_DELAY_S = 0.1
_NEARLY_ALL = 0.9
_MOST = 0.75


@dataclass(frozen=True)
class Answer:
    """The result of one deployment of the sweep. ``rate_per_s``: requests/s that meet the SLOs; None = unknown.

    ``audio_s_per_s``: the most audio that it delivered in a window that kept pace with speech; 0 where none did.
    """

    entry: SweptDeployment
    rate_per_s: float | None
    interval: Sequence | None
    audio_s_per_s: float
    note: str

    @property
    def order(self) -> tuple[float, float]:
        return (self.rate_per_s if words.known(self.rate_per_s) else -1.0, self.audio_s_per_s)


@dataclass(frozen=True)
class Response:
    """The figure whose effects are shown: its name, its unit, and its value for each answer (NaN = none)."""

    name: str
    unit: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class DelayBar:
    """A frame's time at one delay of all stages: seconds in each stage and in hops, and the load they were measured at.

    ``computed``: the delay was not deployed; its waits are added to the times of the smallest one that was.
    """

    delay_s: float
    stages: tuple[StageShare, ...]
    hop_s: float
    sessions: float
    computed: bool

    @property
    def step_s(self) -> float:
        return sum(share.queue_s + share.compute_s for share in self.stages) + self.hop_s


def answers(swept: Sequence[SweptDeployment], trials: Sequence[Trial]) -> list[Answer]:
    """Every deployment with its answer, the best first."""
    made = [_answer(entry, [t for t in trials if t.deployment == entry.knobs]) for entry in swept]
    return sorted(made, key=lambda answer: answer.order, reverse=True)


def _answer(entry: SweptDeployment, own: Sequence[Trial]) -> Answer:
    kept = [point.audio_s_per_s for point in entry.points if point.valid and point.step_s <= FRAME_S]
    notes = [entry.fit.inconclusive if entry.fit else ""]
    notes += [reason for trial in own if not trial.valid for reason in trial.reasons[:1]]
    notes += [reason for trial in own if trial.over_saturated for reason in trial.reasons if "over-sat" in reason]
    said = "; ".join(dict.fromkeys(filter(None, notes)))
    rate, interval = (entry.fit.max_rate_per_s, entry.fit.max_rate_interval) if entry.fit else (None, None)
    return Answer(entry, rate, interval, max(kept, default=0.0), said)


def response(found: Sequence[Answer]) -> Response:
    """The rate under the SLOs if nearly all answers have one, some above 0; else the audio delivered in time."""
    rates = [answer.rate_per_s for answer in found]
    known = [rate for rate in rates if words.known(rate)]
    if len(known) >= _NEARLY_ALL * len(rates) and any(rate > 0 for rate in known):
        values = tuple(float("nan") if rate is None else float(rate) for rate in rates)
        return Response("requests/s that one device sustains under the SLOs", "req/s", values)
    values = tuple(answer.audio_s_per_s for answer in found)
    return Response("seconds of audio per second, delivered at the pace of speech", "audio s/s", values)


def effects(found: Sequence[Answer], of: Response) -> tuple[Effects | None, str]:
    """The effects of the knobs, or None and the reason."""
    try:
        cells = [
            (cell, value) for answer, value in zip(found, of.values, strict=True) for cell in _cells(answer, found)
        ]
        return decompose([cell for cell, _ in cells], [value for _, value in cells]), ""
    except InconclusiveError as error:
        return None, str(error)


def _cells(answer: Answer, found: Sequence[Answer]) -> list[dict]:
    """The point of an answer, repeated for each combination of knobs that only other topologies have.

    Those knobs make no difference to its topology.
    """
    own = answer.entry.knobs
    others = [
        {knob: value for knob, value in each.entry.knobs.items() if not has_knob(topology_of(own), knob)}
        for each in found
    ]
    different = {repr(sorted(each.items())): each for each in others if each}
    return [{**each, **own} for each in different.values() or [{}]]


def factor_names(told: Effects) -> list[str]:
    """A factor as text: ``delay of every stage``, ``diffusion instances``."""
    return [_factor_name(factor.knobs) for factor in told.factors]


def _factor_name(knobs: Sequence[str]) -> str:
    kinds = {knob.rpartition(".")[2] for knob in knobs}
    owners = {knob.rpartition(".")[0] for knob in knobs}
    if len(kinds) == 1 and owners == set(wire.STAGES):
        return f"{_kind(kinds.pop())} of every stage"
    return " with ".join(f"{words.stage(owner)} {_kind(kind)}".strip() for owner, _, kind in _parted(knobs))


def _parted(knobs: Iterable[str]) -> list[tuple[str, str, str]]:
    return [knob.rpartition(".") for knob in knobs]


def _kind(knob: str) -> str:
    return knob.removesuffix("_us").replace("_", " ")


def level_name(level: Mapping[str, KnobValue | None]) -> str:
    """A level of a factor as text, without the name of its knob where that is clear."""
    knob, value = next(iter(level.items()))
    if knob.endswith(_DELAY) and words.known(value):
        return f"{words.figure(value / 1000)} ms"
    return str(value)


def pareto(swept: Sequence[SweptDeployment]) -> list[tuple[SweptDeployment, Point]]:
    """The windows that no other beats in both audio per second and step time, by rising throughput."""
    marks = [(entry, point) for entry in swept for point in entry.points if point.valid]
    front, least_s = [], float("inf")
    for entry, point in sorted(marks, key=lambda mark: (-mark[1].audio_s_per_s, mark[1].step_s)):
        if point.step_s < least_s:
            front.append((entry, point))
            least_s = point.step_s
    return front[::-1]


def delay_bars(swept: Sequence[SweptDeployment], sessions: float) -> list[DelayBar]:
    """A frame's time at each delay that is the same in all stages, at about ``sessions`` sessions.

    Of several deployments with one delay, the one with the shortest frame is shown. For a single session a computed bar
    for the often-quoted 100 ms is added; with more sessions batches fill before the delay has passed.
    """
    by_delay: dict[float, list[Point]] = {}
    for entry in swept:
        delay_s, point = common_delay_s(entry.knobs), nearest(entry, sessions)
        if delay_s is not None and point is not None and point.stages:
            by_delay.setdefault(delay_s, []).append(point)
    bars = [_bar(delay_s, min(own, key=lambda point: point.step_s)) for delay_s, own in sorted(by_delay.items())]
    lone = bars and all(bar.sessions < 1.5 for bar in bars)
    if lone and all(bar.delay_s < OFTEN_QUOTED_DELAY_S for bar in bars):
        bars.append(_waiting(bars[0], OFTEN_QUOTED_DELAY_S))
    return bars


def common_delay_s(knobs: Knobs) -> float | None:
    """The delay of all stages if they share one, else None; a stage without the knob has the repository's, 0.

    None for the fused engine too, whose sessions never wait for each other.
    """
    if topology_of(knobs) == wire.FUSED:
        return None
    delays = {number_of(knobs, f"{stage}.{_DELAY}", 0) for stage in wire.STAGES}
    return delays.pop() / 1e6 if len(delays) == 1 else None


def nearest(entry: SweptDeployment, sessions: float) -> Point | None:
    """The VALID window of a deployment with the nearest number of sessions; None if none is within a quarter."""
    points = [point for point in entry.points if point.valid]
    point = min(points, key=lambda one: abs(one.sessions - sessions), default=None)
    return point if point and abs(point.sessions - sessions) <= max(0.25 * sessions, 0.5) else None


def _bar(delay_s: float, point: Point) -> DelayBar:
    return DelayBar(delay_s, point.stages, point.hop_s or 0.0, point.sessions, False)


def _waiting(least: DelayBar, delay_s: float) -> DelayBar:
    added_s = delay_s - least.delay_s
    stages = tuple(StageShare(share.stage, share.queue_s + added_s, share.compute_s) for share in least.stages)
    return DelayBar(delay_s, stages, least.hop_s, least.sessions, True)


def largest_delay_s(least: DelayBar) -> float:
    """The delay of every stage with which a lone frame takes exactly 133 ms; 0 if it takes longer undelayed."""
    rest_s = least.step_s - len(least.stages) * least.delay_s
    return max(0.0, (FRAME_S - rest_s) / max(len(least.stages), 1))


def common_load(swept: Sequence[SweptDeployment]) -> float:
    """The number of sessions at which deployments are compared.

    It is the highest with which the best deployment kept pace, of those near which three quarters of all deployments
    have a VALID window (or as many as there are).
    """
    best = [entry for entry in swept if entry.best] or list(swept)
    kept = {point.sessions for entry in best for point in entry.points if point.valid and point.step_s <= FRAME_S}
    covered = {sessions: sum(nearest(entry, sessions) is not None for entry in swept) for sessions in kept}
    enough = min(_MOST * len(swept), max(covered.values(), default=0))
    return max((sessions for sessions, count in covered.items() if count >= enough), default=1.0)
