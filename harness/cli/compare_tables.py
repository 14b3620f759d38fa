"""A comparison of two runs as tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.table import Table

from harness.cli.tables import bare_table, out
from harness.records.comparison import (
    BETTER,
    COUNT,
    INCONCLUSIVE,
    NOT_SHOWN,
    RATE,
    SLO_METRIC,
    STEP,
    UNKNOWN,
    WORSE,
    ComparedRun,
    Comparison,
    Difference,
)
from harness.report import words

_MOST_DEPLOYMENTS = 8
_COLOURS = {WORSE: "red", BETTER: "green", NOT_SHOWN: "default", UNKNOWN: "yellow", INCONCLUSIVE: "yellow"}


def print_comparison(content: Comparison) -> None:
    """Print what the runs are, what else differs, every difference, and the finding in one sentence."""
    out.print(_runs(content))
    for table in (_differing(content), _deployments(content)):
        if table.row_count:
            out.print(table)
    out.print(_differences(content))
    for note in dict.fromkeys(each.note for each in content.differences if each.note):
        out.print(f"Note: {words.metric(note)}", markup=False, highlight=False)
    out.print(f"[{_COLOURS[content.finding]}]{conclusion(content)}[/]", highlight=False)


def conclusion(content: Comparison) -> str:
    """The finding as one sentence."""
    level = words.level(content.confidence)
    of = {kind: _summed(content, kind) for kind in (WORSE, BETTER, UNKNOWN)}
    if content.finding == NOT_SHOWN:
        return f"No difference shown at {level} confidence: the intervals say how large one could be."
    if content.finding == INCONCLUSIVE:
        said = (
            f"Inconclusive: not known in both runs: {of[UNKNOWN] or 'any figure'}. Nothing else is shown to be worse."
        )
        return f"{said} Better at {level} confidence: {of[BETTER]}." if of[BETTER] else said
    said = f"B is {content.finding} than A at {level} confidence: {of[content.finding]}."
    said = f"{said} Better: {of[BETTER]}." if content.finding == WORSE and of[BETTER] else said
    return f"{said} Not known in both runs: {of[UNKNOWN]}." if of[UNKNOWN] else said


def _summed(content: Comparison, finding: str) -> str:
    """The figures with a finding, each once whatever the load."""
    found = [each for each in content.differences if each.finding == finding]
    names = (words.metric_briefly(each.name) if each.kind == SLO_METRIC else each.name for each in found)
    return "; ".join(dict.fromkeys(names))


def _runs(content: Comparison) -> Table:
    sides = (content.a, content.b)
    table = bare_table("Two runs: B against A", "", "A", "B", left=("", "A", "B"))
    facts: tuple[tuple[str, Callable[[ComparedRun], str]], ...] = (
        ("run", lambda each: each.folder),
        ("plan", lambda each: f"{each.plan}, {each.created_at[:10]}"),
        ("verdict", lambda each: each.verdict or "no plan yet"),
        ("device", lambda each: each.unit),
        ("times", lambda each: each.basis or "measured"),
        ("deployed", lambda each: words.deployment(each.deployment)),
        ("ladders", lambda each: f"{each.ladders}, taken to differ by {words.percent(each.between_ladders)}"),
        ("runs", lambda each: f"taken to differ by {words.percent(each.between_runs)} as well"),
    )
    for name, text in facts:
        table.add_row(name, *map(text, sides))
    return table


def _differing(content: Comparison) -> Table:
    table = bare_table("What else differs, and may be the cause", "", "A", "B", left=("", "A", "B"))
    for each in content.differing:
        table.add_row(each.fact, each.a or "–", each.b or "–")
    return table


def _deployments(content: Comparison) -> Table:
    """The requests/s of deployments that both runs measured; not of the planned ones alone, which have rows below."""
    shown = content.deployments[:_MOST_DEPLOYMENTS] if len(content.deployments) > 1 else ()
    level = words.level(content.confidence)
    table = bare_table(
        f"Requests/s of deployments in both runs ({level} intervals)", "deployment", "A", "B", left=("deployment",)
    )
    names = words.name_deployments([each.deployment for each in shown])
    for each, name in zip(shown, names, strict=True):
        table.add_row(name, _rate(each.rate_a, each.interval_a), _rate(each.rate_b, each.interval_b))
    more = len(content.deployments) - len(shown)
    said = [f"{more} more in both"] if more and shown else []
    said += [f"{count} only in {side}" for count, side in ((content.only_in_a, "A"), (content.only_in_b, "B")) if count]
    if shown and said:
        table.caption = "; ".join(said)
    return table


def _rate(value: float | None, interval: Sequence[float | None]) -> str:
    return f"{words.figure(value)} ({words.interval(interval)})" if words.known(value) else words.ABSENT


def _differences(content: Comparison) -> Table:
    title = f"Differences, with {words.level(content.confidence)} intervals of the change"
    table = bare_table(title, "figure", "A", "B", "change of B", "shown", left=("figure", "shown"))
    for each in content.differences:
        label = f"{_name(each)}{', extrapolated' if each.extrapolated else ''}"
        colour = _COLOURS[each.finding]
        table.add_row(label, _value(each, each.a), _value(each, each.b), change(each), f"[{colour}]{each.finding}[/]")
    table.caption = "\n".join(_caption(content))
    return table


def _caption(content: Comparison) -> Iterator[str]:
    if content.pooled:
        yield "One kind of host: the ladders of both runs together say how far whole ladders differ."
    else:
        yield "Hosts differ, or are not known to be alike: each run's ladders say how far its own differ."
    if at := next((each.at for each in content.differences if each.kind == SLO_METRIC), None):
        yield f"SLO metrics are at {words.plural(at, 'session')}, the most that A carries and both measured."
    if any(each.basis for each in (content.a, content.b)):
        yield "Emulated, estimated or scaled times: the figures are of those, not of a device that was measured."


def _name(each: Difference) -> str:
    if each.kind == COUNT:
        return f"{each.name} at {words.figure(each.at)} req/s"
    if each.kind == RATE:
        return "req/s of a device"
    if each.kind == SLO_METRIC:
        return words.metric_briefly(each.name)
    return "step, mean of loads" if each.at is None else f"step, {words.plural(each.at, 'session')}"


def _value(each: Difference, value: float | None) -> str:
    if each.kind == STEP or "rtf" not in each.name and each.kind not in (COUNT, RATE):
        return words.milliseconds(value)
    return words.figure(value)


def change(each: Difference) -> str:
    """The change of B and its interval, such as "+21% (+3% to +42%)"; of counts "+2 (0 to +4)"."""
    if not words.known(each.change):
        return words.ABSENT
    text = _signed_count if each.kind == COUNT else _signed_percent
    low, high = (text(bound) if words.known(bound) else "?" for bound in each.interval)
    return f"{text(each.change)} ({low.removesuffix('%')} to {high})"


def _signed_percent(value: float) -> str:
    return words.signed_percent(value) if round(100 * value) else "0%"


def _signed_count(value: float) -> str:
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"
