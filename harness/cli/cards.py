"""What is known before there is a GPU: the command ``cards``, estimated profiles, and plans for cards."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from harness import wire
from harness.cli.app import app, out
from harness.cli.by_type import prices_of
from harness.errors import InputError
from harness.host.places import SCENARIOS

if TYPE_CHECKING:
    from harness.cards.card import Card
    from harness.records.estimate import PlanningEstimate
    from harness.traffic.mix import Mix

CARDS_HELP = "A YAML file of further cards, in the form of harness/cards/cards.yaml."
CardsFile = Annotated[Path | None, typer.Option("--cards", metavar="FILE", help=CARDS_HELP)]
DEFAULT_MIX = SCENARIOS / "mixes" / "mixed.yaml"
_PAGE, _DATA = "estimate.html", "estimate.json"


@app.command(epilog="Example: `harness cards --preset 1.5b`")
def cards(
    preset: Annotated[str, typer.Option(help="Show which sessions of this preset fit: tiny, 1.5b or 7b.")] = "",
    file: CardsFile = None,
) -> None:
    """List GPUs by their data sheets; with --preset, their memory, and how many sessions of which length fit.

    Throughput is dense, in TFLOP/s (int8: TOP/s). Nothing here is measured but what stands under "reached".
    """
    from harness.cards.card import all_cards
    from harness.cards.costs import costs_of
    from harness.cli.card_tables import cards_table, memory_table, sources

    known = list(all_cards(file).values())
    if preset:
        costs = costs_of(preset)
        for topology in (wire.FUSED, wire.STAGED):
            out.print(memory_table(known, costs, topology))
        return
    out.print(cards_table(known))
    for line in sources(known):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def estimate_profile(
    card_name: str, preset: str, topology: str, folder: Path, measured: Path | None, file: Path | None
) -> None:
    """``harness profile --estimate``: write the estimated profile of a card, and print it."""
    from harness.cards.card import all_cards, card_of
    from harness.cards.costs import costs_of
    from harness.cards.estimate import assumptions_for, estimated_profile, file_name
    from harness.deploy.profiling import tables
    from harness.records.store import read_profile, write_profile

    card, costs = card_of(card_name, all_cards(file)), costs_of(preset)
    assumed = assumptions_for(card, costs, topology, read_profile(measured) if measured else None)
    options = ["--estimate", card_name, "--preset", preset, "--topology", topology]
    options += ["--from", str(measured)] if measured else []
    profile = estimated_profile(card, costs, topology, assumed, shlex.join(["harness", "profile", *options]))
    path = folder / file_name(card, profile)
    write_profile(path, profile)
    out.print(f"{profile.device}, preset {preset}, {topology}: {profile.note}", soft_wrap=True, markup=False)
    out.print("Milliseconds; in parentheses the roofline; below, the interval that holds 95% of the assumptions")
    for table in tables(profile):
        out.print(table)
    out.print(_ranges_table(assumed.ranges()))
    out.print(f"Profile ({profile.known_as}): [bold]{path}[/]", soft_wrap=True)


def _ranges_table(ranges: dict[str, tuple[float, float, float]]) -> Table:
    table = Table("assumed", "low", "likely", "high", title="Not known", title_justify="left", pad_edge=False)
    for name, values in ranges.items():
        table.add_row(name, *(f"{value:.3g}" for value in values))
    return table


def plan_for_cards(
    names: str,
    rates: Sequence[float],
    *,
    preset: str,
    topology: str,
    mix: str,
    slo: str,
    measured: Path | None,
    file: Path | None,
    folder: Path | None,
    accepted: bool,
    costs: tuple[str, str],
) -> int:
    """``harness plan --card``: print the estimate, write it if asked, and return the exit code.

    ``costs``: prices and their currency, as options give them.
    """
    from dataclasses import replace

    from harness import exit_codes
    from harness.cli.card_tables import print_estimate

    found = _estimate(names, rates, preset, topology, (mix, slo), measured, file, costs)
    found = replace(found, accepted=accepted)
    print_estimate(found)
    if folder:
        from harness.records.store import replace_text, write_json
        from harness.report.estimate_page import render

        replace_text(folder / _PAGE, render(found))
        write_json(folder / _DATA, found.to_dict())
        out.print(f"Report: [bold]{folder / _PAGE}[/], data: {folder / _DATA}", soft_wrap=True)
    return exit_codes.MET if accepted else exit_codes.INCONCLUSIVE


def _estimate(
    names: str,
    rates: Sequence[float],
    preset: str,
    topology: str,
    traffic: tuple[str, str],
    measured: Path | None,
    file: Path | None,
    priced: tuple[str, str],
) -> PlanningEstimate:
    """``traffic``: mix and SLOs; ``priced``: prices and their currency."""
    from harness.capacity.planning.estimated import CardModel, estimate
    from harness.cards.card import all_cards
    from harness.cards.costs import costs_of
    from harness.cards.estimate import assumptions_for
    from harness.records.store import read_profile

    costs, mix = costs_of(preset), traffic_of(*traffic)
    profile = read_profile(measured) if measured else None
    chosen = chosen_cards(names, all_cards(file))
    models = [CardModel(card, assumptions_for(card, costs, topology, profile)) for card in chosen]
    prices = prices_of(priced[0], chosen, file)
    return estimate(models, costs, topology, mix, mix.slos, rates, prices=prices, currency=priced[1])


def chosen_cards(names: str, known: dict[str, Card]) -> list[Card]:
    from harness.cards.card import card_of

    asked = [name.strip() for name in names.split(",") if name.strip()]
    if not asked:
        raise InputError(f"--card {names!r}: give cards with commas between them, such as h100,l40s")
    return list({card.key: card for card in (card_of(name, known) for name in asked)}.values())


def traffic_of(mix: str, slo: str) -> Mix:
    """The mix of a name or a file, with its own SLOs, or the given ones for every class. Raises InputError."""
    from harness.cli.first_plan import slos_of
    from harness.planfile.reading import load_mix
    from harness.traffic.mix import MIXES

    if mix in MIXES:
        found = MIXES[mix]
    elif Path(mix or DEFAULT_MIX).is_file():
        found = load_mix(Path(mix or DEFAULT_MIX))
    else:
        raise InputError(f"--mix {mix}: no such file, and no such mix; use a file or one of {', '.join(MIXES)}")
    if not slo:
        return found
    ttfa_s, rtf = slos_of(slo)
    return found.with_slos({each.name: {"ttfa_p95_s": ttfa_s, "rtf_p95": rtf} for each in found.classes})
