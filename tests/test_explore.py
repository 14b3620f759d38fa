"""The search: spaces, physics, the surrogate, and when it stops; pure functions of a history and a seed."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import wire
from harness.capacity.staged import Stage, Topology, rounds
from harness.capacity.steps import StepTime
from harness.errors import InputError
from harness.explore.decide import Aim, Seen, decide
from harness.explore.engine import KINDS, next_point, study_of
from harness.explore.model import Taught, learn
from harness.explore.objective import BestRung
from harness.explore.space import Space
from harness.explore.surrogate import Surrogate
from harness.records import BatchStatistics, Rung, StageStatistics, Trial

SESSIONS = 1, 4, 8, 16, 32
columns = st.lists(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.integers(0, 50_000), min_size=n, max_size=n, unique=True).map(tuple)
    ),
    min_size=1,
    max_size=4,
)


def space_of(*values):
    return Space(tuple(tuple({f"k{at}": value} for value in column) for at, column in enumerate(values)))


GRID = space_of(range(0, 12), range(0, 10))


@given(columns)
def test_a_point_and_its_number_are_one(values):
    space = space_of(*values)
    numbers = list(range(space.size))
    assert [space.number(space.point(number)) for number in numbers] == numbers
    assert [space.at(space.levels(number)) for number in numbers] == numbers
    assert space.number({"other": 1}) is None
    assert 0 <= space.middle() < space.size


@given(columns)
def test_neighbours_are_mutual_where_values_rise(values):
    space = space_of(*(sorted(each) for each in values))
    for number in range(min(space.size, 40)):
        assert all(number in space.neighbours(near) for near in space.neighbours(number))


def test_coordinates_keep_order_and_fill_zero_to_one():
    space = space_of((0, 1000, 5000, 25000), ("round", "oldest"), (3,))
    places = space.coordinates(range(space.size))
    assert places.shape == (8, 3) and places.min() == 0
    assert places[::2, 0].tolist() == sorted(set(places[:, 0])) and places[:, 0].max() == 1
    assert np.linalg.norm(places[0, 1:] - places[1, 1:]) == pytest.approx(1)


def test_a_later_column_wins_and_a_point_of_its_values_is_found():
    space = Space((({"a": 1, "b": 1}, {"a": 2, "b": 2}), ({"b": 2}, {"b": 3})))
    assert space.point(0) == {"a": 1, "b": 2} and space.number({"a": 2, "b": 3}) == 3
    with pytest.raises(InputError, match="one value or more"):
        Space(((),))


def test_of_a_large_space_some_points_and_the_neighbours_of_the_best_are_weighed():
    space = space_of(*[range(10)] * 6)
    picked = space.candidates([123_456], np.random.default_rng(1), most=500)
    assert len(picked) <= 520 and set(space.neighbours(123_456)) <= set(picked)
    assert picked == space.candidates([123_456], np.random.default_rng(1), most=500)


def server(delay_us=0, instances=1, hop_s=0.0005, shared=0):
    """What a staged server of known times shows: alpha and tau0 by stage as (1, 2, 3) x (0.4, 3) ms."""
    stages = tuple(
        Stage(name, 4e-4 * n, 3e-3 * n, delay_us / 1e6, 32, instances) for n, name in enumerate(wire.STAGES, start=1)
    )
    topology = Topology(stages, hop_s, one_gpu=shared == 1)
    return topology, tuple(rung(topology, n) for n in SESSIONS)


def rung(topology, sessions):
    shown = rounds(topology, sessions, np.random.default_rng(9))
    stages = []
    for stage in topology.stages:
        batches = tuple(BatchStatistics(b, 10, round(1e10 * stage.time_s(b))) for b in (1, 2, 4, 8))
        stages.append(StageStatistics(stage.name, 150, 40, 0, sum(b.compute_ns for b in batches), batches))
    summary = {"frames_per_s": sessions / shown.step_s, "ttfa_p95_s": 5 * shown.step_s, "sessions": sessions}
    return Rung(sessions, sessions / shown.step_s, 0, 1, summary, tuple(stages))


def point(delay_us=0, instances=1):
    knobs = {"delay_us": delay_us, "instances": instances}
    return {f"{stage}.{knob}": value for stage in wire.STAGES for knob, value in knobs.items()}


@pytest.mark.parametrize("shared", [0, 1])
def test_two_measured_points_foretell_the_step_times_of_others(shared):
    taught = [Taught(point(delay), server(delay, shared=shared)[1]) for delay in (0, 5000)]
    physics = learn(taught, {})
    for n, (name, alpha_s, tau0_s) in enumerate(physics.times, start=1):
        assert (name, alpha_s, tau0_s) == (wire.STAGES[n - 1], pytest.approx(4e-4 * n), pytest.approx(3e-3 * n))
    assert physics.hop_s == pytest.approx(0.0005, abs=3e-4)  # a hop is little beside a batch
    for delay, instances in ((2000, 1), (20_000, 1), (0, 2), (5000, 3)):
        topology, rungs = server(delay, instances, shared=shared)
        truth = [each.sessions / each.frames_per_s for each in rungs]
        off = np.abs(physics.step_s(point(delay, instances), SESSIONS) / truth - 1)
        assert np.median(off) < 0.04 and off.max() < 0.25  # how sessions begin decides how they meet in batches


def test_stages_that_were_not_counted_teach_nothing():
    assert learn([], {}) is None
    assert learn([Taught(point(), (Rung(1, 10.0, 0, 1, {}),))], {}) is None


def test_fewer_diffusion_steps_take_less_time():
    physics = learn([Taught(point(), server()[1])], {"diffusion_steps": 10})
    steps = [physics.step_s(point() | {"diffusion_steps": n}, [8])[0] for n in (5, 10, 20)]
    assert steps == sorted(steps) and steps[2] > 1.3 * steps[0]


def test_the_surrogate_holds_what_it_was_told_and_doubts_what_it_was_not():
    x = np.linspace(0, 1, 7)[:, None]
    base, y = np.zeros(7), 0.2 * np.sin(4 * x[:, 0])
    known = Surrogate.fit(x[::2], base[::2], y[::2], np.full(4, 0.005), np.random.default_rng(1))
    mean, sd = known.moments(x, base)
    assert mean[::2] == pytest.approx(y[::2], abs=0.03)
    assert sd[1::2].min() > sd[::2].max()
    draws = known.sample(x, base, 200, np.random.default_rng(2))
    assert draws.mean(axis=0) == pytest.approx(mean, abs=0.03) and draws.std(axis=0) == pytest.approx(sd, rel=0.35)


ANYTHING = Aim()


def walk(truth, seed=1, aim=ANYTHING, expected=None, noise=0.0, kind="model", space=GRID):
    """A search to its end: its points in order, and the last decision."""
    rng, seen = np.random.default_rng(seed), []
    while (decision := next_point(space, seen, (), kind, expected, aim, seed)).number is not None:
        value = truth[decision.number]
        seen.append(Seen(decision.number, None if value is None else value * math.exp(noise * rng.standard_normal())))
    return [each.number for each in seen], decision


def bowl(space, best):
    places = space.coordinates(range(space.size))
    return 10 * np.exp(-1.5 * np.sum((places - places[best]) ** 2, axis=1))


@settings(max_examples=3, deadline=None)
@given(st.integers(0, GRID.size - 1), st.integers(0, 1000))
def test_a_search_ends_near_the_best_with_a_tenth_of_the_points(best, seed):
    truth = bowl(GRID, best)
    points, decision = walk(truth, seed, Aim(most=12))
    assert len(points) == len(set(points)) <= 12
    assert truth[decision.best] >= 0.9 * truth.max()


def test_what_the_physics_knows_needs_few_trials_and_it_says_how_sure_it_is():
    truth = bowl(GRID, 77)
    points, decision = walk(truth, expected=lambda numbers: truth[numbers] * 1.3, aim=Aim(margin=0.05, sure=0.9))
    assert len(points) <= 8 and decision.best in np.flatnonzero(truth >= 0.95 * truth.max())
    assert decision.confidence >= 0.85 and "untried" in decision.reason


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_search_decides_alike_on_one_history(kind):
    truth = bowl(GRID, 31)
    first, second = (walk(truth, 5, Aim(most=9), kind=kind)[0] for _ in range(2))
    assert first == second and len(set(first)) == 9
    seen = [Seen(number, truth[number]) for number in first[:4]]  # as after a kill
    assert next_point(GRID, seen, (), kind, None, Aim(most=9), 5).number == first[4]


@pytest.mark.parametrize("kind", KINDS)
def test_points_in_flight_are_not_chosen_again(kind):
    seen, truth = [Seen(3, 5.0), Seen(50, 7.0)], bowl(GRID, 60)
    in_flight = []
    for _ in range(4):
        in_flight.append(next_point(GRID, seen, in_flight, kind, lambda n: truth[n], Aim(), 1).number)
    assert len({3, 50, *in_flight}) == 6


def test_points_that_cannot_be_measured_or_are_of_no_use_are_passed_over():
    truth = list(bowl(GRID, 5))
    for number in range(60, 120):
        truth[number] = None if number % 2 else 0.0
    points, decision = walk(truth, aim=Aim(most=20))
    assert decision.best < 60 and len(set(points)) == len(points)


def test_a_small_space_is_tried_whole_where_nothing_is_known():
    small = space_of((1, 2), (1, 2))
    points, decision = walk([0.0] * 4, space=small)
    assert sorted(points) == [0, 1, 2, 3] and "all 4 points" in decision.reason


def test_the_same_values_everywhere_end_a_search_soon():
    points, decision = walk(np.full(GRID.size, 3.0), noise=0.002, aim=Aim(margin=0.2))
    assert len(points) < 40 and decision.confidence > 0.85


def test_nothing_measured_begins_in_the_middle():
    decision = decide(GRID, [], (), None, Aim(), 1)
    assert GRID.point(decision.number) == {"k0": 5, "k1": 4} and decision.best is None


def test_a_study_holds_the_history_for_optunas_own_tools():
    study = study_of(GRID, [Seen(3, 5.0), Seen(4, None)], [9])
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "RUNNING"]
    assert study.best_params == GRID.levels(3)


def test_a_metric_is_best_at_a_rung_that_keeps_the_limits():
    summaries = [{"frames_per_s": 10.0 * n, "ttfa_p95_s": 0.1 * n, "sessions": n} for n in (1, 2, 3)]
    trial = Trial("t", "ladder", {}, {}, "", 0.0, True, (), tuple(Rung(1, 1.0, 0, 1, each) for each in summaries))
    assert BestRung("frames_per_s", at_most={"ttfa_p95_s": 0.2}).measured([trial]).value == 20
    lowest = BestRung("ttfa_p95_s", -1, at_least={"sessions": 2}).measured([trial])
    assert lowest.value == pytest.approx(5) and lowest.says == "ttfa_p95_s 0.2"
    assert BestRung("frames_per_s", at_most={"ttfa_p95_s": 0.01}).measured([trial]).value == 0


def test_a_minimised_metric_of_zero_is_best_of_all():
    summaries = [{"late_sends_share": share, "sessions": n} for n, share in ((1, 0.0), (2, 0.2), (3, math.nan))]
    trial = Trial("t", "ladder", {}, {}, "", 0.0, True, (), tuple(Rung(1, 1.0, 0, 1, each) for each in summaries))
    lowest = BestRung("late_sends_share", -1)
    found = lowest.measured([trial])
    assert found.says == "late_sends_share 0" and math.isfinite(found.value)
    assert found.value > lowest.value([{"late_sends_share": 0.001}]) > lowest.value(summaries[1:])
    assert BestRung("late_sends_share").measured([trial]).says == "late_sends_share 0.2"
    assert lowest.measured([replace(trial, rungs=trial.rungs[2:])]).says == "no rung keeps the limits"


def test_metrics_of_an_untried_point_follow_its_step_time():
    rungs = server()[1]
    value_of = BestRung("frames_per_s", at_most={"ttfa_p95_s": 1.0}).expecting([], [Taught(point(), rungs)])
    steps = tuple(each.sessions / each.frames_per_s for each in rungs)
    same = value_of(StepTime("piecewise", steps, SESSIONS), point())
    slower = value_of(StepTime("piecewise", tuple(2 * each for each in steps), SESSIONS), point())
    assert same == pytest.approx(max(r.frames_per_s for r in rungs if r.summary["ttfa_p95_s"] <= 1))
    assert 0 < slower < same
