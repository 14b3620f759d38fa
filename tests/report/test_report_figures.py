"""What a report draws: points of ladders, times of stages, and predictions against what was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import report_sample as sample

from harness import wire
from harness.records.plan import ValidationRow
from harness.records.schema import Rung, StageStatistics
from harness.records.summary import Summary
from harness.report import facts, figures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sample.make_run(tmp_path_factory.mktemp("met"), "met")


@pytest.fixture(scope="module")
def swept(run):
    return deployments_of(run, run.fit(), run.plan())


def deployments_of(run, fit, plan):
    return facts.deployments(run.trials(), run.requests(), fit, plan)


def test_hop_time_is_the_step_less_the_stages():
    stages = (
        StageStatistics(wire.LLM, requests=200, executions=50, queue_ns=int(2e8), compute_ns=int(1e9)),
        StageStatistics(wire.VOCODER, requests=100, executions=50, queue_ns=0, compute_ns=int(4e8)),
        StageStatistics(wire.VOICE, requests=1, executions=1, queue_ns=0, compute_ns=int(9e9)),  # not in the frame path
        StageStatistics(wire.DIFFUSION, requests=0, executions=0, queue_ns=0, compute_ns=0),
    )
    rung = Rung(4.0, 200.0, 0, int(1e9), Summary(), stages)
    shares = facts.stage_shares(rung)
    assert shares == (facts.StageShare(wire.LLM, 0.001, 0.005), facts.StageShare(wire.VOCODER, 0.0, 0.004))
    point = facts.Point("t", True, 4.0, 200.0, 0.020, shares, None, None, 0)
    assert point.hop_s == pytest.approx(0.010)
    assert point.real_time_factor == pytest.approx(0.15)
    assert replace(point, step_s=0.001).hop_s == 0.0
    assert replace(point, stages=()).hop_s is None


def test_points_come_from_the_ladder_and_first_audio_from_each_load_held(run, swept):
    assert [len(entry.points) for entry in swept] == [5] * 6
    point = swept[2].points[4]
    before, rung = next(trial for trial in run.trials() if trial.trial_id == "ladder-03").rungs[3:]
    requests = run.requests("ladder-03")
    inside = requests.query(f"{rung.start_ns} <= due_ns < {rung.end_ns}")["ttfa_s"].dropna()
    with_those_who_joined = requests.query(f"{before.end_ns} <= due_ns < {rung.end_ns}")["ttfa_s"].dropna()
    heard = inside if len(inside) >= 8 else with_those_who_joined
    assert point.first_audio_count == len(heard) >= 8
    assert point.first_audio_p50_s == pytest.approx(heard.median())
    assert point.step_s == pytest.approx(rung.sessions / rung.frames_per_s)


def test_the_best_is_the_fits_else_the_plans(run):
    second = replace(run.fit(), best=1)
    assert [entry.letter for entry in deployments_of(run, second, run.plan()) if entry.best] == ["B"]
    assert [entry.letter for entry in deployments_of(run, None, run.plan()) if entry.best] == ["A"]
    assert not any(entry.best for entry in deployments_of(run, None, None))


def test_throughput_plot_draws_the_best_last_and_the_real_time_line(swept):
    figure = figures.throughput_latency(swept)
    assert len(figure.data) == 6
    assert figure.data[-1].line.color == figures.BEST_COLOUR
    assert list(figure.data[-1].x) == [point.frames_per_s / 7.5 for point in swept[0].points]
    assert [shape.y0 for shape in figure.layout.shapes] == pytest.approx([1000 / 7.5])
    letters = {annotation.text for annotation in figure.layout.annotations}
    assert {f"<b>{entry.letter}</b>" for entry in swept} <= letters


def test_stage_bars_add_up_to_the_step(swept):
    figure = figures.stage_time(swept[4], figures.stage_time_top_ms(swept))
    total_ms = np.sum([bar.y for bar in figure.data], axis=0)
    assert total_ms == pytest.approx([1000 * point.step_s for point in swept[4].points])
    assert figure.layout.yaxis.range[1] > total_ms.max()


def test_marks_of_an_invalid_trial_are_hollow(swept):
    hollow = replace(swept[0], points=tuple(replace(point, valid=False) for point in swept[0].points))
    assert set(figures.throughput_latency([hollow]).data[0].marker.symbol) == {"circle-open"}


def test_prediction_plot_tells_high_from_low_and_passed_from_failed():
    known = {"trial_id": "open", "limit": 0.3, "predicted_interval": (None, None)}
    first = ValidationRow(
        metric="rtf p95 of class long",
        rate_per_s=1,
        predicted=0.5,
        measured=0.4,
        relative_error=0.25,
        passed=True,
        **known,
    )
    second = replace(first, rate_per_s=2, metric="m", predicted=0.2, relative_error=0.5, passed=False)
    unheard = replace(second, rate_per_s=3, predicted=None, measured=None, relative_error=None)
    rows = [first, second, unheard]
    figure = figures.prediction(rows)
    assert [list(trace.x) for trace in figure.data] == [[25.0], [-50.0], []]
    undecided = figures.prediction([replace(first, passed=None)])
    assert [(list(trace.x), trace.marker.symbol) for trace in undecided.data][2] == ([25.0], "circle-open")
    assert figure.layout.yaxis.ticktext == ("RTF p95, long", "m")
    assert [(band.x0, band.x1) for band in figure.layout.shapes] == [(-30, 30)] * 2
