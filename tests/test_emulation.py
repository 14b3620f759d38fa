"""Emulated stages: times of a profile, turns on shared GPUs, and sessions as the real stages keep them."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import wire
from harness.errors import InputError, RequestError
from harness.vibevoice.emulation import (
    EmulatedDiffusion,
    EmulatedGPU,
    EmulatedLLM,
    EmulatedVocoder,
    EmulatedVoice,
    wait_until,
)
from harness.vibevoice.llm import LLMStage
from harness.vibevoice.presets import Weights
from harness.vibevoice.times import Curve, Profile, Surface
from harness.vibevoice.vocoder import VocoderStage

ROOT = Path(__file__).resolve().parents[1]
LLM_MS, DIFFUSION_MS, VOCODER_MS = 8.0, 6.0, 5.0  # of one session alone
FRAME_MS = LLM_MS + DIFFUSION_MS + VOCODER_MS
MODEL = {"hidden_size": 1536, "kv_bytes_per_token": 28_672, "state_values": 7}
STAGES = {
    wire.LLM: [
        {"batch": 1, "context": 100, "ms": LLM_MS},
        {"batch": 1, "context": 10_100, "ms": LLM_MS + 1},
        {"batch": 16, "context": 100, "ms": 11.0},
        {"batch": 16, "context": 10_100, "ms": 27.0},
        {"batch": 32, "context": 10_100, "left_out": "out of memory"},
    ],
    "prefill": [
        {"tokens": 64, "context": 0, "ms": 8.0},
        {"tokens": 256, "context": 0, "ms": 10.0},
        {"tokens": 256, "context": 8_000, "ms": 18.0},
        {"tokens": 64, "context": 8_000, "ms": 9.0},
    ],
    wire.DIFFUSION: [
        {"batch": 1, "steps": 10, "ms": DIFFUSION_MS},
        {"batch": 16, "steps": 10, "ms": 9.0},
        {"batch": 16, "steps": 20, "ms": 18.0},
    ],
    wire.VOCODER: [{"batch": 1, "ms": VOCODER_MS}, {"batch": 16, "ms": 20.0}],
    wire.VOICE: [{"seconds": 3, "ms": 4.0}, {"seconds": 30, "ms": 13.0}],
}


def write(path, stages=STAGES, preset="1.5b", model=MODEL, device="NVIDIA H200"):
    path.write_text(json.dumps({"schema": 1, "device": device, "preset": preset, "model": model, "stages": stages}))
    return path


@pytest.fixture
def profile(tmp_path):
    return Profile(write(tmp_path / "h200-1.5b.json"))


class Clock:
    """A GPU that only counts what is asked of it."""

    def __init__(self):
        self.spent_ms = []

    def spend(self, milliseconds):
        self.spent_ms.append(milliseconds)


# Times between and beyond the points


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=6, unique=True),
    st.floats(0, 50),
    st.floats(0, 3),
    st.floats(0, 3000),
)
def test_a_line_stays_a_line_between_the_points_and_beyond_the_last(xs, base, slope, x):
    curve = Curve((at, base + slope * at) for at in xs)
    assert curve.at(x) == pytest.approx(base + slope * max(x, min(xs)), rel=1e-6, abs=1e-6)


def test_beyond_the_last_point_time_never_falls():
    assert Curve([(1, 5.0), (2, 4.0)]).at(10) == 4.0
    assert Curve([(3, 7.0)]).at(1) == Curve([(3, 7.0)]).at(50) == 7.0


@given(st.integers(1, 200), st.integers(50, 200_000))
def test_a_cost_linear_in_batch_and_in_total_context_is_met_everywhere(batch, context):
    cost = lambda n, c: 7.0 + 0.2 * n + 3e-5 * n * c  # noqa: E731
    surface = Surface((n, c, cost(n, c)) for n in (1, 4, 64) for c in (50, 400, 60_000))
    assert surface.at(batch, context) == pytest.approx(cost(batch, context))


def test_a_step_takes_the_time_of_its_batch_and_its_contexts_in_all(profile):
    assert profile.step_ms([100]) == LLM_MS
    assert profile.step_ms([100] * 16) == 11.0
    assert profile.step_ms([10_100] * 8 + [100] * 8) == pytest.approx(19.0)  # as 16 sessions of the mean context
    assert profile.step_ms([20]) == LLM_MS  # below the least context: its own time


def test_other_stages_take_the_time_of_their_batch_steps_and_seconds(profile):
    assert profile.prefill_ms(160, 4_000) == pytest.approx((9.0 + 8.5 + 18.0 - 8.5 + 9.0) / 2 - 6.75)
    assert profile.denoise_ms([10]) == DIFFUSION_MS and profile.denoise_ms([20]) == 2 * DIFFUSION_MS
    assert profile.denoise_ms([5]) == DIFFUSION_MS / 2
    assert profile.denoise_ms([10, 20, 10]) == pytest.approx(profile.denoise_ms([10, 10]) + profile.denoise_ms([20]))
    assert profile.vocode_ms(16) == 20.0 and profile.encode_ms(30) == 13.0


def test_what_lies_beyond_the_measured_is_told_once(profile, capsys):
    profile.step_ms([100] * 16)
    assert capsys.readouterr().out == ""
    for _ in range(2):
        assert profile.step_ms([100] * 31) == pytest.approx(14.0)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "a frame step at (31, 100)" in said and "extrapolated" in said


@given(st.integers(1, 20), st.integers(0, 100))
def test_a_grid_covers_what_lies_between_its_points(batch, context):
    surface = Surface([(1, 100, 1.0), (4, 100, 1.0), (16, 50, 1.0)])  # the largest batch ran out of memory
    assert surface.covers(batch, context) == (batch <= (4 if context > 50 else 16))


def test_diffusion_steps_cost_in_proportion_where_only_the_usual_number_was_measured(tmp_path):
    stages = {**STAGES, wire.DIFFUSION: STAGES[wire.DIFFUSION][:2]}
    profile = Profile(write(tmp_path / "p.json", stages))
    assert [profile.denoise_ms([count]) for count in (5, 10, 30)] == [3.0, 6.0, 18.0]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"model": {}, "stages": {}}', '{"model": {"hidden_size": 1}, "stages": {"prefill": []}}'],
)
def test_what_is_no_profile_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.json is no profile"):
        Profile(tmp_path / "x.json")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.update(model=[1]),
        lambda content: content["model"].pop("hidden_size"),
        lambda content: content["model"].update(kv_bytes_per_token=0),
        lambda content: content.update(stages=[1]),
        lambda content: content["stages"].pop("prefill"),
        lambda content: content["stages"][wire.LLM].append({"batch": "1", "context": 9, "ms": 1.0}),
        *(
            lambda content, ms=ms: content["stages"][wire.DIFFUSION][0].update(ms=ms)
            for ms in (None, "3", 0.0, -1.0, math.nan, math.inf)
        ),
    ],
)
def test_a_spoiled_profile_is_refused_before_it_gives_times(tmp_path, spoil):
    file = write(tmp_path / "x.json")
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"x\.json is no profile"):
        Profile(file)


# Turns on a GPU


TAKE_TURNS = """
import pathlib, sys, time
from harness.vibevoice.emulation import EmulatedGPU
gpu = EmulatedGPU(pathlib.Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
began = time.monotonic_ns()
for _ in range(10):
    gpu.spend(5.0)
print(began, time.monotonic_ns())
"""


def test_processes_that_share_a_gpu_take_turns(tmp_path):
    command = [sys.executable, "-c", TAKE_TURNS, str(tmp_path / "gpu-0")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    times = [list(map(int, process.communicate(timeout=30)[0].split())) for process in processes]
    first, last = min(began for began, _ in times), max(ended for _, ended in times)
    assert last - first >= 3 * 10 * 5_000_000


def test_a_gpu_is_held_for_its_time_and_not_less(tmp_path):
    gpu = EmulatedGPU(tmp_path / "gpu-0")
    for milliseconds in (0.0, 0.05, 1.0, 7.5):
        began = time.monotonic_ns()
        gpu.spend(milliseconds)
        assert time.monotonic_ns() - began >= milliseconds * 1e6


def test_times_left_over_from_an_earlier_server_hold_nobody_up(tmp_path):
    left_over_ns = EmulatedGPU(tmp_path / "gpu-0")._reserve(3600 * 10**9)
    free_ns = EmulatedGPU(tmp_path / "gpu-0")._reserve(10**5)
    assert free_ns < left_over_ns - 3000 * 10**9


def test_a_deadline_that_is_over_is_not_waited_for(monkeypatch):
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    wait_until(0)
    wait_until(time.monotonic_ns())
    assert naps == []


# Sessions as the real stages keep them


@pytest.fixture(scope="module")
def weights():
    return Weights("tiny")


def llm_pair(weights, tmp_path, limit=1 << 20):
    real = LLMStage(weights, limit)
    model = {"hidden_size": 64, "kv_bytes_per_token": real.kv_bytes_per_token, "state_values": 1}
    emulated = EmulatedLLM(Profile(write(tmp_path / "tiny.json", model=model)), Clock(), limit)
    return real, emulated


def both(stages, call):
    """The outcomes of one call on each stage: what it returned, or the error it raised."""
    outcomes = []
    for stage in stages:
        try:
            outcomes.append(call(stage))
        except RequestError as error:
            outcomes.append(str(error))
    return outcomes


TOKENS = st.sampled_from((wire.TOKEN_SPEECH_FRAME, wire.TOKEN_SPEECH_BEGIN, wire.TOKEN_SPEECH_END))
SESSION = st.tuples(st.integers(1, 700), st.integers(1, 600), st.lists(TOKENS, max_size=4), st.integers(0, 40))


@settings(max_examples=15, deadline=None)
@given(st.lists(SESSION, min_size=1, max_size=4))
def test_room_and_words_of_sessions_are_those_of_the_real_stage(weights, tmp_path_factory, sessions):
    stages = llm_pair(weights, tmp_path_factory.mktemp("p"))
    opened = []
    for number, (prompt, frames, say, start) in enumerate(sessions):
        start = min(start, frames)
        real, emulated = both(stages, lambda s: s.open(number, prompt, frames, start, True, say))  # noqa: B023
        assert real == emulated
        if real is None:
            opened.append(number)
            ids = torch.zeros(prompt, dtype=torch.long)
            for stage in stages:
                stage.prefill(number, ids, torch.empty(0, wire.LATENT_SIZE))
        assert stages[0].kv_bytes == stages[1].kv_bytes
    latent, semantic = torch.zeros(len(opened), wire.LATENT_SIZE), torch.zeros(len(opened), wire.SEMANTIC_SIZE)
    for _ in range(6 if opened else 0):
        real, emulated = both(stages, lambda s: [list(map(int, t)) for t in (s.step(opened, latent, semantic)[1],)])
        assert real == emulated
    for stage in stages:
        for number in opened:
            stage.close(number)
        assert stage.kv_bytes == 0


def test_a_steps_context_grows_with_both_branches(profile):
    clock = Clock()
    llm = EmulatedLLM(profile, clock, 1 << 40)
    llm.open(1, 5_000, 60, start_frame=20, say=[wire.TOKEN_SPEECH_FRAME, wire.TOKEN_SPEECH_BEGIN])
    llm.prefill(1, np.zeros(5_000, np.int32))
    for _ in range(4):
        llm.step([1])
    contexts = [5_040, 5_042, 5_022, 5_024]  # "speech begin" has emptied the branch without the prompt
    assert clock.spent_ms[1:] == [pytest.approx(profile.step_ms([context])) for context in contexts]
    condition, token = llm.step([1])
    assert condition.shape == (1, 2, 1536) and not condition.any() and token.tolist() == [wire.TOKEN_SPEECH_FRAME]


def test_a_session_taken_up_again_pays_for_its_past(profile):
    clock = Clock()
    llm = EmulatedLLM(profile, clock, 1 << 40)
    llm.open(1, 100, 60)
    llm.prefill(1, np.zeros(100, np.int32))
    llm.replay(1, [wire.TOKEN_SPEECH_FRAME, wire.TOKEN_SPEECH_BEGIN, wire.TOKEN_SPEECH_FRAME, wire.TOKEN_SPEECH_FRAME])
    assert clock.spent_ms[1:] == [profile.prefill_ms(4, 100), profile.prefill_ms(2, 0)]
    llm.step([1])
    assert clock.spent_ms[-1] == profile.step_ms([100 + 4 + 2])


def test_a_session_is_not_stepped_beyond_its_room_nor_before_it_is_open(profile):
    llm = EmulatedLLM(profile, Clock(), 1 << 40)
    llm.open(1, 1, 2)
    llm.prefill(1, [0])
    for _ in range(3):
        llm.step([1])
    with pytest.raises(RequestError, match="used up the 4 positions"):
        llm.step([1])
    with pytest.raises(RequestError, match="no session 2"):
        llm.step([2])


def test_the_other_stages_answer_silence_in_the_shapes_of_the_real_ones(weights, profile):
    clock = Clock()
    tokens = torch.tensor([wire.TOKEN_SPEECH_FRAME, wire.TOKEN_SPEECH_END])
    real, emulated = VocoderStage(weights), EmulatedVocoder(profile, clock)
    for stage in (real, emulated):
        stage.open(1), stage.open(2)
    answers = [stage.step([1, 2], torch.zeros(2, wire.LATENT_SIZE), tokens) for stage in (real, emulated)]
    assert [tuple(each.shape) for each in answers[0]] == [each.shape for each in answers[1]]
    assert clock.spent_ms == [VOCODER_MS]  # the row without a frame costs nothing
    emulated.step([1], None, tokens[1:])
    assert clock.spent_ms == [VOCODER_MS]
    assert len(emulated.close(1)) == 7 and len(emulated.close(1)) == len(real.close(9)) == 0
    latent = EmulatedDiffusion(profile, clock).denoise(None, None, None, [10, 10])
    voice = EmulatedVoice(profile, clock).encode(np.zeros(3 * wire.SAMPLE_RATE_HZ))
    assert (latent.shape, voice.shape) == ((2, wire.LATENT_SIZE), (23, wire.LATENT_SIZE))
    assert not latent.any() and not voice.any()
