"""Every stored trial is read whole, and would be written as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.capacity.planning.prediction import flaw_of
from harness.errors import StoreError
from harness.records.schema import Trial
from harness.records.store import Run
from harness.records.summary import METRICS

RESULTS = Path(__file__).resolve().parents[2] / "results"
RUNS = sorted(path.parent for path in RESULTS.rglob("trials.jsonl"))
GONE = {"sessions_trend_p", "ttfa_trend_p"}  # figures of earlier versions
NEWER_OF_RUNS = {"sealed": False, "profiles": {}, "topologies": ["staged"]}
NEWER = {"topology": "staged", "disturbed": []}  # fields that some trials are older than, and what those mean


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]


def again(content: dict) -> dict:
    return json.loads(json.dumps(Trial.of(content).to_dict()).replace("NaN", "null"))


def summaries(content: dict) -> list[dict]:
    return [rung.pop("summary") for rung in content["rungs"]]


def test_every_sample_with_trials_is_among_them():
    assert len(RUNS) >= 3 and all(lines_of(run) for run in RUNS)


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.name)
def test_what_is_stored_is_read_whole_and_would_be_written_as_it_is(run):
    for content in lines_of(run):
        written = again(content)
        for stored, now in zip(summaries(content), summaries(written), strict=True):
            assert {name: now.get(name) for name in stored if name not in GONE} == {
                name: value for name, value in stored.items() if name not in GONE
            }
            assert {now[name] for name in now if name not in stored} <= {None}  # newer than the file: not known
        assert written == NEWER | content and list(written) == list(Trial.__dataclass_fields__)


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.name)
def test_a_manifest_is_read_whole_with_what_the_stages_said(run):
    content, written = json.loads((run / "manifest.json").read_text()), Run.open(run).manifest.to_dict()
    told = content.pop("stages", [])
    assert [{"topology": "staged"} | each for each in told] == json.loads(json.dumps(written.pop("stages")))
    assert {"schema": 1} | {name: value for name, value in written.items() if name in content} == content
    assert {name: value for name, value in written.items() if name not in content} == {
        name: NEWER_OF_RUNS[name] for name in written if name not in content
    }


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.name)
def test_a_figure_of_a_stored_window_is_read_by_the_name_that_plans_call_it(run):
    for trial, content in zip(Run.open(run).trials(), lines_of(run), strict=True):
        for rung, stored in zip(trial.rungs, summaries(content), strict=True):
            known = {name: value for name, value in stored.items() if value is not None and name not in GONE}
            assert {name: rung.summary.figure(name) for name in known} == known and known
            assert set(rung.summary.classes) == {name.rpartition(".")[0] for name in stored if "." in name}


def test_every_stored_prediction_is_read_as_it_was_sealed():
    found = 0
    for path in RUNS:
        run = Run.open(path)
        written = run.predictions()
        lines = [json.loads(line) for line in _text(path / "predictions.jsonl").splitlines()]
        assert [{"trial_id": name, **each.to_dict()} for name, each in written.items()] == lines
        for trial in run.trials():
            if trial.prediction:
                assert flaw_of(trial.prediction, trial, written) == "" and trial.prediction.model
                found += 1
    assert found >= 3


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"load": {"loop": "closed"}}, "seconds"),
        ({"load": {"loop": "ring", "seconds": 5, "seed": 1}}, "loop"),
        ({"rungs": [{"sessions": 1.0}]}, "summary"),
        ({"valid": "perhaps"}, "valid"),
    ],
)
def test_a_damaged_line_is_named_with_its_field(tmp_path, change, where):
    sample = RUNS[0]
    (tmp_path / "manifest.json").write_bytes((sample / "manifest.json").read_bytes())
    (tmp_path / "trials.jsonl").write_text(json.dumps(lines_of(sample)[0] | change) + "\n")
    with pytest.raises(StoreError, match=f"(?s)trials.jsonl line 1 is damaged.*{where}"):
        Run.open(tmp_path).trials()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "x"}, "seed: Input should be a valid integer"),
        ({"host": {"cores": "two"}}, "host.cores: Input should be a valid integer"),
        ({"versions": ["torch"]}, "versions: Input should be a valid dictionary"),
        ({"plan": "quick.yaml"}, "plan: Input should be a valid dictionary"),
        ({"stages": [{"server": "gpu7:8001"}]}, "stages.0: it has no 'identity.model', 'identity.instance', "),
        ({"profiles": {"H200": {"preset": "tiny"}}}, "it has no 'profiles.H200.device', "),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused_by_its_name(tmp_path, change, words):
    content = json.loads((RUNS[0] / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(content | change))
    with pytest.raises(StoreError, match=f"manifest.json is damaged or cannot be read .*{words}"):
        Run.open(tmp_path)


@pytest.mark.parametrize(
    ("plan", "mix", "slos"),
    [
        ({}, "", []),
        ({"mix": "quick", "promises": {"short": {"ttfa_p95_s": 1.0}}}, "quick", ["ttfa_s p95 of class short <= 1"]),
        ({"mix": {"name": "own"}, "slos": {"short": {"rtf_p90": 0.9}}}, "own", ["rtf p90 of class short <= 0.9"]),
    ],
)
def test_the_plan_of_an_older_run_says_its_mix_and_slos(plan, mix, slos):
    manifest = replace(Run.open(RUNS[0]).manifest, plan=plan)
    assert (manifest.mix_name, list(map(str, manifest.slos)), manifest.valid_days) == (mix, slos, None)
    assert (manifest.title, manifest.topology) == (manifest.run_id, "staged")


def test_a_figure_that_no_window_has_is_not_known():
    summary = Run.open(RUNS[0]).trials()[0].rungs[0].summary
    absent = ("nobody.ttfa_p95_s", "ttfa_p96_s", "long.seconds")
    assert all(summary.figure(name) != summary.figure(name) for name in absent)
    assert summary.quantile("nobody", "rtf", 0.5) != summary.quantile("nobody", "rtf", 0.5)
    assert {name for name in summary.to_dict() if "." not in name} == {metric.name for metric in METRICS}
