"""Emulated runs: plans that ask for them, the label that they carry, and the real Triton under them."""

import asyncio
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_request
from made_up_profile import FRAME_MS, MODEL, VOCODER_MS, write

from harness import signoff as job
from harness import wire
from harness.cards.card import card_of
from harness.cards.costs import costs_of
from harness.cards.estimate import assumptions_for, estimated_profile
from harness.client.stream import SpeechClient
from harness.client.stream import make_result as result_of
from harness.clock import Clock
from harness.deploy import config
from harness.deploy.config import Deployment, read_config
from harness.deploy.server import TritonServer
from harness.drive.load import Load
from harness.errors import InputError
from harness.planfile.reading import load_plan
from harness.records.load import TrialLoad
from harness.records.schema import Outcome, Trial
from harness.records.store import Run, write_profile
from harness.report import decision, tables, winner
from harness.runs import opening, points
from harness.sweep.progress import Watcher
from harness.sweep.trial import Measured, TrialRequest

PLAN = """
name: emulated
preset: 1.5b
mix: quick
slos: {{short: {{ttfa_p95_s: 2.0}}}}
targets_qps: [1]
emulate: {profile}
gpus: {gpus}
"""


def write_plan(folder, gpus=4, profile="profiles/h200.json", more=""):
    (folder / "profiles").mkdir(exist_ok=True)
    if not (folder / "profiles" / "h200.json").exists():
        write(folder / "profiles" / "h200.json")
    (folder / "plan.yaml").write_text(PLAN.format(profile=profile, gpus=gpus) + more)
    return folder / "plan.yaml"


def test_a_plan_can_ask_for_emulated_gpus(tmp_path):
    plan = write_plan(tmp_path, more="parameters: {vibevoice_llm_encoder.kv_limit_bytes: 120000000000}\n")
    base = points.deployment_of(load_plan(plan), url=None)
    assert (base.emulate, base.gpus) == (str(tmp_path / "profiles" / "h200.json"), 4)
    configs = base.configs()
    assert configs[wire.LLM].instance_group[0].count == 4
    assert configs[wire.LLM].parameters["kv_limit_bytes"].string_value == "120000000000"


@pytest.mark.parametrize(
    ("change", "url", "message"),
    [
        ({"profile": "none.json"}, None, "cannot read"),
        ({"more": "parameters: {none.x: 1}\n"}, None, "unknown parameter"),
        ({}, "127.0.0.1:1", "these keys or --url"),
    ],
)
def test_a_plan_that_cannot_be_emulated_is_refused(tmp_path, change, url, message):
    with pytest.raises(InputError, match=message):
        job.SignOff(write_plan(tmp_path, **change), tmp_path / "results", url=url)


@pytest.mark.parametrize(("gpus", "unit"), [(1, "one emulated NVIDIA H200"), (4, "4 emulated NVIDIA H200")])
def test_a_run_of_an_emulated_plan_says_so(tmp_path, gpus, unit):
    run = job.SignOff(write_plan(tmp_path, gpus), tmp_path / "results").run
    assert run.manifest.emulated
    assert opening.unit_of(run.manifest) == f"{unit} at preset 1.5b"


def test_a_run_over_an_estimated_profile_says_so_in_its_manifest_and_its_unit(tmp_path):
    plan = write_plan(tmp_path, gpus=1)
    card, costs = card_of("h100"), costs_of("1.5b")
    profile = estimated_profile(card, costs, wire.STAGED, assumptions_for(card, costs, wire.STAGED))
    write_profile(tmp_path / "profiles" / "h200.json", profile)
    run = job.SignOff(plan, tmp_path / "results").run
    assert run.manifest.times_basis == "estimated" and Run.open(run.path).manifest.times_basis == "estimated"
    assert opening.unit_of(run.manifest) == "one emulated NVIDIA H100 SXM (estimated) at preset 1.5b"


def test_a_plan_can_ask_for_time_dilation(tmp_path):
    spec = load_plan(write_plan(tmp_path, more="dilate: 20\n"))
    assert points.deployment_of(spec, url=None).clock == Clock(20.0)
    run = job.SignOff(tmp_path / "plan.yaml", tmp_path / "results").run
    assert Run.open(run.path).manifest.clock == Clock(20.0)
    found = decision.computed(run.manifest, None)
    assert any("TIME DILATED 20 TIMES" in each for each in found)
    assert tables.about(run.manifest).loc["emulated", ""] == "yes, time dilated 20 times"


def test_an_option_replaces_the_dilation_of_a_plan_and_makes_another_run(tmp_path):
    plan = write_plan(tmp_path)
    plain, auto = (job.SignOff(plan, tmp_path / "results", dilate=each) for each in (None, "auto"))
    assert plain.run.path != auto.run.path and "dilation" not in plain.run.manifest.to_dict()
    assert auto.run.manifest.dilation is None and auto.run.manifest.clock == Clock(1.0)
    own = job.SignOff(plan, tmp_path / "results", measured=True)
    assert not own.run.manifest.emulated and own.base.emulate == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dilate": 0.5}, "--dilate 0.5: dilate"),
        ({"dilate": 20.0, "measured": True}, "leave out --dilate or --no-emulate"),
        ({"dilate": "auto", "ray": "auto"}, "give a factor"),
    ],
)
def test_a_dilation_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        job.SignOff(write_plan(tmp_path), tmp_path / "results", **changes)


def test_time_is_dilated_for_emulated_gpus_only(tmp_path):
    with pytest.raises(InputError, match="only emulated GPUs can run slower"):
        load_plan(write_plan(tmp_path, profile="''", more="dilate: 2\n"))


def test_the_dilation_of_a_run_is_chosen_once(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(job, "choose_dilation", lambda base, mix, sessions, *_: tried.append(sessions) or 12.0)
    for _ in range(2):
        work = job.SignOff(write_plan(tmp_path), tmp_path / "results", dilate="auto")
        work._choose_dilation(Watcher())
        assert work.base.clock == Clock(12.0) == work.run.manifest.clock
    assert tried == [16]  # the highest rung


def test_a_budget_too_short_for_dilated_time_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "choose_dilation", lambda *_: 40.0)
    monkeypatch.setattr(job, "TritonServer", lambda base: pytest.fail("a server was started"))
    more = "dilate: auto\nladder: {sessions: [1, 6, 12], seconds: 4}\nconfirm: {seconds: 15}\nbudget_minutes: "
    work = job.SignOff(write_plan(tmp_path, more=f"{more}19\n"), tmp_path / "results")
    with pytest.raises(InputError, match="time dilated 40 times.*shorter or fewer rungs") as refused:
        work._measure(Watcher(), ladders_only=False)
    minutes = int(re.search(r"give budget_minutes (\d+)", str(refused.value))[1])
    assert 19 < minutes < 120 and not work.run.trials()
    for enough in (minutes, 19):  # at full speed even 19 are enough
        work = job.SignOff(
            write_plan(tmp_path, more=f"{more}{enough}\n"), tmp_path / "results", dilate=40.0 if enough > 19 else 1.0
        )
        work._check_budget()


@pytest.mark.parametrize("more", ["", "dilate: 20\n"])
def test_the_winner_of_an_emulated_run_is_for_the_real_device_at_full_speed(tmp_path, more):
    run = job.SignOff(write_plan(tmp_path, more=more), tmp_path / "results").run
    (tmp_path / "profiles" / "h200.json").unlink()  # it needs none
    folder = winner.write_winner(run, {f"{wire.LLM}.delay_us": 700})
    configs = {path.parent.name: read_config(path) for path in folder.glob("*/config.pbtxt")}
    assert set(configs) == set(wire.MODELS)
    assert parameter_of(configs, "emulate") == {""} and parameter_of(configs, wire.DILATION) == {"1"}
    assert parameter_of(configs, "device") == {"gpu"} and parameter_of(configs, "gpus") == {"4"}
    assert configs[wire.LLM].sequence_batching.oldest.max_queue_delay_microseconds == 700
    assert not any("h200.json" in path.read_text() for path in folder.rglob("*") if path.is_file())
    assert Run.open(run.path).manifest.plan["emulate"] == "profiles/h200.json"  # what was emulated is still known


def test_a_stored_emulated_run_offers_a_deployment_that_does_not_emulate():
    run = Run.open(Path(__file__).resolve().parents[2] / "results" / "sample-h100")
    point = run.fit().best_deployment.deployment
    configs = winner.winning_configs(run, point)
    assert parameter_of(configs, "emulate") == {""} and parameter_of(configs, wire.DILATION) == {"1"}
    assert "h100-sxm" not in winner.changes(run, point)


def parameter_of(configs, name):
    found = [each.parameters[name].string_value for each in configs.values() if name in each.parameters]
    assert len(found) > 3
    return set(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {f"{wire.LLM}.emulate": "gpu.json"}},
        {"parameters": {f"{wire.VOCODER}.{wire.DILATION}": "2"}},
        {"knobs": {f"{wire.LLM}:parameters.emulate": "gpu.json"}},
        {"knobs": {f"{wire.LLM}:parameters.{wire.DILATION}.string_value": "2"}},
    ],
)
def test_one_model_alone_cannot_be_emulated_or_dilated(changes):
    with pytest.raises(InputError, match="same for all models of a deployment: .* give (emulate|dilate) in"):
        Deployment(**changes)


def test_another_profile_leads_to_another_run(tmp_path):
    plan = write_plan(tmp_path)
    first = job.SignOff(plan, tmp_path / "results").run.path
    assert job.SignOff(plan, tmp_path / "results").run.path == first
    write(tmp_path / "profiles" / "h200.json", model={**MODEL, "hidden_size": 8})
    assert job.SignOff(plan, tmp_path / "results").run.path != first


def test_a_run_whose_server_turns_out_to_emulate_says_so(tmp_path):
    """A Triton given by --url may emulate without the plan's knowing."""
    plan = write_plan(tmp_path, gpus=1, profile="''")
    work = job.SignOff(plan, tmp_path / "results", url="127.0.0.1:1")
    assert not work.run.manifest.emulated
    answer = make_result(emulated=True)
    load = TrialLoad(loop="open", arrivals="poisson", rate_per_s=1.0, seconds=5, seed=1)
    trial = Trial("t", "open", {}, load, "2026-01-01T00:00:00", 1.0, True, (), ())
    driver = type("Driver", (), {"name": "", "run": lambda *_: Measured(trial, [make_result(), answer], ())})()
    work.campaign._trial(driver, TrialRequest({}, Load.ladder(5.0, 1, (1,))))
    assert Run.open(work.run.path).manifest.emulated


def make_result(**changes):
    return result_of(make_request(), "open", Outcome.DONE, **changes)


# The real Triton


def speak_all(url, *requests, audio=None):
    async def together():
        async with SpeechClient(url) as client:
            return await asyncio.gather(*(client.speak(each, "closed", on_audio=audio) for each in requests))

    return asyncio.run(together())


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    one_at_a_time = {f"{stage}.max_batch": 1 for stage in wire.STAGES}
    deployed = Deployment("1.5b", emulate=str(write(folder / "h200-1.5b.json")), gpus=2, knobs=one_at_a_time)
    with TritonServer(deployed, root=folder) as server:
        yield server


@pytest.mark.server
def test_an_emulated_server_streams_silence_in_the_time_of_the_profile(emulated):
    heard = []
    (result,) = speak_all(emulated.url, make_request(frames=30), audio=heard.append)
    assert (result.outcome, result.emulated) == (Outcome.DONE, True)
    samples = np.frombuffer(b"".join(heard), "<f4")
    assert len(samples) == 30 * wire.SAMPLES_PER_FRAME and not samples.any()
    between_ms = np.diff(result.chunks.sent_at_ns) / 1e6
    assert np.median(between_ms) >= FRAME_MS and between_ms.sum() >= 29 * FRAME_MS * 0.98


@pytest.mark.server
def test_a_dilated_server_takes_longer_and_its_results_do_not(emulated, monkeypatch):
    """Only the vocoder is dilated here, and clients are told: each further stage would be loaded twice more."""
    monkeypatch.setattr(config, "must_not_emulate", lambda names: None)  # users may not dilate one model alone
    deployed, slower = emulated.deployment, 5.0
    expected_ms = VOCODER_MS + (FRAME_MS - VOCODER_MS) / slower
    told = {f"{model}.{wire.DILATION}": f"{slower:g}" for model in (wire.ENTRY, wire.VOCODER)}

    async def speak():
        async with SpeechClient(emulated.url) as client:
            await client.ready()
            request = make_request(frames=12, speakers=(0,))
            return await client.speak(replace(request, due_ns=client.clock.now_ns()), "closed")

    try:
        emulated.reload(replace(deployed, parameters=told))
        began_s = time.monotonic()
        result = asyncio.run(speak())
        took_ms = 1e3 * (time.monotonic() - began_s)
    finally:
        emulated.reload(deployed)
    between_ms = np.diff(result.chunks.sent_at_ns) / 1e6
    assert result.outcome is Outcome.DONE and took_ms >= 11 * expected_ms * slower
    assert expected_ms * 0.999 <= np.median(between_ms) < 4 * expected_ms  # 5 times as much on the host


@pytest.mark.server
def test_a_computed_answer_is_not_marked(speak):
    (result,) = speak(make_request(frames=2))
    assert (result.outcome, result.emulated) == (Outcome.DONE, False)


@pytest.mark.server
@pytest.mark.alone
def test_two_emulated_gpus_carry_about_twice_what_one_does(emulated):
    def frames_per_s():
        requests = [make_request(f"r{i}", frames=25, speakers=(0,), seed=i) for i in range(12)]
        began = time.monotonic()
        results = speak_all(emulated.url, *requests)
        assert {(result.outcome, result.emulated) for result in results} == {(Outcome.DONE, True)}
        return 12 * 25 / (time.monotonic() - began)

    two = frames_per_s()
    deployed = emulated.deployment
    try:
        emulated.reload(Deployment("1.5b", emulate=deployed.emulate, gpus=1, knobs=deployed.knobs))
        one = frames_per_s()
    finally:
        emulated.reload(deployed)
    assert one <= 1000 / FRAME_MS * 1.02  # a GPU is never in two places
    assert two > 1.4 * one


@pytest.mark.server
def test_admission_counts_the_bytes_of_the_emulated_preset(emulated):
    """8 GiB hold (60 + 2 x 40,000) positions of 28,672 bytes three times, and nothing of it is allocated."""
    free = 8 << 30
    sessions = int(free // (28_672 * 80_100))
    requests = [
        make_request(f"r{i}", frames=40, start_frame=39_960, speakers=(0,)) for i in range(2 * (sessions + 1) + 1)
    ]
    emulated_busy = Deployment(
        "1.5b",
        emulate=emulated.deployment.emulate,
        gpus=2,
        knobs=emulated.deployment.knobs,
        parameters={f"{wire.ENTRY}.waiting_limit": "0"},
    )
    deployed = emulated.deployment
    try:
        emulated.reload(emulated_busy)
        results = speak_all(emulated.url, *requests)
    finally:
        emulated.reload(deployed)
    refused = [result for result in results if result.outcome is Outcome.ERROR]
    assert sessions == 3 and refused and len(results) - len(refused) >= sessions
    assert all("busy" in result.error and "8192 MiB" in result.error for result in refused)


@pytest.mark.server
def test_the_files_of_emulated_gpus_lie_in_the_servers_own_folder(emulated):
    """So they go with it: the folder is removed when the server stops."""
    assert {file.name for file in emulated.folder.rglob("gpu-*")} == {"gpu-0", "gpu-1"}
