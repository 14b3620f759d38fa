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
from made_up_profile import DIFFUSION_MS, LLM_MS, STAGES, VOCODER_MS, write

from harness import wire
from harness.clock import Clock as DilatedClock
from harness.errors import InputError, RequestError
from harness.vibevoice.profiling import emulation
from harness.vibevoice.profiling.emulation import (
    EmulatedDiffusion,
    EmulatedGPU,
    EmulatedLLM,
    EmulatedVocoder,
    EmulatedVoice,
    wait_until,
)
from harness.vibevoice.profiling.times import Curve, ProfiledTimes, Surface
from harness.vibevoice.sessions.table import IDLE_LIMIT_S
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.vocoder import VocoderStage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def profile(tmp_path):
    return ProfiledTimes(write(tmp_path / "h200-1.5b.json"))


class Clock:
    """A GPU that only counts what is asked of it."""

    def __init__(self):
        self.spent_ms, self.host_ms = [], []

    def spend(self, milliseconds, host_ms=0.0):
        self.spent_ms.append(milliseconds)
        self.host_ms.append(host_ms)

    def seconds(self):
        return time.monotonic()


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
    profile = ProfiledTimes(write(tmp_path / "p.json", stages))
    assert [profile.denoise_ms([count]) for count in (5, 10, 30)] == [3.0, 6.0, 18.0]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"model": {}, "stages": {}}', '{"model": {"hidden_size": 1}, "stages": {"prefill": []}}'],
)
def test_what_is_no_profile_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.json is not a profile"):
        ProfiledTimes(tmp_path / "x.json")


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
        *(
            lambda content, ms=ms: content["stages"][wire.VOCODER][0].update(device_ms=ms)
            for ms in (None, "3", 0.0, -1.0, math.nan, VOCODER_MS + 1)
        ),
    ],
)
def test_a_spoiled_profile_is_refused_before_it_gives_times(tmp_path, spoil):
    file = write(tmp_path / "x.json")
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"x\.json is not a profile"):
        ProfiledTimes(file)


# The device's part of a time


def split(host_ms):
    """The stages' points, each with so much of its time taken by the host."""
    return {
        stage: [p | {"device_ms": p["ms"] - host_ms, "device_ms_from": "profiler"} if "ms" in p else p for p in points]
        for stage, points in STAGES.items()
    }


TIMES = st.sampled_from(
    [
        lambda times: times.step_ms([100]),
        lambda times: times.step_ms([900] * 50),
        lambda times: times.prefill_ms(900, 20),
        lambda times: times.denoise_ms([10]),
        lambda times: times.vocode_ms(9),
        lambda times: times.vocode_ms(90),
        lambda times: times.encode_ms(11),
    ]
)


@given(TIMES, st.floats(0, 3.5))
def test_the_parts_of_a_call_are_its_wall_time_at_the_points_between_and_beyond(tmp_path_factory, time_of, host_ms):
    profile = ProfiledTimes(write(tmp_path_factory.mktemp("p") / "split.json", split(host_ms)))
    host, device = profile.parts_ms(time_of)
    assert host + device == pytest.approx(time_of(profile)) and device > 0
    assert host == pytest.approx(host_ms, abs=1e-9)


def test_other_numbers_of_steps_split_the_time_as_the_usual_number_does(tmp_path):
    profile = ProfiledTimes(write(tmp_path / "split.json", split(2.0)))
    host, device = profile.parts_ms(lambda times: times.denoise_ms([5]))
    assert (host, device) == (pytest.approx(1.0), pytest.approx(2.0))


def test_device_times_that_fall_faster_than_wall_times_never_leave_less_than_none_to_the_host(tmp_path):
    points = [{"batch": b, "ms": 10.0, "device_ms": d} for b, d in ((1, 1.0), (8, 9.0))]
    profile = ProfiledTimes(write(tmp_path / "p.json", STAGES | {wire.VOCODER: points}))
    assert profile.parts_ms(lambda times: times.vocode_ms(64)) == (0.0, 10.0)


def test_a_profile_says_where_its_device_times_are_from(tmp_path, profile):
    assert profile.parts_ms(lambda times: times.vocode_ms(1)) == (0.0, VOCODER_MS)
    assert "not separated" in profile.basis
    separated = ProfiledTimes(write(tmp_path / "split.json", split(1.0)))
    assert separated.basis == "device times from: profiler"


def test_every_stage_holds_the_gpu_for_the_devices_part_alone(tmp_path):
    profile, clock = ProfiledTimes(write(tmp_path / "split.json", split(3.0))), Clock()
    llm = EmulatedLLM(profile, clock, 1 << 40)
    llm.open(1, 64, 5)
    llm.prefill(1, np.zeros(64, np.int32))
    llm.step([1])
    EmulatedDiffusion(profile, clock).denoise(None, None, None, [10])
    vocoder = EmulatedVocoder(profile, clock)
    vocoder.open(1)
    vocoder.step([1], None, np.array([wire.TOKEN_SPEECH_FRAME]))
    EmulatedVoice(profile, clock).encode(np.zeros(3 * wire.SAMPLE_RATE_HZ))
    assert clock.spent_ms == pytest.approx([8.0 - 3, LLM_MS - 3, DIFFUSION_MS - 3, VOCODER_MS - 3, 4.0 - 3])
    assert clock.host_ms == pytest.approx([3.0] * 5)


# Turns on a GPU


TAKE_TURNS = """
import pathlib, sys, time
from harness.vibevoice.profiling.emulation import EmulatedGPU
gpu, device_ms, host_ms = EmulatedGPU(pathlib.Path(sys.argv[1])), float(sys.argv[2]), float(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
began = time.monotonic_ns()
for _ in range(10):
    gpu.spend(device_ms, host_ms)
print(began, time.monotonic_ns())
"""


def together_ms(tmp_path, processes, device_ms, host_ms=0.0):
    """Milliseconds that so many processes take for ten calls each."""
    command = [sys.executable, "-c", TAKE_TURNS, str(tmp_path / "gpu-0"), str(device_ms), str(host_ms)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    running = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    times = [list(map(int, process.communicate(timeout=200)[0].split())) for process in running]
    return (max(ended for _, ended in times) - min(began for began, _ in times)) / 1e6


def test_processes_that_share_a_gpu_take_turns(tmp_path):
    assert together_ms(tmp_path, 3, device_ms=5.0) >= 3 * 10 * 5.0


def test_host_times_of_two_processes_pass_side_by_side(tmp_path):
    """Ten calls of 120 + 30 ms each: 1500 ms for both together, where turns of whole calls would take 3000 at least."""
    assert 1500 <= together_ms(tmp_path, 2, device_ms=30.0, host_ms=120.0) < 2900


def test_beside_host_times_the_gpu_still_takes_turns(tmp_path):
    """Ten calls of 4 + 16 ms each, of two processes: 20 turns of 16 ms."""
    assert together_ms(tmp_path, 2, device_ms=16.0, host_ms=4.0) >= 20 * 16


@pytest.mark.parametrize(("host_ms", "device_ms"), [(0.0, 3.0), (3.0, 1.0), (1.0, 4.0)])
def test_a_process_alone_takes_host_and_device_time_and_no_more(tmp_path, monkeypatch, host_ms, device_ms):
    """On a clock that moves only in sleeps: exact, and a sleeper that wakes late makes up for it in its turn."""
    now, late_ns = [10**9], [0]

    def sleep(seconds):
        now[0] += round(seconds * 1e9) + late_ns.pop()
        late_ns.append(0)

    def monotonic_ns():
        now[0] += 100
        return now[0]

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic_ns", monotonic_ns)
    gpu = EmulatedGPU(tmp_path / "gpu-0")
    for late_ms in (0.0, 0.9 if host_ms else 0.0):
        late_ns[0] = round(late_ms * 1e6)
        began = now[0]
        gpu.spend(device_ms, host_ms)
        assert (now[0] - began) / 1e6 == pytest.approx(host_ms + device_ms, abs=1e-3)


def test_a_gpu_is_held_for_its_time_and_not_less(tmp_path):
    gpu = EmulatedGPU(tmp_path / "gpu-0")
    for milliseconds in (0.0, 0.05, 1.0, 7.5):
        began = time.monotonic_ns()
        gpu.spend(milliseconds)
        assert time.monotonic_ns() - began >= milliseconds * 1e6


def test_a_dilated_gpu_takes_longer_on_the_host(tmp_path, monkeypatch):
    deadlines = []
    monkeypatch.setattr(emulation, "wait_until", deadlines.append)
    began = 10**12
    monkeypatch.setattr(time, "monotonic_ns", lambda: began)
    EmulatedGPU(tmp_path / "gpu-0", DilatedClock(20.0)).spend(10.0, host_ms=5.0)
    host_ms, whole_ms = ((each - began) / 1e6 for each in deadlines)
    assert host_ms == pytest.approx(100) and whole_ms - host_ms == pytest.approx(200)


def test_a_session_of_a_dilated_stage_is_idle_by_the_clock_of_its_gpu(profile, tmp_path, monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr(time, "monotonic_ns", lambda: round(now_s[0] * 1e9))
    stage = EmulatedVocoder(profile, EmulatedGPU(tmp_path / "gpu-0", DilatedClock(20.0)))
    stage.open(1)
    for later_s, left in ((20 * IDLE_LIMIT_S - 1, 1), (2, 0)):
        now_s[0] += later_s
        stage.sessions.drop_idle()
        assert len(stage.sessions) == left


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
    emulated = EmulatedLLM(ProfiledTimes(write(tmp_path / "tiny.json", model=model)), Clock(), limit)
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
            ids = torch.zeros(0 if start else prompt, dtype=torch.long)
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
    for _ in range(4):
        llm.step([1])
    contexts = [5_040, 5_042, 5_022, 5_024]  # "speech begin" has emptied the branch without the prompt
    assert clock.spent_ms == [pytest.approx(profile.step_ms([context])) for context in contexts]
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
    with pytest.raises(RequestError, match="no such session"):
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
