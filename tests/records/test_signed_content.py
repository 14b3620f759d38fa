"""fit.json, plan.json and signoff.json as records: read whole, and written byte for byte as they are stored."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from harness.errors import InconclusiveError
from harness.records.fit import Fit, FittedModel, FittedStep, Unfitted, fitted
from harness.records.plan import Plan, PlannedTarget
from harness.records.seal import SealedAnswer, read_seal
from harness.records.store import Run

RESULTS = Path(__file__).resolve().parents[2] / "results"
FITS, PLANS = sorted(RESULTS.rglob("fit.json")), sorted(RESULTS.rglob("plan.json"))
SEALS = sorted(RESULTS.rglob("signoff.json"))
SAMPLE = RESULTS / "sample-quick"
NEWER = {"confidence", "kv"}  # fields that some stored files are older than


def without_newer(again, content):
    """What would be written, without the fields that are newer than the content."""
    if isinstance(again, list):
        return [without_newer(*pair) for pair in zip(again, content, strict=True)]
    if not isinstance(again, dict):
        return again
    known = {name: each for name, each in again.items() if name in content or name not in NEWER}
    return {name: without_newer(each, content.get(name)) for name, each in known.items()}


@pytest.mark.parametrize(("path", "kind"), [(p, Fit) for p in FITS] + [(p, Plan) for p in PLANS], ids=str)
def test_what_is_stored_is_read_whole_and_would_be_written_as_it_is(path, kind):
    text = path.read_text()
    content = json.loads(text)
    assert json.dumps(without_newer(kind.of(content).to_dict(), content), indent=1) == text


@pytest.mark.parametrize("path", SEALS, ids=str)
def test_a_stored_seal_is_read_whole_and_would_be_written_byte_for_byte(path):
    seal, stated = read_seal(path.read_text())
    assert seal.text() == path.read_text() and seal.sha256 == stated
    run = Run.open(path.parent)
    assert (seal.run_id, seal.answer) == (run.manifest.run_id, SealedAnswer.of_plan(run.plan()))


def test_every_kind_of_stored_file_is_among_them():
    assert len(FITS) >= 3 and len(PLANS) >= 2 and len(SEALS) >= 2


def test_the_model_of_every_stored_prediction_is_read_whole():
    runs = [Run.open(path.parent) for path in PLANS]
    stored = [line for run in runs for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    models = [json.loads(line)["model"] for line in stored]
    assert models and all(FittedModel.of(model).to_dict() == model for model in models)


def test_a_part_that_was_not_fitted_says_why_and_a_damaged_one_is_none():
    content = json.loads((SAMPLE / "fit.json").read_text())
    first = content["deployments"][0]
    first["step_time"] = {"inconclusive": "too few rungs"}
    part = Fit.of(content).deployments[0].step_time
    assert part == Unfitted(inconclusive="too few rungs")
    with pytest.raises(InconclusiveError, match="too few rungs"):
        fitted(part)
    for damaged in ({"kind": "linear", "inconclusive": ""}, {"intercept_s": 1.0}, {}):
        first["step_time"] = damaged
        with pytest.raises(ValueError, match="step_time"):
            Fit.of(content)


@pytest.mark.parametrize("field", ["verdict", "targets", "rate_per_device"])
def test_a_plan_without_a_field_is_no_plan(field):
    content = json.loads((SAMPLE / "plan.json").read_text())
    del content[field]
    with pytest.raises(ValueError, match=field):
        Plan.of(content)


def test_a_figure_that_was_not_known_is_nan_and_stored_as_null():
    content = json.loads((SAMPLE / "fit.json").read_text())
    content["deployments"][0]["step_time"]["r_squared"] = None
    step = Fit.of(content).deployments[0].step_time
    assert isinstance(step, FittedStep) and math.isnan(step.r_squared)


def test_what_is_signed_cannot_be_changed_in_memory():
    plan = Plan.of(json.loads((SAMPLE / "plan.json").read_text()))
    with pytest.raises(FrozenInstanceError):
        plan.verdict = "met"
    with pytest.raises(FrozenInstanceError):
        plan.targets[0].devices = 1


def test_costs_are_written_only_where_there_is_a_price():
    plan = Plan.of(json.loads((SAMPLE / "plan.json").read_text()))
    bare = replace(plan, targets=(PlannedTarget(qps=1.0),)).to_dict()
    assert not any(name.startswith("cost_") for name in bare["targets"][0])
    assert plan.to_dict()["targets"][0]["cost_per_hour"] == plan.targets[0].cost_per_hour
