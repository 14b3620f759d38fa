"""A ladder over an emulated GPU has the rungs that its memory holds."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_up_profile import MODEL, write

from harness import signoff as job
from harness.capacity.models.memory import KvRoom
from harness.planfile.reading import load_plan
from harness.runs.rungs import rungs_within, sessions_that_fit, within_room
from harness.sweep.progress import Watcher

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"
GPUS = ("h100", "h200", "l40s")
PLAN = """
name: podcasts
preset: 1.5b
mix:
  classes:
    short: {weight: 99, length: {fixed: 10}}
    long: {weight: 1, length: {fixed: 5400}}
slos: {long: {rtf_p90: 0.9}}
targets_qps: [0.1]
emulate: gpu.json
ladder: {sessions: [1, 8, 16, 32, 48, 64], seconds: 4}
"""


def plan_over(folder, room_bytes=52_633_312_318, more=""):
    write(folder / "gpu.json", model={**MODEL, "kv_room_bytes": room_bytes} if room_bytes else MODEL)
    (folder / "plan.yaml").write_text(PLAN + more)
    return folder / "plan.yaml"


@pytest.mark.parametrize("name", GPUS)
def test_the_rungs_of_a_scenario_fit_its_gpu_and_reach_what_it_holds(name):
    spec = load_plan(SCENARIOS / f"{name}.yaml")
    room = sessions_that_fit(spec)
    assert within_room(spec) == (spec, "")
    assert 0.9 * room <= spec.ladder.sessions[-1] <= room


@pytest.mark.parametrize("name", GPUS)
def test_the_memory_suffices_for_nearly_every_draw_of_the_highest_rung(name):
    spec = load_plan(SCENARIOS / f"{name}.yaml")
    model = json.loads(spec.profile_path().read_text())["model"]
    kv, mix, rng = (
        KvRoom(model["kv_room_bytes"], model["kv_bytes_per_token"]),
        spec.traffic_mix(),
        np.random.default_rng(7),
    )
    most = spec.ladder.sessions[-1]
    frames = np.array([[mix.sample_in_progress(rng).frames for _ in range(most)] for _ in range(300)])
    assert np.mean(kv.bytes_of(frames).sum(axis=1) <= kv.room_bytes) > 0.95


def test_rungs_beyond_the_memory_are_replaced_by_one_at_its_limit(tmp_path):
    spec, says = within_room(load_plan(plan_over(tmp_path)))
    assert spec.ladder.sessions == (1, 8, 16) and spec.ladder.seconds == 4
    assert "17 sessions" in says and "rungs of 1, 8, 16 sessions are measured instead of 1, 8, 16, 32" in says
    assert within_room(spec) == (spec, "")


def test_a_plan_without_a_known_memory_keeps_its_rungs(tmp_path):
    spec = load_plan(plan_over(tmp_path, room_bytes=None))
    assert within_room(spec) == (spec, "")


@pytest.mark.parametrize(
    ("more", "factor"), [("gpus: 4\n", 4), ("parameters: {vibevoice_llm_encoder.kv_limit_bytes: 10000000000}\n", 0.19)]
)
def test_the_memory_is_that_of_the_deployment(tmp_path, more, factor):
    one = sessions_that_fit(load_plan(plan_over(tmp_path)))
    assert sessions_that_fit(load_plan(plan_over(tmp_path, more=more))) == pytest.approx(factor * one, rel=0.15)


@pytest.mark.parametrize(
    ("rungs", "room", "kept"),
    [
        ((1, 8, 16), 16.0, (1, 8, 16)),
        ((1, 4, 8, 32), 17.0, (1, 4, 8, 17)),
        ((1, 8, 16, 32), 17.0, (1, 8, 16)),
        ((1, 8, 16), 7.0, (1, 3, 7)),
        ((4, 8), 0.5, (1,)),
    ],
)
def test_a_rung_at_the_limit_shows_something_new_or_is_left_out(rungs, room, kept):
    assert rungs_within(rungs, room) == kept


def test_a_signoff_says_which_rungs_it_measures_instead(tmp_path, monkeypatch):
    said, watcher = [], Watcher()
    watcher.say = said.append
    monkeypatch.setattr(job.SignOff, "_measure", lambda *_: None)
    work = job.SignOff(plan_over(tmp_path), tmp_path / "results")
    work.execute(watcher, ladders_only=True)
    assert work.campaign.spec.ladder.sessions == (1, 8, 16) and any("instead of" in each for each in said)
    assert work.run.manifest.plan["ladder"]["sessions"] in ([1, 8, 16], (1, 8, 16))
