"""The command ``fleet``: the cheapest mix of several types of device, measured or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from harness import wire
from harness.cli.app import TOPOLOGY_HELP, app, opened, out, rates_of
from harness.cli.by_type import names_of, number_of, numbers_by_type, same
from harness.cli.cards import CardsFile, chosen_cards, traffic_of
from harness.errors import InputError

if TYPE_CHECKING:
    from harness.capacity.planning.fleet import DeviceOffer, FleetTerms
    from harness.cards.card import Card
    from harness.records.fleet import FleetAnswer, FleetTarget, MixedFleet
    from harness.traffic.mix import Mix


@app.command(
    epilog="Examples: `harness fleet --card h100,l40s,l4 --price h100=2.5,l40s=1,l4=0.6 --qps 1,10`, "
    "`harness fleet --run results/quick-1a2b3c4d --price cpu=0.2,l4=0.6 --card l4 --qps 5 --spares 1`"
)
def fleet(
    price: Annotated[str, typer.Option("--price", help="Price of an hour of each type: h100=2.5,l40s=1.")],
    qps: Annotated[str, typer.Option("--qps", help="Target rates, comma-separated.")] = "1,10",
    card: Annotated[str, typer.Option("--card", help="Types to estimate: see `harness cards`.")] = "",
    run: Annotated[
        Path | None, typer.Option("--run", help="A folder under results/: its device as a measured type.")
    ] = None,
    most: Annotated[str, typer.Option("--most", help="GPUs (or hosts) that can be had, by type: h100=8.")] = "",
    power_kw: Annotated[
        float | None, typer.Option("--power-kw", help="Most power of all devices together, kW.")
    ] = None,
    spares: Annotated[int, typer.Option("--spares", min=0, help="Spare devices of each pool.")] = 0,
    preset: Annotated[str, typer.Option(help="Without --run: tiny, 1.5b or 7b.")] = "1.5b",
    topology: Annotated[str, typer.Option(help=f"Of cards: {TOPOLOGY_HELP}.")] = wire.FUSED,
    mix: Annotated[
        str, typer.Option(help="Without --run: a mix or its file; default: 95% of 10 s and 5% of 90 minutes.")
    ] = "",
    slo: Annotated[
        str, typer.Option(help="Without --run: SLOs of every class, p95 of first audio (s) and of RTF: 1.0,0.9")
    ] = "",
    measured: Annotated[
        Path | None, typer.Option("--from", metavar="PROFILE", help="For cards: a measured profile of another card.")
    ] = None,
    cards: CardsFile = None,
    currency: Annotated[str, typer.Option(help="Of the prices.")] = "USD",
    file: Annotated[Path | None, typer.Option("--out", help="Write the answer to this file, as JSON.")] = None,
) -> None:
    """Find the cheapest fleet of several types of device, with each class of requests on the type where it costs least.

    A pool is devices of one type for some classes: short requests may go to small cards, and 90 minutes to where the KV
    memory is. Cards are estimated, from their data sheets or from a profile; the device of a run was measured, and
    is extrapolated where a pool has some of its classes alone. Exit code 2 where a rate has no fleet.
    """
    from harness import exit_codes
    from harness.capacity.planning.fleet import plan_fleets

    rates = rates_of(qps)
    prices, limits = numbers_by_type("--price", price), numbers_by_type("--most", most)
    if run is None and not card:
        raise InputError("give the types: --card h100,l40s,l4, or --run DIR for a measured one, or both")
    if run is not None and (mix or slo):
        raise InputError("--mix and --slo are those of the run's plan: leave them out, or leave out --run")
    if power_kw is not None and power_kw <= 0:
        raise InputError(f"--power-kw {power_kw:g}: give a limit above 0, or leave it out")
    offers, traffic, terms = _offers(run, card, prices, limits, preset, topology, (mix, slo), measured, cards)
    terms = terms_with(terms, currency, power_kw, spares)
    answer = plan_fleets(offers, traffic, rates, terms, lambda what: out.print(f"{what} …", markup=False))
    print_fleets(answer)
    if file:
        from harness.records.store import write_json

        write_json(file, answer.to_dict())
        out.print(f"Data: [bold]{file}[/]", soft_wrap=True)
    raise typer.Exit(exit_codes.MET if all(each.best for each in answer.targets) else exit_codes.INCONCLUSIVE)


def terms_with(terms: FleetTerms, currency: str, power_kw: float | None, spares: int) -> FleetTerms:
    from dataclasses import replace

    power_w = None if power_kw is None else 1000 * power_kw
    return replace(terms, currency=currency, power_w=power_w, spares=spares)


def _offers(
    run: Path | None,
    card: str,
    prices: dict[str, float],
    limits: dict[str, float],
    preset: str,
    topology: str,
    traffic: tuple[str, str],
    measured: Path | None,
    file: Path | None,
) -> tuple[list[DeviceOffer], Mix, FleetTerms]:
    """The types of device with their prices, the traffic, and what it is planned with."""
    from harness.capacity.planning.estimated import UTILISATION_CAP, check_slos
    from harness.capacity.planning.fleet import FleetTerms
    from harness.cards.card import all_cards

    offers = []
    if run is None:
        mix = traffic_of(*traffic)
        terms = FleetTerms(preset, tuple(mix.slos), UTILISATION_CAP)
    else:
        offer, mix, terms = _of_run(run, prices, limits, file)
        offers.append(offer)
    if card:
        check_slos(mix, terms.slos)
        chosen = chosen_cards(card, all_cards(file))
        _check_different(chosen, offers, file)
        offers += [_of_card(each, prices, limits, mix, terms, topology, measured, file) for each in chosen]
    known = {name for each in offers for kind in _kinds(each.name) for name in names_of(kind, file)}
    if unknown := [name for name in limits if not any(same(name, each) for each in known)]:
        types = ", ".join(sorted(each.name for each in offers))
        raise InputError(f"--most {unknown[0]}: there is no such type here; known: {types}")
    return offers, mix, terms


def _of_run(
    folder: Path, prices: dict[str, float], limits: dict[str, float], file: Path | None
) -> tuple[DeviceOffer, Mix, FleetTerms]:
    """The device of a run as a type, and the traffic and SLOs of its plan."""
    from harness.capacity.planning.cost_and_growth import price_of
    from harness.capacity.planning.fleet import FleetTerms
    from harness.runs import analysis, fleets, opening

    stored = opened(folder)
    spec, fit, best = opening.spec_of(stored), stored.fit(), analysis.best_of(stored)
    assert fit is not None
    device, slos = stored.manifest.device, spec.slo_list()
    found = price_of(prices, device) or price_of(spec.prices, device)
    if found is None:
        raise InputError(f"--price has none for {device}, the device of {folder}: add {device.split()[-1]}=PRICE")
    offer = fleets.run_offer(stored, spec, fit, best, found, _limit(limits, found[0], file))
    return offer, spec.traffic_mix(), FleetTerms(spec.preset, slos, spec.utilisation_cap)


def _of_card(
    card: Card,
    prices: dict[str, float],
    limits: dict[str, float],
    mix: Mix,
    terms: FleetTerms,
    topology: str,
    measured: Path | None,
    file: Path | None,
) -> DeviceOffer:
    """A card as a type: pools in closed form, with draws of what is not known of it."""
    from harness.capacity.planning.closed_form import ClosedPools
    from harness.capacity.planning.estimated import CardModel, pools_of_card
    from harness.capacity.planning.fleet import ESTIMATED, DeviceOffer
    from harness.cards.costs import costs_of
    from harness.cards.estimate import assumptions_for
    from harness.records.store import read_profile

    price = number_of("--price", prices, card.key, file)
    if price is None:
        raise InputError(f"--price has none for {card.key}: add {card.key}=PRICE, of an hour of one")
    costs = costs_of(terms.preset)
    model = CardModel(card, assumptions_for(card, costs, topology, read_profile(measured) if measured else None))

    def pools(part: Mix, drawn: bool) -> list[ClosedPools]:
        own = [slo for slo in terms.slos if slo.traffic_class in {each.name for each in part.classes}]
        return pools_of_card(model, costs, topology, part, own, terms.utilisation_cap, drawn=drawn)

    @cache
    def draws(classes: tuple[str, ...]) -> list[ClosedPools]:
        return pools(mix.only(lambda name: name in classes), True)

    most = _limit(limits, card.key, file)
    return DeviceOffer(
        card.key,
        card.name,
        model.assumptions.basis or ESTIMATED,
        price,
        lambda part: pools(part, False)[0],
        lambda part: draws(tuple(each.name for each in part.classes)),
        card.power_w,
        ESTIMATED,
        most,
    )


def _kinds(name: str) -> dict[str, int]:
    """The types of GPU of a device as ``price_of`` names it, such as "l4 + 2 x h100", and how many it has of each."""
    parts = [part.rpartition(" x ") for part in name.split(" + ")]
    return {kind: int(count or 1) for count, _, kind in parts}


def _check_different(cards: Sequence[Card], offers: Sequence[DeviceOffer], file: Path | None) -> None:
    """Raise InputError for a card that is the device of the run: one type has one price, one limit and one basis."""
    for offer in offers:
        names = [name for kind in _kinds(offer.name) for name in names_of(kind, file)]
        names += names_of(offer.device.removeprefix("emulated "), file)
        if alike := [card for card in cards if any(same(card.key, name) for name in names)]:
            raise InputError(
                f"--card {alike[0].key}: that is {offer.name}, the device of --run, and a type already; leave it out"
            )


def _limit(limits: dict[str, float], name: str, file: Path | None) -> int | None:
    """The most devices of a type, by the GPUs that can be had; None for any number."""
    given = [(number_of("--most", limits, kind, file), count) for kind, count in _kinds(name).items()]
    return min((int(most // count) for most, count in given if most is not None), default=None)


def print_fleets(answer: FleetAnswer) -> None:
    """Print each target: the pools of the cheapest fleet, and the fleets of one type beside it."""
    from harness.report import words

    for each in answer.types:
        for classes, why in each.ruled_out.items():
            out.print(f"{each.name} serves no pool of {classes}: {words.metric(why)}", markup=False, soft_wrap=True)
    for target in answer.targets:
        out.print()
        if target.best is None:
            out.print(f"{target.qps:g} requests/s: {target.note}", style="yellow", markup=False)
        else:
            out.print(_pools_table(target, target.best))
        if target.best or target.undivided:
            out.print(_fleets_table(target, answer.currency))
    bases = {fleet.watts_basis for target in answer.targets for fleet in _fleets(target) if fleet.watts}
    if "estimated" in bases:
        out.print("Power is estimated: the limit on each data sheet, which a card under load rarely reaches")


def _fleets(target: FleetTarget) -> Sequence[MixedFleet]:
    return [*([target.best] if target.best else []), *target.undivided.values()]


def _pools_table(target: FleetTarget, best: MixedFleet) -> Table:
    from harness.report import words

    title = f"The cheapest fleet for {target.qps:g} requests/s"
    if not best.proven:
        title += (
            f" (not proven: {best.gap:.1%} cheaper may be possible)" if best.gap else " (not proven to be the cheapest)"
        )
    table = Table(title=title, title_justify="left")
    for name in ("type", "classes", "of their requests", "requests/s", "devices", "interval", "basis"):
        table.add_column(name, justify="left" if name in ("type", "classes", "basis") else "right")
    for pool in best.pools:
        spared = f" with {words.plural(pool.spares, 'spare')}" if pool.spares else ""
        table.add_row(
            pool.device_type, ", ".join(pool.classes), words.percent(pool.share), words.figure(pool.qps),
            f"{pool.devices}{spared}", words.interval(pool.interval), pool.basis,
        )  # fmt: skip
    return table


def _fleets_table(target: FleetTarget, currency: str) -> Table:
    from harness.report import words

    table = Table(title=f"Fleets for {target.qps:g} requests/s", title_justify="left")
    columns = (
        "fleet",
        "devices",
        f"{currency}/h",
        "interval",
        f"{currency} per audio hour",
        "kW",
        "J per audio s",
        "power",
    )
    for name in columns:
        table.add_column(name, justify="left" if name in ("fleet", "power") else "right")
    rows = [("cheapest", target.best)] if target.best else []
    rows += sorted(
        ((f"only {name}", each) for name, each in target.undivided.items()), key=lambda r: r[1].cost_per_hour
    )
    for name, each in rows:
        watts = None if each.watts is None else each.watts / 1000
        devices = " + ".join(f"{count} {kind}" for kind, count in each.devices.items())
        table.add_row(
            name, devices, words.figure(each.cost_per_hour, 4), words.interval(each.cost_interval),
            words.figure(each.cost_per_audio_hour), words.figure(watts), words.figure(each.joules_per_audio_s),
            each.watts_basis or "-",
        )  # fmt: skip
    return table
