"""Profiles: costs as the published shapes have them, times that are sure, and a file that is whole or not there."""

import itertools
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import still_running
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from harness import wire
from harness.deploy.profiling import PREFILL, ProfileJob, measure, tables
from harness.device_profile import DeviceEvent, PointEvent, Profile, SkippedPoint, StagePoint, event_line, event_of
from harness.errors import HarnessError, InputError, RequestError
from harness.records.store import read_profile, write_profile
from harness.vibevoice.profiling import profiler as child
from harness.vibevoice.profiling.roofline import Cost, Roofline
from harness.vibevoice.profiling.sampling import Sampler, spread
from harness.vibevoice.profiling.times import ProfiledTimes
from harness.vibevoice.sessions.table import NoRoom
from harness.vibevoice.stages.configuration import preset_config
from harness.vibevoice.stages.presets import Weights

ROOT = Path(__file__).resolve().parents[2]
STORED = [path for path in (ROOT / "results").rglob("*.json") if path.name.endswith(("-tiny.json", "-1.5b.json"))]
FRAME_HEAD_STEPS = 2 * wire.DEFAULT_DIFFUSION_STEPS  # both branches, every denoising step


@pytest.fixture(scope="module")
def published():
    return {preset: Roofline(preset_config(preset), itemsize=2) for preset in ("1.5b", "7b")}


def test_a_frame_of_the_1_5b_costs_what_its_shapes_say(published):
    """GFLOP per frame and stream, counted by others on torch's meta device."""
    costs = published["1.5b"]
    assert costs.backbone.operations / 1e9 == pytest.approx(2.62, rel=0.01)
    assert FRAME_HEAD_STEPS * costs.head.operations / 1e9 == pytest.approx(4.93, rel=0.01)
    assert costs.decoder.operations / 1e9 == pytest.approx(3.63, rel=0.01)
    assert costs.semantic_encoder.operations / 1e9 == pytest.approx(3.63, rel=0.01)
    assert 1000 * costs.attention_operations / 1e9 == pytest.approx(0.172, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "millions", "kv_bytes"),
    [("1.5b", (1310, 123, 344, 345, 344), 28_672), ("7b", (6526, 669, 344, 345, 344), 57_344)],
)
def test_the_parts_have_the_published_parameters(published, preset, millions, kv_bytes):
    costs = published[preset]
    parts = (costs.backbone, costs.head, costs.decoder, costs.semantic_encoder, costs.acoustic_encoder)
    assert tuple(round(part.parameters / 1e6) for part in parts) == millions
    assert costs.kv_bytes_per_token == kv_bytes
    assert costs.step(1, 0).bytes == pytest.approx(2e6 * millions[0], rel=0.01)  # bfloat16
    assert costs.denoise(1, 10).bytes == pytest.approx(10 * 2e6 * millions[1], rel=0.01)


def test_the_roofline_of_an_h200_is_that_of_the_design(published):
    """Milliseconds per frame step at 4.3 TB/s and 790 TFLOP/s; the table of the design counts a little more."""
    costs = published["1.5b"]
    for context, batch, expected in (
        (400, 1, 1.5),
        (7_600, 4, 1.8),
        (63_000, 1, 1.9),
        (63_000, 16, 8.4),
        (63_000, 64, 29),
    ):
        stages = (costs.step(batch, context), costs.denoise(batch, 10), costs.vocode(batch, 350_000))
        assert sum(cost.floor_ms(4300, 790) for cost in stages) == pytest.approx(expected, rel=0.06)


@given(st.integers(1, 128), st.integers(0, 60_000), st.floats(1, 1e4), st.floats(0.1, 1e3))
def test_the_floor_is_the_slower_of_memory_and_arithmetic(published, batch, context, bandwidth, tflop_s):
    cost = published["1.5b"].step(batch, context)
    memory_ms, arithmetic_ms = cost.bytes / bandwidth / 1e6, cost.operations / tflop_s / 1e9
    assert cost.floor_ms(bandwidth, tflop_s) == pytest.approx(max(memory_ms, arithmetic_ms))
    assert published["1.5b"].step(batch + 1, context).floor_ms(bandwidth, tflop_s) >= cost.floor_ms(bandwidth, tflop_s)


def test_a_prompt_in_parts_costs_the_arithmetic_of_the_whole(published):
    costs = published["1.5b"]
    whole = costs.prefill(1024, 0)
    parts = [costs.prefill(256, start) for start in range(0, 1024, 256)]
    assert sum(part.operations for part in parts) == whole.operations
    assert sum(part.bytes for part in parts) > whole.bytes  # weights are read for each


def test_the_spread_is_half_the_interval_of_the_median():
    taken = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spread(taken) == pytest.approx(1.57 * 2 / math.sqrt(5) / 3)
    assert spread(np.full(9, 7.0)) == 0 and math.isnan(spread(np.array([1.0])))


def test_the_first_call_warms_up_and_a_spent_budget_measures_nothing():
    calls = []
    taken = Sampler(60.0, 1, lambda: None).sample(iter([lambda: calls.append(1)] * 6))
    assert len(calls) == 6 and len(taken) == 5
    assert Sampler(0.0, 1, lambda: None).sample(iter([lambda: calls.append(1)])) is None
    assert len(calls) == 6
    assert len(Sampler(0.0, 1, lambda: None).sample(iter([lambda: None] * 9), needed=True)) == 1


class Clock:
    """Seconds that pass only where something takes them."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def taking(self, seconds: float):
        """A call that takes so long."""
        return lambda: setattr(self, "now_s", self.now_s + seconds)


def test_a_point_takes_little_more_than_its_share_and_one_known_to_be_slow_nothing():
    clock = Clock()
    sampler = Sampler(100.0, 20, lambda: None, clock=clock)  # a share of 5 s
    assert len(sampler.sample(itertools.repeat(clock.taking(0.5)))) <= 10
    assert clock.now_s <= 6
    before = clock.now_s
    assert sampler.sample(itertools.repeat(clock.taking(30.0))) is None  # the first call takes six shares
    assert clock.now_s == before + 30
    assert sampler.sample(itertools.repeat(clock.taking(30.0)), at_least_ms=30e3) is None
    assert clock.now_s == before + 30
    assert len(sampler.sample(itertools.repeat(clock.taking(30.0)), needed=True)) == 1


def test_what_prepares_a_call_counts_as_its_time():
    clock = Clock()
    sampler = Sampler(10.0, 10, lambda: None, clock=clock)

    def calls():
        while True:
            clock.taking(3.0)()  # a context is computed before each call
            yield clock.taking(0.01)

    assert sampler.sample(calls()) is None and clock.now_s < 4


SLOW = {  # what takes many times its share: a stage's own set-up, what prepares its points, or the calls of some
    "nothing": {},
    "set-up of the first": {"set_up_s": {child.LLMBench: 60.0}},
    "set-up of the first, longer than the budget": {"set_up_s": {child.LLMBench: 150.0}},
    "preparing prompt parts": {"prepare_s": {PREFILL: 20.0}},
    "calls of the first": {"call_s": {wire.LLM: 15.0}},
    "calls of the vocoder": {"call_s": {wire.VOCODER: 15.0}},
}


@pytest.mark.parametrize("slow", SLOW)
def test_no_stage_is_left_without_its_points_because_another_is_slow(monkeypatch, slow):
    clock, said = Clock(), []
    profiler = _with_a_clock(monkeypatch, clock, said.append, **SLOW[slow])
    profiler.run()
    events = [event for event in said if isinstance(event, PointEvent)]
    points = {stage: [event.point for event in events if event.stage == stage] for stage in profiler.points}
    measured = {stage: sum(isinstance(point, StagePoint) for point in of) for stage, of in points.items()}
    slow_stages = {*SLOW[slow].get("prepare_s", ()), *SLOW[slow].get("call_s", ())}
    for stage, of in points.items():
        assert measured[stage] >= (1 if stage in slow_stages else len(of)), (stage, measured)
    set_up_s = sum(SLOW[slow].get("set_up_s", {}).values())
    assert clock.now_s < max(100, set_up_s) + 25 + 4 * 20  # with a floor for each stage and a slow first point


def _with_a_clock(monkeypatch, clock, say, *, set_up_s=(), prepare_s=(), call_s=()):
    """A profiler of a full grid and 100 s; stages take what is given, else milliseconds."""

    def method(stage):
        def of(bench, **at):
            def calls():
                while True:
                    clock.taking(dict(prepare_s).get(stage, 0.001))()
                    yield clock.taking(dict(call_s).get(stage, 0.01))

            return calls(), Cost(1e6, 1e6)

        return of

    def bench(real):
        def made(weights, roofline):
            clock.taking(dict(set_up_s).get(real, 0.1))()
            return SimpleNamespace(room_bytes=1, stage=SimpleNamespace(state_size=1))

        return made

    benches, names = {}, {}
    for real, methods in child.BENCHES.items():
        names[real] = bench(real)
        benches[names[real]] = {stage: method(stage) for stage in methods}
        monkeypatch.setattr(child, real.__name__, names[real])
    monkeypatch.setattr(child, "BENCHES", benches)
    monkeypatch.setattr(child, "free", lambda device: None)  # half a second each time beside all of pytest's objects
    monkeypatch.setattr(child, "device_speed", lambda *_: ({"bandwidth_gb_s": 1.0, "tflop_s": 1.0}, {}))
    profiler = child.Profiler(Weights(), budget_s=100, quick=False, say=say)
    profiler.sampler = Sampler(100, profiler.count + child.SPEED_POINTS, lambda: None, clock=clock)
    return profiler


def test_freeing_after_a_point_does_not_look_at_all_of_torch_again():
    """Each time it did took half a second, of every point's time."""
    code = (
        "import gc, harness.vibevoice.profiling.profiler as child\n"
        "child.Profiler.run = lambda self: print(len(gc.get_objects()))\n"
        "child.main(['--budget-seconds', '5', '--quick', '--device', 'cpu'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout.splitlines()[-1]) < 1000  # torch and transformers alone bring some hundred thousand


def test_the_context_before_a_prompt_part_is_filled_and_not_computed(monkeypatch):
    profiler = child.Profiler(Weights(plain=True), budget_s=5, quick=True, say=print)
    bench, computed = child.LLMBench(profiler.weights, profiler.roofline), []
    real = bench.stage.prefill
    monkeypatch.setattr(bench.stage, "prefill", lambda *given: computed.append(len(given[1])) or real(*given))
    calls, _ = bench.prefill(64, 7_600)
    lengths = []
    for call in itertools.islice(calls, 20):  # more than are timed of one session
        lengths.append(bench.stage.sessions.get(0).with_prompt.length)
        call()
    assert computed == [64] * 20
    assert all(length == pytest.approx(7_600, rel=1 / 8) for length in lengths)


@pytest.mark.parametrize("preset", ["1.5b", "7b"])
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_point_lies_in_the_models_context(preset, quick, device):
    longest = preset_config(preset).text_config.max_position_embeddings
    points = child.Grid.of(torch.device(device), quick).points(longest)
    assert set(points) == {*wire.STAGES, wire.VOICE, PREFILL} and all(points.values())
    assert all(child.STEPS_AT_ONCE < point["context"] <= 2 * longest for point in points[wire.LLM])
    assert all(point["context"] + point["tokens"] <= longest for point in points[PREFILL])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), NoRoom(f"{wire.BUSY}full")])
def test_a_point_without_room_is_left_out_and_the_next_one_measured(error):
    said = []
    profiler = child.Profiler(Weights(), budget_s=5, quick=True, say=said.append)
    profiler.speed = {"bandwidth_gb_s": 1.0, "tflop_s": 1.0}

    def failing(bench, batch):
        raise error

    def fine(bench, batch):
        return iter([lambda: None] * 3), Cost(1e6, 1e6)

    assert profiler._measured(failing, SimpleNamespace(), {"batch": 1}) == SkippedPoint(
        batch=1, left_out="out of memory"
    )
    assert profiler._measured(fine, SimpleNamespace(), {"batch": 1}).roofline_ms == 1.0


def test_a_context_that_no_room_holds_is_left_out_too(monkeypatch):
    monkeypatch.setattr(child, "_kv_room", lambda *_: 1 << 20)
    profiler = child.Profiler(Weights(), budget_s=600, quick=True, say=print)
    profiler.speed = {"bandwidth_gb_s": 1.0, "tflop_s": 1.0}
    bench = child.LLMBench(profiler.weights, profiler.roofline)
    at = {"batch": 1, "context": 7_600}  # 3.9 MB of KV cache
    assert profiler._measured(child.LLMBench.step, bench, at) == SkippedPoint(**at, left_out="out of memory")


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_room():
    profiler = child.Profiler(Weights(), budget_s=5, quick=True, say=print)

    def wrong(bench):
        raise RequestError("no session 7")

    with pytest.raises(RequestError, match="session 7"):
        profiler._measured(wrong, SimpleNamespace(), {})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    heard = []
    job = ProfileJob(preset="tiny", device="cpu", budget_s=8, quick=True)
    return measure(job, tmp_path_factory.mktemp("profiles"), heard.append), heard


def test_a_profile_holds_every_stage_beside_its_roofline_and_how_it_came_to_be(measured):
    path, heard = measured
    profile = read_profile(path)
    assert path.name.endswith("-tiny.json") and path.parent.joinpath(path.name) == path
    assert (profile.preset, profile.dtype, profile.schema) == ("tiny", "float32", 1)
    assert profile.model.hidden_size == 64 and profile.model.kv_bytes_per_token == 512
    points = [point for stage in profile.stages.values() for point in stage]
    assert len(points) == len(heard) == 16
    timed = [point for point in points if isinstance(point, StagePoint)]
    assert all(point.ms > 0 and point.roofline_ms > 0 and point.samples >= 1 for point in timed)
    assert all(point in timed or point.left_out == "no time left" for point in points)  # on a very busy machine
    assert all(isinstance(stage[0], StagePoint) for stage in profile.stages.values())
    assert all((point.device_ms, point.host_ms) == (point.ms, 0) for point in timed)  # a CPU is its own device
    assert {point.device_ms_from for point in timed} == {"cpu"}
    told = profile.manifest
    assert told.device_ms_from == {"cpu": len(timed)} and told.host.cores and told.versions["torch"]
    assert told.commit and told.created_at and told.weights and told.self_noise
    assert told.command.startswith("harness profile --preset tiny --device cpu")


def test_the_table_shows_milliseconds_and_roofline_of_every_point(measured):
    profile = read_profile(measured[0])
    more = (*profile.stages[wire.VOCODER], SkippedPoint(batch=64, left_out="out of memory"))
    profile = replace(profile, stages=profile.stages | {wire.VOCODER: more})
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    for table in tables(profile):
        console.print(table)
    shown = console.export_text()
    for points in profile.stages.values():
        for point in points:
            assert (point.left_out if isinstance(point, SkippedPoint) else f"{point.ms:.3g} (") in shown
    assert all(title in shown for title in ("LLM step", "prompt part", "diffusion", "vocoder", "voice encoder"))


@pytest.mark.parametrize(("source", "share"), [("profiler", "17%"), ("events", "17%*"), ("wall", None), ("cpu", None)])
def test_the_table_shows_the_devices_share_where_it_was_measured_within_80_columns(source, share):
    point = {"ms": 1214.2, "roofline_ms": 2.2234, "device_ms": 206.4, "device_ms_from": source}
    cells = [{"batch": b, "context": c, **point} for b in (1, 64) for c in child.Grid().contexts]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    sizes = {"hidden_size": 8, "kv_bytes_per_token": 8, "state_values": 8}
    profile = Profile.of({"device": "H200", "preset": "tiny", "model": sizes, "stages": {wire.LLM: cells}})
    (table,) = tables(profile)
    console.print(table)
    shown = console.export_text()
    assert shown.count("1214 (2.22)") == len(cells) and "…" not in shown
    assert shown.count("17%") == (len(cells) if share else 0)
    assert (share or "1214") in shown and ("the rest is host time" in shown) == bool(share)
    assert ("gaps" in shown) == (source == "events")


def test_a_profile_can_be_emulated_as_it_is(measured):
    profile = ProfiledTimes(measured[0])
    assert profile.step_ms([100, 100]) > 0 and profile.prefill_ms(64, 0) > 0 and profile.encode_ms(3) > 0
    assert profile.denoise_ms([10] * 4) > 0 and profile.vocode_ms(4) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_said_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no CUDA device"):
        measure(ProfileJob(device="cuda"), tmp_path, print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "point", [StagePoint(batch=1, context=0, ms=2.0, spread=0.1), SkippedPoint(seconds=3, left_out="no time left")]
)
def test_an_event_of_the_profiler_is_heard_as_it_was_said(point):
    event = PointEvent(stage=wire.LLM, point=point, done=1, of=2)
    assert event_of(event_line(event)) == event
    with pytest.raises(ValueError, match="it has no 'done', 'of'"):
        event_of('{"event": "point", "stage": "x", "point": {"left_out": ""}}')


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(ProfileJob, "command", lambda self: pytest.fail("it was started"))
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "profiles", Path("/proc/profiles")):
        with pytest.raises(InputError, match=f"cannot write to {folder}"):
            measure(ProfileJob(), folder, print)


def test_a_child_that_breaks_off_stores_nothing_and_its_words_are_told(tmp_path, monkeypatch):
    event = event_line(DeviceEvent(device="cpu", dtype="float32", bandwidth_gb_s=1.0, tflop_s=1.0, self_noise={}))
    code = f"print({event!r}); print('no such drive'); raise SystemExit(3)"
    monkeypatch.setattr(ProfileJob, "command", lambda self: [sys.executable, "-c", code])
    with pytest.raises(HarnessError, match=r"exit code 3\):\nno such drive"):
        measure(ProfileJob(), tmp_path, print)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_the_child_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-u", "-m", "harness", "profile", "--out", str(tmp_path / "profiles")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert "LLM step" in process.stdout.readline()
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert not still_running(family, 60)
    assert not (tmp_path / "profiles").exists()


def test_committed_profiles_can_be_read():
    for path in (ROOT / "results" / "profiles").glob("*.json"):
        assert read_profile(path).manifest.command.startswith("harness profile")
        assert ProfiledTimes(path).step_ms([400]) > 0


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_a_stored_profile_would_be_written_as_it_is(path, tmp_path):
    write_profile(tmp_path / "again.json", read_profile(path))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
