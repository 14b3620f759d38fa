"""The options that lost as text: what each is, the load it is judged at, the limit and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.records import why_not as reasons
from harness.records.why_not import RuledOut
from harness.report import facts, words
from harness.topology import Knobs

_LIMITS = {
    reasons.BY_RATE: "highest rate within the SLOs",
    reasons.BY_UTILISATION: "cap on utilisation",
    reasons.BY_COLLAPSE: "collapse under load: throughput falls as sessions grow",
    reasons.BY_LADDERS: "fewer ladders than the planned deployment",
}
_OVER = "over ten times its limit"


@dataclass(frozen=True)
class LostOption:
    """A row of the table. ``sustains``: one device of it; ``sure``: whether the measurements rule it out."""

    option: str
    at: str
    sustains: str
    limit: str
    value: str
    excess: str
    sure: str
    basis: str


def lost_options(
    rows: Sequence[RuledOut], planned: Knobs | None, letters: Mapping[str, str] | None = None
) -> list[LostOption]:
    """The rows as text. ``letters``: of the deployments in a report, by their content as JSON (``facts.key``)."""
    knobs = [*([planned] if planned else []), *(row.knobs for row in rows)]
    names = words.name_deployments(knobs)[len(knobs) - len(rows) :] if rows else []
    letters = letters or {}
    return [_lost(row, name, letters) for row, name in zip(rows, names, strict=True)]


def _lost(row: RuledOut, name: str, letters: Mapping[str, str]) -> LostOption:
    return LostOption(
        option=_option(row, name, letters),
        at=_at(row),
        sustains=words.ABSENT if row.option == reasons.DEVICES else _rate(row.rate_per_s),
        limit=_limit(row),
        value=_value(row),
        excess=_excess(row),
        sure=_sure(row),
        basis=row.basis,
    )


def _option(row: RuledOut, name: str, letters: Mapping[str, str]) -> str:
    if row.option == reasons.DEVICES:
        target = "" if row.at_qps is None else f" for {words.figure(row.at_qps)} req/s"
        return f"{words.plural(row.devices, 'device')}{target}"
    letter = letters.get(facts.key(row.knobs), "")
    named = f"{letter}: {name}" if letter else name
    return f"topology {words.topology(row.topology)} ({named})" if row.option == reasons.TOPOLOGY else named


def _at(row: RuledOut) -> str:
    """The load; that of a number of devices is its target, which names the option."""
    if row.option == reasons.DEVICES and row.at_qps is not None:
        return words.ABSENT
    if row.at_qps is None or row.by == reasons.BY_LADDERS:
        return "one session" if row.by in (reasons.BY_SLO, reasons.BY_MEMORY) else words.ABSENT
    return f"{words.figure(row.at_qps)} req/s on one device"


def _rate(rate_per_s: float | None) -> str:
    return words.ABSENT if rate_per_s is None else f"{words.figure(rate_per_s)} req/s"


def _limit(row: RuledOut) -> str:
    if row.by == reasons.BY_UNKNOWN:
        return f"not known: {words.metric(row.limit)}"
    if row.by == reasons.BY_MEMORY and row.allowed is not None:
        return f"KV memory, by the {words.metric(row.limit)}"
    return _LIMITS.get(row.by) or words.constraint(row.limit)


def _value(row: RuledOut) -> str:
    """The value and what is allowed, such as "1.18 against 0.9"."""
    if row.allowed is None:
        return words.ABSENT
    text, unit = words.figure, ""
    if row.by in (reasons.BY_SLO, reasons.BY_MEMORY):
        unit = "" if row.limit.startswith("rtf") else " s"
    elif row.by == reasons.BY_UTILISATION:
        text = words.percent
    elif row.by == reasons.BY_RATE:
        unit = " req/s"
    elif row.by == reasons.BY_LADDERS:
        unit = " ladders"
    value = "without bound" if row.value is None else text(row.value)
    return f"{value} against {text(row.allowed)}{unit}"


def _excess(row: RuledOut) -> str:
    if row.allowed is None or row.value is None or row.by == reasons.BY_LADDERS:
        return words.ABSENT
    return words.signed_percent(row.excess) if row.excess is not None and row.excess <= 9 else _OVER


def _sure(row: RuledOut) -> str:
    if row.by == reasons.BY_UNKNOWN:
        return "not known"
    if row.option == reasons.DEVICES:
        return "ruled out" if row.certain else "within the interval"
    return "ruled out" if row.certain else "not told apart"
