"""The store: what was appended comes back, and neither a crash, a full disk nor a second writer spoils it."""

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from harness import content
from harness.capacity.planning.prediction import flaw_of, sealed
from harness.device_profile import ModelSizes, Profile, StagePoint
from harness.errors import StoreError
from harness.identity import HostFacts
from harness.records.fit import Fit
from harness.records.load import TrialLoad
from harness.records.metrics import per_request
from harness.records.plan import Plan, PlannedRate
from harness.records.prediction import ClassPrediction, Prediction
from harness.records.schema import (
    BatchStatistics,
    Chunks,
    GpuSample,
    Outcome,
    Result,
    Rung,
    RunManifest,
    ServerSample,
    StageStatistics,
    Trial,
)
from harness.records.store import Run, read_profile, write_profile
from harness.records.summary import Summary

MANIFEST = RunManifest(
    run_id="sample-1",
    created_at="2025-01-01T00:00:00Z",
    plan_path="plan.yaml",
    plan_sha256="0" * 64,
    plan={"space": {"delay_us": [0, 5]}},
    commit="abc",
    versions={"numpy": "1"},
    host=HostFacts(cores=2),
    preset="tiny",
    device="cpu",
    seed=1,
    notes=("quiet host",),
)
STAGES = (StageStatistics("diffusion_decoder", 9, 4, 100, 200, (BatchStatistics(1, 1, 20), BatchStatistics(4, 2, 90))),)
PREDICTION = Prediction(
    rate_per_s=2,
    seconds=30,
    sessions=1 / 3,
    frames_per_s=15.0,
    step_s=1 / 45,
    classes={"short": ClassPrediction(rtf_p50=0.4, rtf_p95=math.nan)},
)
SAMPLES = [
    ServerSample(5, STAGES, 12.5, 1 << 40, metrics={"nv_cpu_utilization": 0.5}),
    ServerSample(6, (), gpus=(GpuSample("GPU-a", 3.0, 7, 70.5), GpuSample("GPU-b"))),
]


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path, MANIFEST)


def trial(trial_id="t1", **changes):
    rung = Rung(2.0, 15.0, 0, 10**9, Summary(requests=3.0), STAGES)
    load = TrialLoad(loop="closed", sessions=(1, 4), seconds=6, seed=1)
    whole = Trial(trial_id, "ladder", {"a.b": 1}, load, "now", 1.5, True, ("note",), (rung,))
    return dataclasses.replace(whole, **changes)


def result(request_id="r1", chunks=3, **changes):
    times = 10**15 + np.arange(chunks, dtype=np.int64) * 10**8
    whole = Result(
        request_id, "short", 2, 10, chunks, 0, 1, "open", 10**15 - 5, 10**15 - 4, 10**15 + 10**9, Outcome.DONE,
        chunks=Chunks(times, times - 7, np.full(chunks, 3200, dtype=np.int64)),
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def same(one, other):
    columns = [each.name for each in dataclasses.fields(Chunks)]
    chunks_agree = all(np.array_equal(getattr(one.chunks, name), getattr(other.chunks, name)) for name in columns)
    return chunks_agree and dataclasses.replace(one, chunks=None) == dataclasses.replace(other, chunks=None)


def files_of(run):
    return sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())


def test_everything_comes_back_as_it_was_appended(run):
    results = [result(), result("r2", 0, outcome=Outcome.ERROR, error="kaputt"), result("r3", 400)]
    run.append_trial(trial(), results, SAMPLES)
    run.append_trial(trial("t2", valid=False, prediction=PREDICTION, over_saturated=True), [], [])
    again = Run.open(run.path)
    assert again.manifest == MANIFEST
    read = again.results("t1")
    assert len(read) == 3 and all(same(*pair) for pair in zip(results, read, strict=True))
    assert read[0].chunks.received_ns.dtype == np.int64
    assert again.samples("t1") == SAMPLES and again.results("t2") == again.samples("t2") == []
    first, second = again.trials()
    assert math.isnan(first.rungs[0].summary.ttfa_p95_s)
    assert dataclasses.replace(first, rungs=()) == trial(rungs=())
    assert (first.rungs[0].stages, second.prediction, second.over_saturated) == (STAGES, PREDICTION, True)


def test_who_took_cpu_comes_back_with_each_rung_and_the_disturbed_ones(run):
    whole = trial()
    rung = dataclasses.replace(whole.rungs[0], others_share=0.015, stolen_share=0.0)
    spoilt = dataclasses.replace(rung, others_share=0.4, disturbed="others took 0.80 of 2 cores", repeated=True)
    run.append_trial(dataclasses.replace(whole, rungs=(rung,), disturbed=(spoilt,)), [], [])
    (read,) = Run.open(run.path).trials()
    for stored, appended in ((read.rungs[0], rung), (read.disturbed[0], spoilt)):
        assert dataclasses.replace(stored, summary=appended.summary) == appended
    assert (whole.rungs[0].others_share, whole.rungs[0].disturbed, whole.disturbed) == (None, "", ())


def test_emulated_results_stay_emulated(run):
    run.append_trial(trial(), [result(emulated=True), result("r2")], [])
    assert [each.emulated for each in run.results("t1")] == [True, False]


def test_a_file_from_before_emulation_reads_as_computed(run):
    run.append_trial(trial(), [result()], [])
    path = run.path / "requests.parquet" / "t1.parquet"
    pq.write_table(pq.read_table(path).drop_columns("emulated"), path)
    assert same(run.results("t1")[0], result())


def test_a_file_of_an_older_schema_is_migrated_step_by_step_and_written_in_the_newest(tmp_path, monkeypatch):
    """Files that never were: schema -1 calls the verdict "outcome", and schema 0 says nothing of doubts."""
    sample = Path(__file__).resolve().parents[2] / "results" / "sample-quick"
    run, path = Run.create(tmp_path, MANIFEST), tmp_path / "sample-1" / "plan.json"
    newest = json.loads((sample / "plan.json").read_text())
    older = {"outcome" if name == "verdict" else name: value for name, value in newest.items()} | {"schema": -1}
    path.write_text(json.dumps(older))
    with pytest.raises(StoreError, match="plan.json has schema -1, this harness reads 1"):
        run.plan()
    monkeypatch.setitem(content.MIGRATIONS, -1, lambda stored: stored | {"verdict": stored["outcome"]})
    monkeypatch.setitem(content.MIGRATIONS, 0, lambda stored: stored | {"doubts": ["it is old"]})
    plan = run.plan()
    assert (plan.schema, plan.verdict, plan.doubts) == (1, newest["verdict"], ("it is old",))
    run.write_plan(plan)
    assert json.loads(path.read_text()) == newest | {"doubts": ["it is old"]}


def test_profiles_are_replaced_whole_and_read_back(tmp_path):
    path = tmp_path / "profiles" / "gpu-tiny.json"
    sizes, point = ModelSizes(hidden_size=8, kv_bytes_per_token=8, state_values=8), StagePoint(batch=1, ms=2.0)
    profile = Profile(device="gpu", preset="tiny", model=sizes, stages={"neural_vocoder": (point,)})
    write_profile(path, replace(profile, device="old"))
    write_profile(path, replace(profile, stages={"neural_vocoder": (replace(point, spread=math.nan),)}))
    assert read_profile(path) == profile  # a spread that is not known
    assert json.loads(path.read_text())["schema"] == 1
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    path.write_text(path.read_text()[:-5])
    with pytest.raises(StoreError, match="damaged"):
        read_profile(path)


def test_requests_are_the_metrics_of_each_with_their_trial(run):
    assert run.requests().empty and "ttfa_s" in run.requests()
    run.append_trial(trial("t1"), [result()], [])
    run.append_trial(trial("t2"), [result("r2"), result("r3", 0)], [])
    assert run.requests()["trial_id"].tolist() == ["t1", "t2", "t2"]
    assert run.requests("t2").drop(columns="trial_id").equals(per_request(run.results("t2")))


def test_trials_that_were_read_are_not_parsed_again(run):
    run.append_trial(trial("t1"), [], [])
    (first,) = run.trials()
    Run.open(run.path).append_trial(trial("t2"), [], [])
    again = run.trials()
    assert again[0] is first and [each.trial_id for each in again] == ["t1", "t2"]
    (run.path / "trials.jsonl").write_text("")
    assert run.trials() == []


def test_a_prediction_is_on_disk_as_it_was_sealed(run):
    prediction = sealed(PREDICTION, "2026-01-01")
    run.append_prediction("t1", prediction)
    line = json.loads((run.path / "predictions.jsonl").read_text())
    assert line == {"trial_id": "t1", **prediction.to_dict()} and line["short.rtf_p95"] is None
    assert "short.ttfa_p50_s" not in line  # was not predicted, which is not the same as not known
    assert run.predictions()["t1"].to_dict() == prediction.to_dict()
    run.append_trial(trial(prediction=prediction), [], [])
    (stored,) = Run.open(run.path).trials()
    written = run.predictions()
    for started_at, flaw in (("2026-01-02", ""), ("2025-12-31", "after it had started")):
        found = flaw_of(stored.prediction, dataclasses.replace(stored, started_at=started_at), written)
        assert flaw in found and bool(flaw) == bool(found)


def test_a_prediction_without_its_hash_or_its_line_counts_only_in_an_older_run():
    prediction, bare = sealed(PREDICTION, "2026-01-01"), dataclasses.replace(PREDICTION, made_at="2026-01-01")
    assert flaw_of(bare, trial(started_at="2026-01-02"), {}) == ""
    for given, written in ((bare, {"t1": prediction}), (prediction, {"t2": prediction}), (bare, {"t1": bare})):
        assert flaw_of(given, trial(started_at="2026-01-02"), written) != ""


@pytest.mark.parametrize("change", [{"sessions": 0.34}, {"short.rtf_p95": 0.9}, {"note": "mine"}, {"made_at": "2025"}])
def test_a_prediction_that_was_changed_on_disk_is_told_by_its_hash(run, change):
    prediction = Prediction.of(sealed(PREDICTION, "2026-01-01").to_dict() | change)
    assert "its hash differs" in flaw_of(prediction, trial(), {"t1": prediction})


@pytest.mark.parametrize("number", [2, 2.0, 0.1 + 0.2])
def test_whole_numbers_are_hashed_as_they_will_be_read(number):
    prediction = sealed(dataclasses.replace(PREDICTION, sessions=number, seconds=number), "2026-01-01")
    again = Prediction.of(json.loads(json.dumps(prediction.to_dict())))
    assert flaw_of(again, trial(started_at="2026-01-02"), {"t1": again}) == "" and again.sha256 == prediction.sha256


def fit() -> Fit:
    return Fit(
        unit="one", session_limit=None, extrapolation=1.0, traffic_seed=7, deployments=(), best=None, excluded=()
    )


def plan(verdict: str = "met") -> Plan:
    nothing = {"reasons": (), "deployment": None, "slos": (), "targets": (), "validation": ()}
    return Plan(verdict=verdict, unit="one", confidence=0.95, rate_per_device=PlannedRate(), **nothing)


def test_manifest_fit_and_plan_are_replaced_whole(run):
    assert run.fit() is None and run.plan() is None
    run.update_manifest(finished_at="later")
    run.write_fit(fit())
    run.write_plan(plan())
    again = Run.open(run.path)
    assert again.manifest.finished_at == "later"
    assert again.fit() == fit() and again.plan() == plan()
    assert files_of(run) == ["fit.json", "manifest.json", "plan.json"]


def test_a_torn_last_line_is_ignored_and_gone_after_the_next_trial(run):
    run.append_trial(trial("t1"), [result()], [])
    lines = run.path / "trials.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole + whole[: len(whole) // 2])
    assert [each.trial_id for each in run.trials()] == ["t1"]
    run.append_trial(trial("t2"), [], [])
    assert [each.trial_id for each in run.trials()] == ["t1", "t2"]
    assert all(json.loads(line) for line in lines.read_text().splitlines())


def test_parts_without_a_line_never_happened(run):
    run.append_trial(trial("t1"), [result()], SAMPLES)
    (run.path / "trials.jsonl").unlink()
    assert run.trials() == [] and run.requests().empty
    with pytest.raises(StoreError, match="holds no trial 't1'"):
        run.results("t1")
    run.append_trial(trial("t1"), [result(), result("r2")], [])
    assert len(run.results("t1")) == 2


def test_a_trial_is_stored_once(run):
    run.append_trial(trial(), [], [])
    with pytest.raises(StoreError, match="t1 is stored already"):
        run.append_trial(trial(), [], [])


@pytest.mark.parametrize("full_at", [1, 2, 3, 4, 5, 6])
def test_a_full_disk_leaves_nothing_half_written(run, monkeypatch, full_at):
    run.append_trial(trial("t1"), [result()], SAMPLES)
    before = {name: (run.path / name).read_bytes() for name in files_of(run)}
    calls, sync = [], os.fsync

    def full_disk(descriptor):
        calls.append(descriptor)
        if len(calls) == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match="cannot be written: No space left"):
        run.append_trial(trial("t2"), [result()], SAMPLES)
    assert {name: (run.path / name).read_bytes() for name in files_of(run)} == before


def test_a_failed_replacement_keeps_the_old_file(run, monkeypatch):
    run.write_plan(plan())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StoreError, match="plan.json cannot be written"):
        run.write_plan(plan("missed"))
    assert run.plan().verdict == "met" and files_of(run) == ["manifest.json", "plan.json"]


def test_a_second_writer_is_refused_with_the_first_ones_process(run):
    program = (
        "import sys; from harness.records.store import Run\n"
        "try:\n with Run.open(sys.argv[1]).lock(): print('locked')\n"
        "except Exception as error: print(error)\n"
    )

    def other_process():
        command = [sys.executable, "-c", program, str(run.path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with run.lock():
        assert f"is being written by process {os.getpid()}" in other_process()
        with pytest.raises(StoreError, match="is being written"), run.lock():
            pass
    assert other_process() == "locked\n"


def test_an_error_of_the_writer_passes_through_the_lock_unchanged(run):
    with pytest.raises(ConnectionError), run.lock():
        raise ConnectionError("not the disk's fault")
    with run.lock():
        pass


def test_a_folder_that_is_not_ours_is_refused(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert not Run.is_run(tmp_path / "other") and Run.is_run(run.path)
    for path in (tmp_path / "other", tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="no manifest.json"):
            Run.open(path)
    for run_id in ("other", MANIFEST.run_id):
        with pytest.raises(StoreError, match="is not empty"):
            Run.create(tmp_path, dataclasses.replace(MANIFEST, run_id=run_id))


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 200])
def test_a_name_that_is_no_file_name_is_refused(run, tmp_path, name):
    with pytest.raises(StoreError, match="cannot name a file"):
        Run.create(tmp_path, dataclasses.replace(MANIFEST, run_id=name))
    with pytest.raises(StoreError, match="cannot name a file"):
        run.append_trial(trial(name), [], [])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("manifest.json", b"{", "manifest.json is damaged"),
        ("manifest.json", b"[]", "manifest.json is damaged"),
        ("manifest.json", b'{"schema": 1}', "manifest.json is damaged"),
        ("manifest.json", b'{"schema": 2}', "manifest.json has schema 2, this harness reads 1"),
        ("fit.json", b'{"schema": 9}', "fit.json has schema 9"),
        ("fit.json", b"\xff", "fit.json is damaged"),
        ("fit.json", b'{"schema": 1}', "fit.json is damaged"),
        ("trials.jsonl", b'{"trial_id": "t1"}\n', "trials.jsonl line 1 is damaged"),
        ("trials.jsonl", b"null\n", "trials.jsonl line 1 is damaged"),
        ("requests.parquet/t1.parquet", b"PAR1 nonsense", "t1.parquet is damaged"),
        ("server.parquet/t1.parquet", b"", "t1.parquet is damaged"),
    ],
)
def test_a_damaged_or_newer_file_is_named(run, file, content, message):
    run.append_trial(trial(), [result()], SAMPLES)
    (run.path / file).write_bytes(content)
    with pytest.raises(StoreError, match=message):
        again = Run.open(run.path)
        again.fit(), again.results("t1"), again.samples("t1")


def test_a_missing_part_is_named(run):
    run.append_trial(trial(), [result()], SAMPLES)
    (run.path / "requests.parquet" / "t1.parquet").unlink()
    with pytest.raises(StoreError, match="requests.parquet/t1.parquet is damaged or cannot be read"):
        run.results("t1")
