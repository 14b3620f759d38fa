"""Mixed fleets: the integer program against brute force, and what is asked of it."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize

from harness.capacity.planning import fleet as planning
from harness.capacity.planning.counted_fleets import cheapest_counted
from harness.capacity.planning.fleet import DeviceOffer, FleetTerms, plan_fleets, subsets
from harness.capacity.planning.fleet_mix import FleetProblem, PoolOption, cheapest
from harness.content import content_of
from harness.errors import InconclusiveError, InputError
from harness.records.fleet import FleetAnswer
from harness.records.slo import Slo
from harness.traffic.mix import Lengths, Mix, TrafficClass

MIX = Mix(
    "two",
    (
        TrafficClass("short", 0.9, Lengths.parse({"fixed": 10})),
        TrafficClass("long", 0.1, Lengths.parse({"fixed": 1000})),
    ),
)
SHARES = {"short": 0.9, "long": 0.1}


def option(kind="a", classes=("short", "long"), carried=(1.0, 2.5), price=1.0, watts=100.0, sizes=(1, 2)):
    return PoolOption(kind, classes, sizes, carried, price, watts)


def problem(*options, qps=2.0, **more):
    return FleetProblem(qps, SHARES, options, **more)


def devices(found):
    return {(pool.option.device_type, pool.option.classes): pool.devices for pool in found.pools}


# The program


def test_a_pool_carries_what_was_planned_and_in_proportion_beyond():
    one = option(carried=(1.0, 2.5))
    assert [one.carried(n) for n in (0, 1, 2, 4)] == [0, 1, 2.5, 5]


def test_one_type_takes_as_many_as_its_rate_needs():
    assert devices(cheapest(problem(option(), qps=2.0))) == {("a", ("short", "long")): 2}
    assert devices(cheapest(problem(option(), qps=2.6))) == {("a", ("short", "long")): 3}


def test_half_a_pool_does_not_carry_half():
    """A linear program would take 0.8 of a pair; two single ones carry less than a pair."""
    assert cheapest(problem(option(carried=(0.1, 2.5)), qps=2.0)).cost_per_hour == 2


def test_classes_part_where_that_is_cheaper():
    small = option("small", ("short",), (2.0, 4.0), price=0.5)
    big = option("big", ("long",), (0.2, 0.4), price=2.0)
    both = option("big", carried=(0.7, 1.4), price=2.0)
    found = cheapest(problem(small, big, both, qps=2.0))
    assert devices(found) == {("small", ("short",)): 1, ("big", ("long",)): 1}
    assert found.cost_per_hour == 2.5 and found.gap == 0


def test_a_class_may_be_shared_between_types():
    first, second = option("a", carried=(1.0, 2.0), price=1.0), option("b", carried=(1.0, 2.0), price=3.0)
    found = cheapest(problem(first, second, qps=2.0, most={"a": 1}))
    assert devices(found) == {("a", ("short", "long")): 1, ("b", ("short", "long")): 1}
    assert sum(pool.share for pool in found.pools) == pytest.approx(1.0)


def test_power_chooses_the_type_that_takes_less():
    hungry, modest = option("a", watts=500.0, price=1.0), option("b", watts=100.0, price=2.0)
    assert devices(cheapest(problem(hungry, modest))) == {("a", ("short", "long")): 2}
    assert devices(cheapest(problem(hungry, modest, power_w=550.0))) == {("b", ("short", "long")): 2}
    assert cheapest(problem(hungry, modest, power_w=150.0)) is None


def test_every_pool_has_its_spares():
    small = option("small", ("short",), (2.0, 4.0), price=0.9)
    big = option("big", ("long",), (0.2, 0.4), price=0.9)
    both = option("both", carried=(1.0, 2.0), price=1.0)
    assert len(cheapest(problem(small, big, both)).pools) == 2
    found = cheapest(problem(small, big, both, spares=1))
    assert devices(found) == {("both", ("short", "long")): 2} and found.cost_per_hour == 3


def test_a_class_that_nobody_serves_has_no_fleet():
    assert cheapest(problem(option(classes=("short",)))) is None


def test_a_search_without_time_says_so(monkeypatch):
    class Unsolved:
        status, x, mip_gap = 1, None, None

    monkeypatch.setattr(optimize, "milp", lambda *_, **__: Unsolved())
    with pytest.raises(InconclusiveError, match="fewer types"):
        cheapest(problem(option()))


def brute_force(asked, most):
    """The least cost over all numbers of devices up to ``most`` a pool; two classes, shares by hand."""
    best = math.inf
    for counts in itertools.product(range(most + 1), repeat=len(asked.options)):
        cost = sum(each.price * (n + asked.spares) for each, n in zip(asked.options, counts, strict=True) if n)
        if cost < best and _serves(asked, counts):
            best = cost
    return best


def _serves(asked, counts):
    reach = {classes: 0.0 for classes in (("short",), ("long",), ("short", "long"))}
    for each, n in zip(asked.options, counts, strict=True):
        reach[each.classes] += each.carried(n) / asked.rate_of(each)
    rest = 1 - min(reach["short", "long"], 1)
    return reach[("short",)] >= rest - 1e-9 and reach[("long",)] >= rest - 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_what_counting_finds(seed):
    rng = np.random.default_rng(seed)
    options = [
        option(
            kind, classes, tuple(rng.uniform(0.2, 1) * np.array([1, 2.2, 3.5])), rng.uniform(0.5, 3), sizes=(1, 2, 3)
        )
        for kind in ("a", "b")
        for classes in (("short",), ("long",), ("short", "long"))
    ]
    asked = problem(*options, qps=float(rng.uniform(0.3, 1.5)), spares=seed % 2)
    assert cheapest(asked).cost_per_hour == pytest.approx(brute_force(asked, 4))


# Fleets of types of device


class Line:
    """Pools that carry ``each`` requests/s per device, less a little for small ones."""

    def __init__(self, each):
        self.each = each

    def rate(self, devices):
        return self.each * (devices - 0.2), "rtf p95 of class long"

    def fewest(self, qps):
        return max(math.ceil(qps / self.each + 0.2 - 1e-9), 1)


def offer(name, rates, price, watts=100.0, **more):
    """A type that carries requests/s by the classes of a part; others it cannot serve."""

    def pools(part):
        classes = tuple(each.name for each in part.classes)
        if classes not in rates:
            raise InconclusiveError("KV memory")
        return Line(rates[classes])

    return DeviceOffer(name, f"NVIDIA {name}", "measured", price, pools, None, watts, "measured", **more)


SMALL = offer("small", {("short",): 4.0}, 0.5)
BIG = offer("big", {("short",): 6.0, ("long",): 0.5, ("short", "long"): 2.0}, 2.0, 300.0)
TERMS = FleetTerms("1.5b", (Slo.parse("short", "rtf_p95", 0.9),), 0.85)


@pytest.fixture(scope="module")
def answer():
    return plan_fleets([SMALL, BIG], MIX, (1.0, 10.0), TERMS)


def test_shorts_go_to_small_devices_and_the_rest_to_big_ones(answer):
    best = answer.targets[1].best
    assert {(pool.device_type, pool.classes): pool.devices for pool in best.pools} == {
        ("small", ("short",)): 3, ("big", ("long",)): 3
    }  # fmt: skip
    assert best.cost_per_hour == 7.5 and best.devices == {"small": 3, "big": 3} and best.proven
    assert answer.targets[1].undivided["big"].cost_per_hour == 12.0
    assert "small" not in answer.targets[1].undivided


def test_cost_and_energy_are_those_of_the_audio(answer):
    best, audio_s = answer.targets[1].best, 10.0 * MIX.mean_audio_s()
    assert best.cost_per_audio_hour == pytest.approx(7.5 / audio_s)
    assert best.watts == 3 * 100 + 3 * 300
    assert best.joules_per_audio_s == pytest.approx(1200 / audio_s)
    assert best.watts_basis == "measured"


def test_a_part_of_the_traffic_is_extrapolated_where_all_of_it_was_measured(answer):
    assert {pool.basis for pool in answer.targets[1].best.pools} == {"extrapolated"}
    assert {pool.basis for pool in answer.targets[1].undivided["big"].pools} == {"simulated"}


def test_what_a_type_cannot_serve_is_said(answer):
    assert answer.types[0].ruled_out == {"long": "KV memory", "short, long": "KV memory"}
    alone = plan_fleets([SMALL], MIX, (1.0,), TERMS).targets[0]
    assert alone.best is None and alone.note == "No type of device can serve long within the SLOs."


def test_limits_hold_for_the_whole_fleet():
    few = replace(BIG, most=2)
    assert plan_fleets([SMALL, few], MIX, (10.0,), TERMS).targets[0].best is None
    assert "given" in plan_fleets([SMALL, few], MIX, (10.0,), TERMS).targets[0].note
    terms = replace(TERMS, power_w=1250.0)
    assert plan_fleets([SMALL, BIG], MIX, (10.0,), terms).targets[0].best.watts <= 1250


class Uneven:
    """Pools of which five devices carry no more than four: less than four and six interpolated."""

    def rate(self, devices):
        return float(4 if devices == 5 else devices), "rtf p95 of class long"

    def fewest(self, qps):
        return 6 if 4 < qps <= 6 else max(math.ceil(qps - 1e-9), 1)


UNEVEN = DeviceOffer("uneven", "NVIDIA uneven", "measured", 1.0, lambda part: Uneven(), None, 100.0, "measured")
LARGE = offer("large", {("short", "long"): 10.0}, 5.5, 1000.0)


def test_the_fleet_that_is_shown_is_the_one_that_is_proven():
    """Interpolated, five uneven devices carry 5/s for 5.0; counted, six of them are needed: a large one is cheaper."""
    best = plan_fleets([UNEVEN, LARGE], MIX, (5.0,), TERMS).targets[0].best
    assert (best.devices, best.cost_per_hour, best.proven) == ({"large": 1}, 5.5, True)


@pytest.mark.parametrize(("kind", "terms"), [(replace(UNEVEN, most=5), TERMS), (UNEVEN, replace(TERMS, power_w=550.0))])
def test_limits_hold_for_the_devices_that_are_shown(kind, terms):
    target = plan_fleets([kind], MIX, (5.0,), terms).targets[0]
    assert target.undivided == {}
    if target.best:
        assert target.best.devices["uneven"] <= 5 and target.best.watts <= 550


def test_without_rounds_to_count_again_the_cheapest_count_is_not_said_to_be_proven():
    kind = option("uneven", sizes=(1, 2, 3, 4, 6, 8), carried=(1.0, 2.0, 3.0, 4.0, 6.0, 8.0))
    found = cheapest_counted(problem(kind, qps=5.0), lambda _: Uneven(), rounds=1)
    assert (found.pools[0].devices, found.cost_per_hour, found.proven) == (6, 6.0, False)
    assert found.gap == pytest.approx(1 / 6)
    assert cheapest_counted(problem(kind, qps=5.0), lambda _: Uneven()).proven


def test_a_pool_that_no_number_of_devices_serves_is_not_chosen():
    class Hopeless(Uneven):
        def fewest(self, qps):
            return None

    cheap, sure = option("cheap", price=0.1), option("sure", carried=(1.0, 2.0))
    planners = {"cheap": Hopeless(), "sure": Uneven()}
    found = cheapest_counted(problem(cheap, sure, qps=2.0), lambda one: planners[one.device_type])
    assert devices(found) == {("sure", ("short", "long")): 2} and not found.proven


def test_a_part_of_the_traffic_on_an_emulated_device_stays_emulated():
    kinds = [replace(each, basis="emulated") for each in (SMALL, BIG)]
    target = plan_fleets(kinds, MIX, (10.0,), TERMS).targets[0]
    assert {pool.basis for pool in target.best.pools} == {"emulated, extrapolated"}
    assert {pool.basis for pool in target.undivided["big"].pools} == {"emulated"}


@pytest.mark.parametrize(
    ("offers", "terms", "message"),
    [
        ([replace(BIG, watts=None)], replace(TERMS, power_w=1e3), "the power of big is not known"),
        ([BIG] * 13, TERMS, "at most 12 types"),
    ],
)
def test_what_cannot_be_planned_is_refused(offers, terms, message):
    with pytest.raises(InputError, match=message):
        plan_fleets(offers, MIX, (1.0,), terms)


def test_an_answer_is_stored_and_read(answer):
    assert FleetAnswer.of(answer.to_dict()) == answer
    assert content_of(answer)["targets"][0]["qps"] == 1.0


def test_every_set_of_classes_is_tried():
    assert len(subsets(("a", "b", "c"))) == 7 and planning.SIZES[-1] == 64
