"""Mixed fleets of a run: its device and those of its plan's profiles as types, and the cheapest fleet per target."""

from __future__ import annotations

from harness.capacity.planning.cost_and_growth import price_of
from harness.capacity.planning.device_types import DeviceType, pools_of_type
from harness.capacity.planning.fleet import (
    ESTIMATED,
    EXTRAPOLATED,
    MEASURED,
    DeviceOffer,
    FleetTerms,
    SimulatedPools,
    plan_fleets,
)
from harness.capacity.planning.plan import pools_of
from harness.capacity.planning.pools import Pools
from harness.device_profile import Profile
from harness.errors import InconclusiveError, InputError
from harness.planfile.plan import PlanSpec
from harness.records.fit import Fit, FittedDeployment
from harness.records.fleet import FleetAnswer
from harness.records.plan import Plan
from harness.records.store import Run
from harness.runs.power import watts_of, watts_of_card
from harness.runs.stages import gpus_of
from harness.traffic.mix import Mix

_SECONDS = 10.0  # of the integer program, for each target of a sign-off


def run_offer(
    run: Run, spec: PlanSpec, fit: Fit, best: FittedDeployment, named: tuple[str, float], most: int | None = None
) -> DeviceOffer:
    """The device of a run as a type. ``named``: its type and its price; ``most``: how many can be had."""
    watts, basis = watts_of(run, gpus_of(run.manifest, spec), best.deployment)
    known_as = run.manifest.times_basis or ("emulated" if run.manifest.emulated else MEASURED)
    kind, price = named

    def pools(part: Mix) -> SimulatedPools:
        return SimulatedPools(_pools_of_part(spec, fit, best, part))

    return DeviceOffer(kind, run.manifest.device, known_as, price, pools, None, watts, basis, most)


def mixed_fleets_of(run: Run, spec: PlanSpec, fit: Fit, plan: Plan) -> FleetAnswer | None:
    """The cheapest fleet for each target, of the run's device and of the types in ``profiles`` that have a price.

    None where fewer than two types have one, or no deployment has a rate. Only a note, and no fleet, where the types or
    classes are too many, or no fleet was found in time.
    """
    best, own = fit.best_deployment, price_of(spec.prices, run.manifest.device)
    if best is None or own is None:
        return None
    offers = [run_offer(run, spec, fit, best, own)]
    for name, profile in run.manifest.profiles.items():
        found = price_of(spec.prices, name) or price_of(spec.prices, profile.device)
        if found and name != own[0]:
            offers.append(_profile_offer(name, profile, found[1], spec, fit, best))
    mix = spec.traffic_mix()
    if len(offers) < 2:
        return None
    terms = FleetTerms(spec.preset, spec.slo_list(), spec.utilisation_cap, spec.currency, seconds=_SECONDS)
    try:
        return plan_fleets(offers, mix, [each.qps for each in plan.targets], terms)
    except (InputError, InconclusiveError) as error:  # too many types or classes; none found in time
        return terms.answer(mix, note=f"No mix of device types is given: {error}.")


def _profile_offer(
    name: str, profile: Profile, price: float, spec: PlanSpec, fit: Fit, best: FittedDeployment
) -> DeviceOffer:
    """The device of a profile as a type, with the knobs of a deployment of fit.json: nothing was measured on it."""
    watts, basis = watts_of_card(profile.device)
    known_as = ESTIMATED if profile.known_as == ESTIMATED else EXTRAPOLATED

    def pools(part: Mix) -> SimulatedPools:
        return SimulatedPools(
            pools_of_type(DeviceType.of_profile(profile), _pools_of_part(spec, fit, best, part), best)
        )

    return DeviceOffer(name, profile.device, known_as, price, pools, None, watts, basis)


def _pools_of_part(spec: PlanSpec, fit: Fit, best: FittedDeployment, part: Mix) -> Pools:
    """Pools of a fitted deployment for some classes of the mix, with their SLOs."""
    names = {each.name for each in part.classes}
    slos = [slo for slo in spec.slo_list() if slo.traffic_class in names]
    return pools_of(fit, best, part, slos, spec.utilisation_cap, spec.routing)
