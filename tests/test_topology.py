"""The fused topology wherever a deployment is met: fits, what-ifs, search, identities, reports and winner."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from capacity_truth import LADDER, TRUTH, fit_of, ladder, plan_of
from google.protobuf import text_format
from report_sample import make_run, manifest
from staged_rungs import server as staged_rungs
from test_identity import H100, ON_CPU
from test_identity import server as staged_server
from tritonclient.grpc import model_config_pb2
from typer.testing import CliRunner

from harness import wire
from harness.capacity.models.memory import KvRoom
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.staged import Topology, rounds
from harness.cli.main import app
from harness.deploy.config import Deployment
from harness.device_profile import ModelSizes, Profile
from harness.errors import HarnessError, InputError, ServerError
from harness.identity import GPU, Requested, StageIdentity, must_be_as_requested, topology_of
from harness.planfile.reading import deployed_as, load_plan
from harness.records.schema import BatchStatistics, Rung, StageStatistics
from harness.records.store import Run
from harness.records.summary import Summary
from harness.report import sweep_facts, winner, words
from harness.report.page import render
from harness.report.sweep_page import write_sweep_report
from harness.runs import opening, points
from harness.runs.stages import kv_rooms, record_stages, stages_by_server
from harness.sweep.optimizer.physics import MeasuredLadder, fit_physics
from harness.topology import applicable, has_knob

FUSED = {"topology": "fused", "engine.max_batch": 64}
ALPHA_S, TAU0_S = 0.0002, 0.003


def engine(sessions, alpha_s=ALPHA_S, tau0_s=TAU0_S):
    """What the engine counts while so many sessions speak: now and then one is not in the batch."""
    sizes = {max(1, sessions - 1): 10, sessions: 90}
    batches = tuple(BatchStatistics(b, n, round(n * 1e9 * (alpha_s * b + tau0_s))) for b, n in sizes.items())
    return (StageStatistics(wire.ENGINE, 1000, 100, 0, 0, batches),)


def fused_ladder(name="fused-1", truth=TRUTH, seed=1):
    trial, frame = ladder(truth, np.random.default_rng(seed), LADDER, name=name, deployment=FUSED, topology="fused")
    counted = zip(LADDER, trial.rungs, strict=True)
    return dataclasses.replace(trial, rungs=tuple(dataclasses.replace(r, stages=engine(n)) for n, r in counted)), frame


def fused_server(on=ON_CPU, gpus=1, kv=1 << 32, preset="tiny"):
    about = {"preset": preset, "weights": "random, seed 0", "code": "/here", "code_digest": "1", **on}
    room = {"kv_limit_bytes": kv, "kv_bytes_per_token": 512}
    said = [StageIdentity(wire.VOICE, "voice@0", **about)]
    for gpu in range(gpus):
        own = {**about, "gpu_uuid": f"GPU-{gpu}"} if on["kind"] == GPU else about
        said.append(StageIdentity(wire.ENTRY, f"entry@{gpu}", **own, **room))
    return said


def test_a_fused_ladder_is_fitted_with_one_stage_and_planned():
    measured = fused_ladder()
    room = {"staged": None, "fused": KvRoom(1e9, 512)}
    fit = fit_of(measured, kv=room)
    (deployment,) = fit.deployments
    assert deployment.kv.limit_bytes == 1e9 and deployment.max_rate_per_s > 0
    (stage,) = deployment.stages
    assert stage.stage == wire.ENGINE
    assert (stage.alpha_s, stage.tau0_s) == pytest.approx((ALPHA_S, TAU0_S), rel=0.01)
    plan = plan_of(fit, measured, profiles={})
    told = {each.change: each for each in plan.sensitivity}
    assert told["half the delay"].note == "the deployment has no delay"
    another = told[f"one more instance of {wire.ENGINE}"]
    assert another.rate_per_device is None and "shares the GPU" in another.note
    assert any(each.startswith("a device that computes") and told[each].rate_per_device for each in told)


def test_a_profile_of_stages_predicts_no_fused_device():
    sizes = ModelSizes(hidden_size=8, kv_bytes_per_token=8, state_values=8)
    profile = Profile(device="H200", preset="tiny", model=sizes, stages={})
    measured = fused_ladder()
    (row,) = plan_of(fit_of(measured), measured, profiles={"H200": profile}).device_types
    assert row.rate_per_device is None and "the chosen deployment is the fused engine" in row.note


def test_the_loop_of_the_engine_takes_all_sessions_in_every_step():
    fit = fit_of(fused_ladder()).deployments[0]
    bare = Topology.of_fit(fit)
    (stage,) = bare.stages
    assert (stage.max_batch, stage.instances, bare.prefetch) == (64, 1, False)
    whole = bare.completed(StepTime("linear", (0.004, 0.0002)))
    assert whole.hop_s == 0 and whole.host_s == pytest.approx(0.0042 - stage.time_s(1))
    alike = dataclasses.replace(whole, noise=0.0)
    for sessions in (1, 8, 32):
        shown = rounds(alike, sessions, np.random.default_rng(1))
        assert shown.step_s == pytest.approx(stage.time_s(sessions) + whole.host_s, rel=0.05), sessions


def test_a_search_learns_each_topology_by_its_own_stages():
    times = {n: 0.004 + 0.0003 * n for n in (1, 4, 16)}
    rungs = tuple(Rung(n, n / step_s, 0, 1, Summary(), engine(n, 0.0003, 0.003)) for n, step_s in times.items())
    defaults = {"engine.max_batch": 64, "engine.instances": 1}
    physics = fit_physics([MeasuredLadder(FUSED, rungs)], defaults)
    assert physics.path == (wire.ENGINE,)
    assert physics.step_s(FUSED, list(times)) == pytest.approx(list(times.values()), rel=0.15)
    halved = physics.step_s(FUSED | {"engine.max_batch": 8}, [16])[0]  # sixteen take turns
    assert halved == pytest.approx(2 * physics.step_s(FUSED, [8])[0])
    assert fit_physics([MeasuredLadder({}, staged_rungs())], {}).path == wire.STAGES
    assert fit_physics([MeasuredLadder({}, rungs)], defaults) is None  # a staged point whose stages were not counted


@pytest.mark.parametrize(
    ("topology", "has", "lacks"),
    [
        ("staged", ["entry.instances", f"{wire.FRAME}:x"], ["engine.max_batch", f"{wire.ENGINE}:x"]),
        ("fused", ["engine.instances", f"{wire.ENGINE}:x", f"{wire.VOICE}:x"], ["entry.instances", f"{wire.LLM}:x"]),
    ],
)  # fmt: skip
def test_which_knobs_a_topology_has(topology, has, lacks):
    common = ["topology", "chunk_frames", "diffusion_steps", f"{wire.VOICE}.max_batch", f"{wire.ENTRY}:x"]
    assert all(has_knob(topology, knob) for knob in (*has, *common))
    assert not any(has_knob(topology, knob) for knob in lacks)
    point = dict.fromkeys([*has, *lacks], 1) | {"topology": topology}
    assert set(applicable(point)) == {*has, "topology"}


def test_the_engine_must_be_on_every_gpu():
    requested = Requested("1.5b", GPU, gpus=2)
    assert must_be_as_requested(fused_server(H100, 2, preset="1.5b"), requested, "here:1") is None
    with pytest.raises(ServerError, match=f"{wire.ENTRY} runs on 1 of 2 GPUs"):
        must_be_as_requested(fused_server(H100, 1, preset="1.5b"), requested, "here:1")
    assert topology_of(fused_server()) == "fused" and topology_of(staged_server()) == "staged"


def test_a_run_keeps_what_the_stages_of_each_topology_run_on(tmp_path):
    plan = manifest().plan | {"space": {"topology": ["staged", "fused"]}}
    run = Run.create(tmp_path, manifest(finished_at="", plan=plan, topologies=("staged", "fused")))
    for server in (staged_server(H100), fused_server(H100), staged_server(H100)):
        record_stages(run, {"a:1": server})
    again, spec = Run.open(run.path), opening.spec_of(run)
    assert again.manifest.topologies == ("staged", "fused") and again.manifest.device == "NVIDIA H100"
    assert stages_by_server(again.manifest, "fused") == {"a:1": fused_server(H100)}
    assert stages_by_server(again.manifest) == {"a:1": staged_server(H100)}
    rooms = {topology: room.room_bytes for topology, room in kv_rooms(again.manifest, spec).items()}
    assert rooms == {"staged": float(1 << 33), "fused": float(1 << 32)}
    with pytest.raises(InputError, match="different devices"):
        record_stages(run, {"a:1": fused_server()})


def test_a_record_of_before_there_were_two_topologies_is_staged(tmp_path):
    run = make_run(tmp_path)
    content = json.loads((run.path / "manifest.json").read_text())
    del content["topologies"]
    (run.path / "manifest.json").write_text(json.dumps(content))
    lines = [json.loads(line) for line in (run.path / "trials.jsonl").read_text().splitlines()]
    stripped = [{name: value for name, value in line.items() if name != "topology"} for line in lines]
    (run.path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stripped))
    again = Run.open(run.path)
    assert again.manifest.topologies == ("staged",) and {trial.topology for trial in again.trials()} == {"staged"}


def test_the_winner_that_is_fused_can_be_deployed_as_it_stands(tmp_path):
    run = make_run(tmp_path)
    point = FUSED | {"engine.max_batch": 16}
    folder = winner.write_winner(run, point)
    assert {each.name for each in folder.iterdir() if each.is_dir()} == {wire.ENTRY, wire.VOICE}
    written = text_format.Parse((folder / wire.ENTRY / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert written == Deployment(topology="fused", knobs={"engine.max_batch": 16}).configs()[wire.ENTRY]
    assert "engine_of" in (folder / wire.ENTRY / "1" / "model.py").read_text()
    diff = (folder / winner.DIFF).read_text()
    assert f"--- model_repository/{wire.ENGINE}/config.pbtxt" in diff and f"+++ winner/{wire.ENTRY}/" in diff


def test_a_report_names_the_fused_engine_and_shows_its_steps(tmp_path):
    run = make_run(tmp_path, fit=False, plan=False)
    trial, frame = fused_ladder()
    run.append_trial(trial, (), ())
    run.write_fit(fit_of((trial, frame)))
    page = render(run)
    assert "fused engine compute" in page and "In the fused engine all sessions take a step together" in page
    assert "In the staged topology each frame passes three stages" in page
    assert 'id="service-time-vibevoice_engine"' in page or "service-time-vibevoice_engine" in page
    page = write_sweep_report(run).read_text()
    assert "fused engine" in page and "do not copy it over" in page and "cp -r" not in page


def test_the_command_for_the_winner_that_is_fused_has_the_flags_of_its_page(tmp_path):
    run = make_run(tmp_path, fit=False, plan=False)
    trial, frame = fused_ladder()
    run.append_trial(trial, (), ())
    run.write_fit(fit_of((trial, frame)))
    (shown,) = re.findall(r"tritonserver (--.*?)</code>", write_sweep_report(run).read_text(), re.DOTALL)
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "own-triton.md").read_text()
    (told,) = re.findall(r" tritonserver (--.*?)\n\n", page, re.DOTALL)
    shown, told = (set(each.replace("\\\n", " ").split()) for each in (shown, told))
    assert told - shown == {"--model-repository=model_repository", f"--load-model={wire.FRAME}"}
    assert len(shown - told) == 1 and shown - told <= {each for each in shown if each.endswith("/winner")}


def test_a_step_of_a_gpu_takes_no_more_sessions_than_its_graphs():
    on_gpu = {"topology": "fused", "device": "gpu"}
    Deployment(**on_gpu, knobs={"engine.max_batch": 128}).check()
    for more in ({"knobs": {"engine.max_batch": 256}}, {"parameters": {f"{wire.ENGINE}.graphs": "64"}}):
        with pytest.raises(
            InputError, match="engine.max_batch is (256|128), and a step on a GPU takes at most (128|64)"
        ):
            Deployment(**on_gpu, **more).check()
    Deployment(topology="fused", device="cpu", knobs={"engine.max_batch": 256}).check()


def test_deployments_are_named_by_the_knobs_that_they_have():
    staged = {"topology": "staged", **{f"{stage}.delay_us": 5000 for stage in wire.STAGES}}
    assert words.name_deployments([staged, FUSED]) == [
        "delay 5 ms · staged",
        "fused engine · fused engine batch up to 64",
    ]
    assert points.describe_point(FUSED) == "fused topology, engine.max_batch 64"
    assert sweep_facts.common_delay_s(FUSED) is None and sweep_facts.common_delay_s(staged) == 0.005


def test_another_topology_than_the_plans_is_taken_or_refused(tmp_path):
    text = "name: a\npreset: tiny\nmix: quick\npromises: {short: {rtf_p95: 1}}\ntargets_qps: [1]\n"
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    fused = deployed_as(load_plan(path), "fused")
    assert fused.points() == [{"topology": "fused"}] and points.deployment_of(fused, None).topology == "fused"
    assert opening.run_id_of(path, fused, None) != opening.run_id_of(path, load_plan(path), None)
    for more, asked, message in (
        ("", "fuse", "--topology fuse: use one of staged, fused"),
        ("space: {topology: [staged, fused]}", "fused", "the plan sweeps the topology: leave one of them out"),
        ("space: {delay_us: [0, 5]}", "fused", "--topology fused: .*delay_us: the fused topology has no such knob"),
    ):
        path.write_text(text + more)
        with pytest.raises(HarnessError, match=message):
            deployed_as(load_plan(path), asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--topology", "fuse"], "unknown topology 'fuse': use one of staged, fused"),
        (["serve", "--topology", "fused", "--knob", "neural_vocoder.delay_us=1"], "fused topology has no such knob"),
        (["signoff", "quick", "--topology", "fused"], "the fused topology has no such knob"),
        (["sweep", "quick", "--topology", "both"], "--topology both: use one of"),
    ],
)
def test_a_mistake_with_the_topology_is_named_before_anything_starts(arguments, message):
    with pytest.raises(HarnessError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)


def test_what_is_fused_counts_once_for_every_delay_in_the_effects():
    knobs = [*({"topology": "staged", f"{wire.LLM}.delay_us": delay} for delay in (0, 5)), FUSED]
    found = [sweep_facts.Answer(SimpleNamespace(knobs=each), 1.0, None, 0.0, "") for each in knobs]
    assert sweep_facts._cells(found[2], found) == [{f"{wire.LLM}.delay_us": delay, **FUSED} for delay in (0, 5)]
    assert sweep_facts._cells(found[0], found) == [knobs[0] | {"engine.max_batch": 64}]
