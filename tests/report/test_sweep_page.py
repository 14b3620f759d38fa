"""The sweep's page says what the stored records say, and the winner's files can be deployed."""

import numpy as np
import pytest
from capacity_truth import bare_fit
from google.protobuf import text_format
from report_page import Page
from report_sample import make_run
from tritonclient.grpc import model_config_pb2

from harness import wire
from harness.deploy.config import Deployment as Deployed
from harness.records.load import TrialLoad
from harness.records.schema import Trial
from harness.report import facts, sweep_facts
from harness.report.facts import Point, StageShare, SweptDeployment
from harness.report.sweep_page import describe_best, render, write_sweep_report


def point(sessions=1.0, frames_per_s=50.0, queue_s=0.001, valid=True) -> Point:
    stages = tuple(StageShare(stage, queue_s, 0.004) for stage in wire.STAGES)
    return Point("t", valid, sessions, frames_per_s, sessions / frames_per_s, stages, None, None, 0)


def entry(letter: str, delay_us: int, *points: Point, best=False, rate=None, **knobs) -> SweptDeployment:
    all_knobs = {f"{stage}.delay_us": delay_us for stage in wire.STAGES} | knobs
    fit = bare_fit(max_rate_per_s=rate, max_rate_interval=(rate, rate))
    return SweptDeployment(letter, letter, all_knobs, tuple(points), best, fit if rate is not None else None)


def test_three_stages_at_100_ms_are_computed_where_they_were_not_measured():
    swept = [entry("A", 0, point(queue_s=0.0)), entry("B", 25_000, point(frames_per_s=10, queue_s=0.025))]
    none, some, quoted = sweep_facts.delay_bars(swept, 1.0)
    assert [bar.computed for bar in (none, some, quoted)] == [False, False, True]
    assert quoted.step_s == pytest.approx(none.step_s + 0.3) and quoted.step_s > sweep_facts.FRAME_S
    largest_s = sweep_facts.largest_delay_s(none)
    assert none.step_s + 3 * largest_s == pytest.approx(sweep_facts.FRAME_S)


def test_a_delay_that_was_measured_at_100_ms_or_at_a_shared_load_is_not_computed():
    measured = [entry("A", 100_000, point(frames_per_s=3, queue_s=0.1))]
    assert [bar.computed for bar in sweep_facts.delay_bars(measured, 1.0)] == [False]
    loaded = [entry("A", 0, point(sessions=16.0, frames_per_s=200))]
    assert [bar.computed for bar in sweep_facts.delay_bars(loaded, 16.0)] == [False]
    assert sweep_facts.delay_bars(loaded, 1.0) == []


def test_no_window_beats_one_of_the_front_in_both():
    rng = np.random.default_rng(3)
    points = [point(sessions=float(n), frames_per_s=float(f)) for n, f in rng.uniform(1, 100, (40, 2))]
    front = sweep_facts.pareto([entry("A", 0, *points, point(90.0, 900.0, valid=False))])
    for _, kept in front:
        assert not any(other.audio_s_per_s > kept.audio_s_per_s and other.step_s < kept.step_s for other in points)
    assert [kept.audio_s_per_s for _, kept in front] == sorted(kept.audio_s_per_s for _, kept in front)


def test_answers_come_best_first_and_say_why_there_is_none():
    swept = [entry("A", 0, point(), rate=1.5), entry("B", 9, point(), rate=2.5), entry("C", 99, point())]
    load = TrialLoad(loop="closed", sessions=(1, 2), seconds=5, seed=1)
    broken = Trial("t", "ladder", swept[2].knobs, load, "", 1.0, False, ("failed: no stage loads this",), ())
    found = sweep_facts.answers(swept, [broken])
    assert [answer.entry.letter for answer in found] == ["B", "A", "C"]
    assert found[2].note == "failed: no stage loads this"
    assert sweep_facts.response(found[:2]).unit == "req/s"
    assert sweep_facts.response(found).unit == "audio s/s"  # which all have


def test_the_page_names_the_best_its_files_and_every_trial(tmp_path):
    run = make_run(tmp_path)
    page = Page(write_sweep_report(run).read_text())
    best = run.fit().best_deployment
    assert "never keep up" in page.text and "133 ms" in page.text
    assert all(trial.trial_id in page.text for trial in run.trials())
    assert "winner/" in page.text and describe_best(run).startswith("best: ")
    configs = Deployed(knobs=best.deployment).configs()
    for model in wire.MODELS:
        written = (run.path / "winner" / model / "config.pbtxt").read_text()
        assert text_format.Parse(written, model_config_pb2.ModelConfig()) == configs[model]
    diff = (run.path / "winner" / "changes.diff").read_text()
    assert diff.count("+++ winner/") == sum(configs[model] != Deployed().configs()[model] for model in wire.MODELS)


def test_the_page_is_no_evidence_and_written_twice_is_the_same(tmp_path):
    run = make_run(tmp_path)
    first = write_sweep_report(run).read_bytes()
    assert write_sweep_report(run).read_bytes() == first
    names = [file.name for file in facts.evidence(run.path)]
    assert facts.SWEEP_NAME not in names and "winner/changes.diff" in names


def test_a_run_without_a_fit_is_said_in_words(tmp_path):
    run = make_run(tmp_path)
    (run.path / "fit.json").unlink()
    page = Page(render(run))
    assert "No best deployment" in page.text and "nothing to deploy" in page.text
    assert "meets the SLOs" in describe_best(run)
