"""What the scripts of benchmarks/service/ rest on: their gates, their callers, and whom a fault hits."""

import asyncio
import contextlib
import importlib
import itertools
import json
import os
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from harness.capacity.models.steps import StepTime
from harness.errors import ServerError
from harness.service.settings import StudioSettings
from harness.service.worker import TaskWorker


@pytest.fixture
def load(monkeypatch):
    """``load(name)``: a script as a module, found as it is when it runs."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks" / "service"))
    return importlib.import_module


def test_a_fault_finds_the_process_of_the_consumer_that_holds_a_task(load):
    worker = TaskWorker(StudioSettings(), None, None, None)
    assert load("job_faults").pid_of(f"{worker.name}-3") == os.getpid()
    assert load("job_faults").pid_of("a-host-with-dashes-77-a1b2c3-0") == 77


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        ({"not_done": 1}, "not_done"),
        ({"long_not_done": 1}, "long_not_done"),
        ({"front_grew_mib": 50.0}, "front_grew_mib"),
        ({"redis_grew_mib": 50.0}, "redis_grew_mib"),
        ({"worker_grew_mib": 300.0}, "worker_grew_mib"),
    ],
)
def test_the_load_of_the_job_service_has_a_gate_for_each_loss_and_each_leak(load, worse, name):
    """A worker may grow by four copies of each carry: 30 MiB after 90 minutes."""
    jobs = load("jobs")
    fine = {"not_done": 0, "long_not_done": 0, "long_tasks": 2, "long_minutes": 90.0, "worker_grew_mib": 230.0}
    assert jobs.carry_mib(90.0) == pytest.approx(29.7, abs=0.1)
    assert jobs.problems_of(fine) == [] and jobs.problems_of(fine | worse) == [name]
    assert jobs.problems_of(fine | {"long_minutes": 10.0}) == ["worker_grew_mib"]


def test_a_poller_that_waits_for_its_first_task_longer_than_the_front_keeps_connections_still_follows_it(load):
    jobs = load("jobs")
    task = json.dumps({"status": "done", "ended": "2026-01-01T00:00:00.000Z"}).encode()

    async def answer(reader, writer):
        with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 0.5)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(task) + task)
            await writer.drain()
        writer.close()

    async def main():
        made, followed = asyncio.Queue(), jobs.Followed()
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            polling = asyncio.create_task(jobs._polls(server.sockets[0].getsockname()[1], made, followed))
            await asyncio.sleep(1.0)
            made.put_nowait({"self": "/v1/tasks/a"})
            made.put_nowait(None)
            await polling
        return followed.ends

    assert asyncio.run(main()) == ["done"]


COSTS = SimpleNamespace(task_s=0.2, segment_s=0.1, per_frame_s=1e-4)


class Host:
    """A studio whose steps are those of a timetable: ``speeds`` of the ladders, in between those around a run.

    ``wavers``: by what factor steps are longer within each run than that, in turn.
    """

    def __init__(self, turnaround, speeds=(1.0,), wavers=(1.0,)):
        self.turnaround, self.speeds, self.rungs, self.wavers = turnaround, speeds, 0, itertools.cycle(wavers)

    def ask(self, found):
        return found

    @property
    def _ladder(self):
        """The number of the ladder that is next or in progress; one rung comes before the first."""
        return (self.rungs - 1) // len(self.turnaround.LADDER)

    def _speed(self, ladder):
        return self.speeds[min(max(ladder, 0), len(self.speeds) - 1)]

    def rung(self, sessions, frames):
        speed = self._speed(self._ladder)
        self.rungs += 1
        return speed * (0.008 + 0.002 * sessions)

    def play(self, plan):
        speed = np.sqrt(self._speed(self._ladder - 1) * self._speed(self._ladder)) * next(self.wavers)
        step = StepTime("linear", (0.008 * speed, 0.002 * speed))
        return self.turnaround.predicted(self.turnaround.Fitted(step, COSTS), plan)

    def beside_frames(self, segments):
        return [0.15, *(0.06 + 1e-4 * 75 * number for number in range(1, segments))]

    def beside_segments(self, segments):
        return 0.05 + 0.04 * (segments - 1)


@pytest.fixture
def turnaround(load):
    return load("turnaround")


def tries_of(turnaround, speeds, rounds=3, wavers=(1.0,)):
    given = turnaround.Conditions(12, 1, (60, 300), rounds, 0.0)
    return turnaround.play(Host(turnaround, speeds, wavers), given)


def test_turnarounds_on_a_host_that_does_not_change_are_predicted(turnaround):
    tries, first = tries_of(turnaround, [1.0])
    assert astuple(first.costs) == pytest.approx((0.2, 0.1, 1e-4))
    for by in (turnaround.BEFORE, turnaround.BRACKETING):
        figures = turnaround.judge(tries, by)
        assert (figures["rounds"], figures["runs"], figures["judged"], figures["not_judged"]) == (3, 15, 15, [])
        assert figures["figures"] == 15, "the rounds of a run make one figure"
        assert figures["turnaround_error_worst"] < 0.01 and turnaround.problems_of(figures) == []


def test_every_round_has_other_draws(turnaround):
    tries, _ = tries_of(turnaround, [1.0], rounds=2)
    assert tries[1].plan.name == tries[6].plan.name
    assert not np.array_equal(tries[1].plan.task_frames, tries[6].plan.task_frames)


def test_a_round_between_ladders_that_differ_is_counted_and_not_judged(turnaround):
    tries, _ = tries_of(turnaround, [1.0, 1.3])
    figures = turnaround.judge(tries, turnaround.BRACKETING)
    assert [each.is_valid for each in tries] == [False, *[True] * 14] and tries[0].drift == pytest.approx(0.3)
    assert (figures["judged"], figures["invalid"], figures["not_judged"]) == (14, 1, [])
    assert np.abs(tries[0].errors(turnaround.BEFORE)).min() > 0.1, "the ladder before it was faster than the run"
    assert figures["turnaround_error_worst"] < 0.01 < figures["drift_worst"]


def test_what_a_host_does_between_its_ladders_is_averaged_over_rounds_and_what_a_model_gets_wrong_is_not(turnaround):
    """A run of 5 is played with each of three speeds: in single rounds two of three errors are 15% or more."""
    wavers = [1.0] * 5 + [1.2] * 5 + [1 / 1.2] * 5
    fair = turnaround.judge(tries_of(turnaround, [1.0], wavers=wavers)[0], turnaround.BRACKETING)
    assert fair["turnaround_error_median"] < 0.05 < 0.1 < fair["single_error_median"]
    biased = turnaround.judge(tries_of(turnaround, [1.0], wavers=[1.25])[0], turnaround.BRACKETING)
    assert biased["turnaround_bias_median"] < -0.1 and "above 10%" in turnaround.problems_of(biased)[0]


def test_a_host_that_changes_all_the_time_shows_nothing(turnaround):
    tries, _ = tries_of(turnaround, [1.0, 1.3] * 20)
    figures = turnaround.judge(tries, turnaround.BRACKETING)
    assert (figures["runs"], figures["judged"]) == (15, 0) and len(figures["not_judged"]) == 5
    assert np.isnan(figures["turnaround_error_median"]) and "inconclusive" in turnaround.problems_of(figures)[0]
    assert turnaround.shown(tries, figures | {"device": "this"}).row_count == 5


def test_a_ladder_that_cannot_be_fitted_costs_its_round_and_no_other(turnaround, monkeypatch):
    measured, calls = turnaround.measure_ladder, []

    def scatters_once(*given):
        calls.append(1)
        if len(calls) == 3:
            raise turnaround.InconclusiveError("its rungs scatter")
        return measured(*given)

    monkeypatch.setattr(turnaround, "measure_ladder", scatters_once)
    tries, _ = tries_of(turnaround, [1.0], rounds=2)
    figures = turnaround.judge(tries, turnaround.BRACKETING)
    assert [each.is_valid for each in tries] == [True, False, *[True] * 8] and figures["invalid"] == 1
    assert turnaround.shown(tries, figures | {"device": "this"}).row_count == 5


def test_on_an_emulated_gpu_nothing_excuses_an_error(turnaround):
    tries, _ = tries_of(turnaround, [1.0, 1.3] * 20, rounds=1)
    figures = turnaround.judge(tries, turnaround.BEFORE)
    assert (figures["judged"], figures["invalid"]) == (5, 0)
    assert "above 10%" in turnaround.problems_of(figures)[0]


def test_costs_of_a_task_that_come_out_below_zero_are_fitted_again_without_them(load):
    """Clipping the slope alone leaves the intercept at what it was beside a negative one."""
    stage = load("studio_stage")

    class Served:
        """A later segment costs 0.3 s, less 0.2 s for each 1000 frames before it."""

        def ask(self, found):
            return found

        def beside_frames(self, segments):
            return [0.1, *(0.3 - 2e-4 * stage.SEGMENT_FRAMES * number for number in range(1, segments))]

        def beside_segments(self, segments):
            return 0.05

    costs = stage.measure_costs(Served())
    mean_s = 0.3 - 2e-4 * stage.SEGMENT_FRAMES * stage.SEGMENTS / 2
    assert astuple(costs) == pytest.approx((0.15, mean_s, 0.0))


def test_a_step_is_measured_while_all_streams_are_in_progress(load):
    def stream(start_s, *gaps_s):
        received_ns = np.round(1e9 * (start_s + np.cumsum([0.0, *gaps_s])))
        return SimpleNamespace(chunks=SimpleNamespace(received_ns=received_ns))

    alone, together = [0.01] * 10, [0.02] * 10
    first, last = stream(1.0, *alone, *together), stream(1.1, *together, *alone)
    assert load("studio_stage").step_s([first, last]) == pytest.approx(0.02)
    with pytest.raises(ServerError, match="never in progress at once"):
        load("studio_stage").step_s([stream(0.0, 0.1), stream(5.0, 0.1)])
