"""Tables of cards and of estimates, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from harness import wire
from harness.cards.card import BANDWIDTH, THROUGHPUT, Card
from harness.cards.costs import ModelCosts
from harness.cards.memory import LENGTHS_S, SESSIONS, MemoryBudget, budget_of
from harness.cli.app import out
from harness.records.estimate import EstimatedCard, PlanningEstimate, UnknownEffect
from harness.report import words

SHOWN_UNKNOWNS, _BAR = 6, 24  # rows of a tornado; characters of its longest bar
_GB = 1e9


def _table(title: str, *columns: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def cards_table(cards: Sequence[Card]) -> Table:
    """Every card with its data sheet, and the share of it that copies and matrix products reach."""
    columns = "card", "GB", "GB/s", "bf16", "fp8", "int8", "W", "% GB/s", "% bf16"
    table = _table("GPUs by their data sheets, dense throughput", *columns, left=("card",))
    for card in cards:
        speeds = (card.bf16_tflop_s, card.fp8_tflop_s, card.int8_top_s)
        table.add_row(
            card.key, f"{card.memory_gb:g}", f"{card.bandwidth_gb_s:g}",
            *("-" if value is None else f"{value:g}" for value in speeds), f"{card.power_w:g}",
            _reached(card, BANDWIDTH), _reached(card, THROUGHPUT),
        )  # fmt: skip
    table.caption = (
        "GB and GB/s are decimal; bf16, fp8 in TFLOP/s, int8 in TOP/s. %: what copies and matrix products reach of the "
        "data sheet, a range where nobody measured it"
    )
    return table


def _reached(card: Card, unknown: str) -> str:
    share = card.shares[unknown]
    return f"{share.likely:.0%}" if card.reached else f"{100 * share.low:.0f}-{share.high:.0%}"


def sources(cards: Sequence[Card]) -> Iterator[str]:
    """Where each card's figures come from."""
    for card in cards:
        yield f"{card.key}, {card.name}: {card.source}{f'; reached: {card.reached.source}' if card.reached else ''}"


def memory_table(cards: Sequence[Card], costs: ModelCosts, topology: str) -> Table:
    """The room that a server leaves for KV caches on each card, and the sessions that fit at each length."""
    lengths = [words.duration(seconds) for seconds in LENGTHS_S]
    columns = "card", "GB", "KV room", *lengths, "longest session"
    title = f"Memory at preset {costs.preset}, {topology} (computed): GB, and sessions at once by length"
    table = _table(title, *columns, left=("card",))
    for card in cards:
        budget = budget_of(card, costs, topology)
        fits = [str(budget.sessions_of(seconds)) for seconds in LENGTHS_S]
        longest = words.duration(budget.longest_s) if budget.longest_s else "does not fit"
        table.add_row(card.key, f"{card.memory_gb:g}", f"{budget.free_bytes / _GB:.1f}", *fits, longest)
    table.caption = _memory_words(budget_of(cards[0], costs, topology))
    return table


def _memory_words(budget: MemoryBudget) -> str:
    """What a card's memory is spent on, beside KV caches."""
    tables = f", {budget.table_bytes / _GB:.1f} GB of tables" if budget.table_bytes else ""
    return (
        f"KV room: what is left of 90% of the card beside {budget.weight_bytes / _GB:.1f} GB of weights and "
        f"{budget.process_bytes / _GB:.1f} GB of {budget.processes} processes (CUDA contexts, kernels, workspace, "
        f"activations, graphs){tables}. A session counts with its KV cache at its end; a server admits at most "
        f"{SESSIONS}, and a session has at most {words.duration(budget.most_frames * wire.SECONDS_PER_FRAME)}"
    )


def print_estimate(found: PlanningEstimate) -> None:
    """Print GPUs per target of every card, what is not known, and what would narrow it most."""
    out.print(f"\nVerdict: [bold yellow]{found.verdict}[/]: no load was measured on these cards", highlight=False)
    out.print(_mix_line(found), markup=False, highlight=False, soft_wrap=True)
    out.print(_targets_table(found))
    out.print(_costs_table(found))
    for card in found.cards:
        if card.problem:
            out.print(f"{card.card}: {words.metric(card.problem)}", markup=False, highlight=False, soft_wrap=True)
            continue
        out.print(_tornado(card))
        for line in _narrowing(card):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    if not found.accepted:
        out.print("An estimate decides nothing: exit code 2; --accept-estimates makes it 0", style="yellow")


def _mix_line(found: PlanningEstimate) -> str:
    mix = ", ".join(
        f"{each.share:.0%} {name} of {words.duration(each.mean_audio_s)}" for name, each in found.mix.items()
    )
    slos = "; ".join(words.metric(str(slo)) for slo in found.slos)
    return f"One device = one GPU, preset {found.preset}, {found.topology}. Requests: {mix}. SLOs: {slos}"


def _targets_table(found: PlanningEstimate) -> Table:
    rates = [f"{target.qps:g}" for target in found.cards[0].targets]
    heads = [head for rate in rates for head in (f"GPUs at {rate}/s", "interval")]
    columns = "card", *heads, "req/s of one alone", "interval", "bound by", "90 min in KV", "basis"
    level = words.level(found.confidence)
    table = Table(
        title=f"GPUs per target rate ({level} intervals)", title_justify="left", box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1), caption_justify="left",
    )  # fmt: skip
    for name in columns:
        table.add_column(name, justify="left" if name in ("card", "bound by", "basis") else "right")
    for card in found.cards:
        counts = [cell for row in card.targets for cell in (_count(row.devices), _range(row.interval))]
        rate, bound = card.rate_per_device, card.targets[-1].binding
        table.add_row(
            card.card, *counts, words.figure(rate.value), words.interval(rate.interval),
            words.constraint(bound) if bound else "-", f"{card.memory.longest_sessions:.0f}" if card.memory else "-",
            card.basis,
        )  # fmt: skip
    table.caption = (
        f"Planned up to {found.utilisation_cap:.0%} of the steady rate. One GPU alone sustains less than a GPU of a "
        "pool, because arrivals at it vary more"
    )
    return table


def _costs_table(found: PlanningEstimate) -> Table:
    """Power and energy of the GPUs of each target and, where a card has a price, their cost."""
    priced = [f"{found.currency}/h", f"{found.currency} per audio hour", "interval"] if found.currency else []
    columns = "card", "req/s", "GPUs", "kW", "kWh per audio hour", *priced, "basis"
    table = _table("Energy and cost (estimated)", *columns, left=("card", "basis"))
    for card in found.cards:
        for row in card.targets:
            if row.devices is None:
                continue
            power_kw = None if card.watts is None else row.devices * card.watts / 1000
            cost = (words.figure(row.cost_per_hour), words.figure(row.cost_per_audio_hour))
            costs = (*cost, words.interval(row.cost_per_audio_hour_interval)) if priced else ()
            energy = words.figure(power_kw), words.figure(row.kwh_per_audio_hour)
            table.add_row(card.card, f"{row.qps:g}", _count(row.devices), *energy, *costs, card.basis)
    given = "; prices as given" if priced else "; --price h100=2.5 adds the cost"
    table.caption = f"Power: the limit on the data sheet, which a card under load rarely reaches; GPUs alone{given}"
    return table


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _range(interval: tuple[int | None, int | None]) -> str:
    low, high = interval
    if low is not None and low == high:
        return f"{low:,}"
    return "-" if low is None else f"{low:,} to {'unlimited' if high is None else f'{high:,}'}"


def _tornado(card: EstimatedCard) -> Table:
    """Unknowns by how many GPUs they cost at the highest target, each with its bar."""
    target = card.targets[-1]
    columns = "unknown", "range", "GPUs", ""
    table = _table(f"{card.card}: what is not known, at {target.qps:g} req/s", *columns, left=("unknown", ""))
    shown = [each for each in card.unknowns if each.devices_at_low != each.devices_at_high][:SHOWN_UNKNOWNS]
    ends = [each for row in shown for each in (row.devices_at_low, row.devices_at_high) if each is not None]
    low, high = min(ends, default=0), max(ends, default=0)
    for row in shown:
        counts = f"{_count(row.devices_at_low)} to {_count(row.devices_at_high)}"
        table.add_row(row.unknown, f"{row.low:.2g} to {row.high:.2g}", counts, Text(_bar(row, low, high)))
    rest = len(card.unknowns) - len(shown)
    if rest:
        table.caption = f"{rest} further unknowns matter less, or not at all"
    return table


def _bar(row: UnknownEffect, low: int, high: int) -> str:
    """A bar from the fewest to the most GPUs of a row, on the scale of all rows."""
    known = [high if each is None else each for each in (row.devices_at_low, row.devices_at_high)]
    first, last = (round(_BAR * (each - low) / max(high - low, 1)) for each in (min(known), max(known)))
    return " " * first + "█" * max(last - first, 1)


def _narrowing(card: EstimatedCard) -> Iterator[str]:
    """The measurement that narrows the interval most."""
    if not card.measurements:
        return
    best, target = card.measurements[0], card.targets[-1]
    yield (
        f"Would narrow it most: {best.command} ({best.minutes:g} min on one {card.name}): about "
        f"{_range(best.interval)} instead of {_range(target.interval)} GPUs at {target.qps:g} req/s"
    )
