"""The search: spaces, physics, the surrogate, and when it stops; pure functions of a history and a seed."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from staged_rungs import SESSIONS, point, server, steps_of

from harness import wire
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.staged import StageModel, Topology, rounds
from harness.errors import InputError
from harness.records.load import TrialLoad
from harness.records.schema import Rung, Trial
from harness.records.summary import Summary
from harness.sweep.optimizer.closed_queue import DEVICE, HOST, Round, Station, turns
from harness.sweep.optimizer.decide import Aim, Seen, decide
from harness.sweep.optimizer.guide import Guide, MeasuredPoint
from harness.sweep.optimizer.objective import BestRung, Value
from harness.sweep.optimizer.optuna_engine import KINDS, next_point, study_of
from harness.sweep.optimizer.physics import MeasuredLadder, fit_physics
from harness.sweep.optimizer.space import Space
from harness.sweep.optimizer.surrogate import Surrogate

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
    with pytest.raises(InputError, match="at least one value"):
        Space(((),))


def test_of_a_large_space_some_points_and_the_neighbours_of_the_best_are_weighed():
    space = space_of(*[range(10)] * 6)
    picked = space.candidates([123_456], np.random.default_rng(1), most=500)
    assert len(picked) <= 520 and set(space.neighbours(123_456)) <= set(picked)
    assert picked == space.candidates([123_456], np.random.default_rng(1), most=500)


def test_shared_rounds_agree_with_the_simulator_of_capacity_where_nothing_is_shared():
    stages = tuple(StageModel(name, 4e-4 * n, 3e-3 * n, 2e-3, 32, 2) for n, name in enumerate(wire.STAGES, start=1))
    stations = tuple(
        Station(tuple(each.time_s(b) for b in range(1, 33)), each.delay_s, 32, 32, each.instances) for each in stages
    )
    for n in SESSIONS:
        other = rounds(Topology(stages, 0.0005), n, np.random.default_rng(9), frames=200).step_s
        own = turns(Round(stations, 0.0005), n, np.random.default_rng(9), frames=200).step_s
        assert own == pytest.approx(other, rel=0.1 if n > 1 else 0.02)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.floats(0, 0.3))
@settings(max_examples=25, deadline=None)
def test_no_round_is_shorter_than_its_work_or_than_the_room_for_it_allows(sessions, instances, room, drag):
    stations = (Station((1e-3,)), Station((4e-3,) * 8, 1e-3, 4, 8, instances))
    shown = turns(Round(stations, 5e-4, (room, math.inf), drag, noise=0.0), sessions, np.random.default_rng(3))
    work_s = sessions * (1e-3 + 2 * 5e-4) + math.ceil(sessions / 8) * 4e-3
    assert shown.step_s >= 0.93 * work_s / room and shown.step_s >= 0.999 * 6e-3  # a window cuts rounds at its ends
    if sessions == 1:
        assert shown.step_s == pytest.approx(7e-3)  # with the delay, as one alone waits it out


def test_a_full_batch_goes_at_once_and_a_late_one_takes_all():
    shown = turns(Round((Station((1e-3,) * 8, 0.05, 2, 8),), 1e-3), 2, np.random.default_rng(1))
    assert shown.step_s < 0.01 and np.flatnonzero(shown.executions[0]).tolist() == [2]
    late = turns(Round((Station((1e-3,) * 8, 0.05, 6, 8),), 1e-3), 4, np.random.default_rng(1))
    assert late.step_s > 0.05 and np.flatnonzero(late.executions[0]).max() == 4


@pytest.mark.parametrize("room", [(math.inf, HOST), (2, HOST), (1, DEVICE)])
def test_two_measured_points_foretell_the_step_times_of_others(room):
    ladders = [MeasuredLadder(point(delay), server(delay, room=room)) for delay in (0, 5000)]
    physics = fit_physics(ladders, {})
    for n, times in enumerate(physics.times, start=1):
        assert times[:8] == pytest.approx([n * (3e-3 + 4e-4 * b) for b in range(1, 9)], rel=0.25)
    assert 4 * physics.hop_s + physics.entry_s == pytest.approx(0.0025, rel=0.3)
    for delay, instances in ((2000, 1), (20_000, 1), (0, 2), (5000, 3)):
        truth = steps_of(server(delay, instances, room))
        off = np.abs(physics.step_s(point(delay, instances), SESSIONS) / truth - 1)
        assert np.median(off) < 0.15 and off.max() < 0.3  # how sessions begin decides how they meet in batches


def test_chunks_and_entries_that_were_not_tried_are_foretold():
    def shown(chunk, entries):
        return server(chunk_s=4e-3 / chunk, entries=entries)

    ladders = [MeasuredLadder(point() | {"chunk_frames": n, "entry.instances": 1}, shown(n, 1)) for n in (1, 8)]
    physics = fit_physics(ladders, {})
    for chunk, entries in ((2, 1), (1, 2), (4, 2)):
        predicted = physics.step_s(point() | {"chunk_frames": chunk, "entry.instances": entries}, SESSIONS)
        assert predicted == pytest.approx(steps_of(shown(chunk, entries)), rel=0.2)


def test_stages_that_were_not_counted_teach_nothing():
    assert fit_physics([], {}) is None
    assert fit_physics([MeasuredLadder(point(), (Rung(1, 10.0, 0, 1, Summary()),))], {}) is None


def test_fewer_diffusion_steps_take_less_time():
    physics = fit_physics([MeasuredLadder(point(), server())], {"diffusion_steps": 10})
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


def test_what_was_foretold_badly_is_doubted_more():
    x, base, error = np.linspace(0, 1, 8)[:, None], np.zeros(8), np.full(8, 0.01)
    wild = np.array([0.0, 2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0])
    spreads = []
    for y in (wild / 100, wild):
        surrogate = Surrogate.fit(x, base, y, error, np.random.default_rng(1))
        drawn = surrogate.sample(x, base, 200, np.random.default_rng(2))
        spreads.append(np.mean(drawn.std(axis=0) / surrogate.moments(x, base)[1]))
    assert spreads[1] > 1.3 * spreads[0]


def test_a_value_that_hangs_on_a_slo_just_kept_is_doubted():
    rungs = server()
    last_s = rungs[-1].summary.ttfa_p95_s

    def error(limit_s):
        objective = BestRung("frames_per_s", at_most={"ttfa_p95_s": limit_s}, at_least={"sessions": 32})
        guide = Guide(GRID, objective, "model", Aim(), 1, SESSIONS, {})
        one = MeasuredPoint(0, Value(objective.value([each.summary.figure for each in rungs])), rungs)
        return guide._error(one, guide._known([one])[1])

    assert error(2 * last_s) < 0.05 < 1 < error(1.01 * last_s)


ANYTHING = Aim()


def searched(truth, seed=1, aim=ANYTHING, expected=None, noise=0.0, kind="model", space=GRID):
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
    points, decision = searched(truth, seed, Aim(most=12))
    assert len(points) == len(set(points)) <= 12
    assert truth[decision.best] >= 0.9 * truth.max()


def test_what_the_physics_knows_needs_few_trials_and_it_says_how_sure_it_is():
    truth = bowl(GRID, 77)
    points, decision = searched(truth, expected=lambda numbers: truth[numbers] * 1.3, aim=Aim(margin=0.05, sure=0.9))
    assert len(points) <= 8 and decision.best in np.flatnonzero(truth >= 0.95 * truth.max())
    assert decision.confidence >= 0.85 and "untried" in decision.reason


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_search_decides_alike_on_one_history(kind):
    truth = bowl(GRID, 31)
    first, second = (searched(truth, 5, Aim(most=9), kind=kind)[0] for _ in range(2))
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
    points, decision = searched(truth, aim=Aim(most=20))
    assert decision.best < 60 and len(set(points)) == len(points)


def test_a_small_space_is_tried_whole_where_nothing_is_known():
    small = space_of((1, 2), (1, 2))
    points, decision = searched([0.0] * 4, space=small)
    assert sorted(points) == [0, 1, 2, 3] and "all 4 points" in decision.reason


def test_the_same_values_everywhere_end_a_search_soon():
    points, decision = searched(np.full(GRID.size, 3.0), noise=0.002, aim=Aim(margin=0.2))
    assert len(points) < 40 and decision.confidence > 0.85


def test_nothing_measured_begins_in_the_middle():
    decision = decide(GRID, [], (), None, Aim(), 1)
    assert GRID.point(decision.number) == {"k0": 5, "k1": 4} and decision.best is None


def test_a_study_holds_the_history_for_optunas_own_tools():
    study = study_of(GRID, [Seen(3, 5.0), Seen(4, None)], [9])
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "RUNNING"]
    assert study.best_params == GRID.levels(3)


LOAD = TrialLoad(loop="closed", sessions=(1, 2, 3), seconds=5, seed=1)


def test_a_metric_is_best_at_a_rung_that_keeps_the_limits():
    summaries = [Summary(frames_per_s=10.0 * n, ttfa_p95_s=0.1 * n, sessions=n) for n in (1, 2, 3)]
    trial = Trial("t", "ladder", {}, LOAD, "", 0.0, True, (), tuple(Rung(1, 1.0, 0, 1, each) for each in summaries))
    assert BestRung("frames_per_s", at_most={"ttfa_p95_s": 0.2}).measured([trial]).value == 20
    lowest = BestRung("ttfa_p95_s", -1, at_least={"sessions": 2}).measured([trial])
    assert lowest.value == pytest.approx(5) and lowest.says == "ttfa_p95_s 0.2"
    assert BestRung("frames_per_s", at_most={"ttfa_p95_s": 0.01}).measured([trial]).value == 0


def test_a_minimised_metric_of_zero_is_best_of_all():
    summaries = [Summary(late_sends_share=share, sessions=n) for n, share in ((1, 0.0), (2, 0.2), (3, math.nan))]
    trial = Trial("t", "ladder", {}, LOAD, "", 0.0, True, (), tuple(Rung(1, 1.0, 0, 1, each) for each in summaries))
    lowest = BestRung("late_sends_share", -1)
    found = lowest.measured([trial])
    assert found.says == "late_sends_share 0" and math.isfinite(found.value)
    little, more = [Summary(late_sends_share=0.001).figure], [each.figure for each in summaries[1:]]
    assert found.value > lowest.value(little) > lowest.value(more)
    assert BestRung("late_sends_share").measured([trial]).says == "late_sends_share 0.2"
    assert lowest.measured([replace(trial, rungs=trial.rungs[2:])]).says == "no rung meets the limits"


def test_metrics_of_an_untried_point_follow_its_step_time():
    rungs = server()
    value_of = BestRung("frames_per_s", at_most={"ttfa_p95_s": 1.0}).expecting([], [MeasuredLadder(point(), rungs)])
    steps = tuple(each.sessions / each.frames_per_s for each in rungs)
    same = value_of(StepTime("piecewise", steps, SESSIONS), point())
    slower = value_of(StepTime("piecewise", tuple(2 * each for each in steps), SESSIONS), point())
    assert same == pytest.approx(max(r.frames_per_s for r in rungs if r.summary.ttfa_p95_s <= 1))
    assert 0 < slower < same
