"""What the attack's own instruments must not miss: a hanging client, a stall at the start, a zombie, a stolen call."""

import ctypes
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from fake_triton import Timetable, serving

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "model"))

import fuzz  # noqa: E402
import malformed  # noqa: E402
import storm  # noqa: E402
import victim as victims  # noqa: E402

from harness import wire  # noqa: E402
from harness.deploy.config import Deployment  # noqa: E402


@pytest.fixture
def frames(monkeypatch):
    monkeypatch.setattr(victims, "VICTIM_FRAMES", 3)


@pytest.mark.parametrize("stalled", [0, 1, 2], ids=["first chunk", "second chunk", "last chunk"])
def test_a_stall_before_any_chunk_counts(frames, stalled):
    with serving(Timetable(stalls={stalled: 0.4})) as fake:
        victim = victims.Victim(fake.url)
        victim._speak()
        assert victim.largest_gap_ms() >= 350 and victim.failures == []


def test_a_stall_that_is_not_over_counts(frames):
    with serving(Timetable(hang_after=1)) as fake:
        victim = victims.Victim(fake.url)
        victim.expected = np.zeros(3 * wire.SAMPLES_PER_FRAME, np.float32)
        victim._thread.start()
        time.sleep(0.6)
        assert victim.largest_gap_ms() >= 300
        victim._over.set()


def test_a_client_that_hangs_has_failed(frames, monkeypatch):
    monkeypatch.setattr(victims, "HANGS_S", 0.3)
    with serving(Timetable(hang_after=1)) as fake:
        victim = victims.Victim(fake.url)
        victim.expected = np.zeros(3 * wire.SAMPLES_PER_FRAME, np.float32)
        victim._thread.start()
        victim.__exit__()
        assert victim.failures == ["its stream has not ended 0.3 s after the attack"]


@pytest.fixture
def watched(monkeypatch):
    """A server of this process: its children are seen, a zombie among them."""
    child = subprocess.Popen([sys.executable, "-c", "input()", "name"], stdin=subprocess.PIPE)
    server = SimpleNamespace(
        pid=os.getpid(), alive=lambda: True, shm_prefix="nothing_", deployment=SimpleNamespace(models=()),
        metrics_url="http://server/metrics",
    )  # fmt: skip
    monkeypatch.setattr(fuzz.common, "held", lambda url: {"vibevoice_sessions": 0.0})
    yield child, fuzz.Watch(server, fuzz.Tally())
    child.kill()
    child.wait()


def test_a_zombie_is_a_crash_and_no_traceback(watched):
    child, watch = watched
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    assert watch.holds()["processes"] > 0
    watch.look("a request")
    watch.look("another")
    assert len(watch.tally.crashed) == 1 and "last: a request" in watch.tally.crashed[0]


@pytest.mark.parametrize("kind", ["stage", "bytes, infer", "control", "control RepositoryModelLoad"])
def test_whoever_is_served_past_the_entry_is_a_hijack(kind):
    tally = fuzz.Tally()
    tally.judge(kind, "refused")
    tally.judge(kind, None)
    assert tally.hijacks == []
    tally.judge(kind, "")
    assert tally.hijacks == [kind]


def test_raw_bytes_that_a_stage_serves_are_a_hijack(monkeypatch):
    """Every call of a server that serves whatever comes: each ModelInfer among them counts."""
    sent = []

    class Channel:
        def unary_unary(self, method):
            return lambda data, timeout: sent.append(method)

        def unary_stream(self, method, *_):
            return None

    monkeypatch.setattr(grpc, "insecure_channel", lambda url: Channel())
    monkeypatch.setattr(fuzz.service_pb2_grpc, "GRPCInferenceServiceStub", lambda channel: None)
    attacker = fuzz.Attacker("", 0, fuzz.Tally(), [1])
    for _ in range(50):
        attacker._bytes()
    infers = sum(method.endswith("/ModelInfer") for method in sent)
    assert len(attacker.tally.hijacks) == infers > 0


def test_what_grew_beyond_its_limit_is_a_leak_whatever_it_is():
    before = {"processes": 6, "threads": 90, "regions": 6, "memory": 1e9, "vibevoice_kv_promised_bytes": 0.0}
    assert fuzz.leaks(before, {**before, "threads": 122, "memory": 1e9 + fuzz.GROWTH_BYTES, "regions": 5}) == []
    grown = fuzz.leaks(before, {**before, "threads": 123, "regions": 7, "vibevoice_kv_promised_bytes": 4096.0})
    assert grown == ["threads: 90 to 123", "regions: 6 to 7", "vibevoice_kv_promised_bytes: 0 to 4,096"]


def test_requests_of_every_kind_are_sent():
    numbers = np.random.default_rng(0)
    inputs = {one.name for _ in range(300) for one in malformed.entry_message(numbers).inputs}
    assert inputs >= {one.name for one in Deployment().configs()[wire.ENTRY].input}
    called = {malformed.control_call(numbers)[0] for _ in range(300)}
    assert called >= {"RepositoryModelLoad", "LogSettings", "TraceSetting", "SystemSharedMemoryStatus"}


def test_time_in_which_the_client_could_not_run_is_no_gap(monkeypatch):
    monkeypatch.setattr(victims.threading.Thread, "start", lambda self: None)
    own = victims.OwnStalls()
    own._woke_s = 100.0
    own.note(1.0, 1.025)  # an ordinary wake-up
    own.note(2.0, 2.51)
    assert own.seconds(0.0, 1.9) == 0.0
    assert own.seconds(2.3, 3.0) == pytest.approx(0.21)
    assert own.seconds(1.0, 4.0) == pytest.approx(0.5)
    assert own.seconds(99.0, 101.0) == pytest.approx(0.99)  # it still cannot run


def test_a_client_whose_interpreter_is_held_is_no_stall_of_the_server(frames):
    """As by a call that does not release it; the server runs in another process."""
    fake = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "fake_triton.py"), "--interval", "0.05"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert fake.stdout is not None
    client = victims.Victim(fake.stdout.readline().split()[-1])
    hold = threading.Timer(0.05, lambda: ctypes.PyDLL(None).usleep(600_000))
    try:
        hold.start()
        client._speak()
        assert client.failures == [] and client.largest_gap_ms() < 300
    finally:
        hold.join()
        fake.kill()
        fake.wait()


def test_progress_is_told_while_requests_are_sent(monkeypatch):
    """Before, the first word came after a quarter of them: some minutes."""

    class Slow:
        last = ""

        def __init__(self, url, seed, tally, *_):
            self.tally = tally

        def attack(self, count):
            for _ in range(count):
                self.tally.judge("entry", "no")
                time.sleep(0.05)

    said, tally = [], fuzz.Tally()
    tally.judge("entry", "no")  # in an earlier part
    monkeypatch.setattr(fuzz, "Attacker", Slow)
    monkeypatch.setattr(fuzz, "PROGRESS_S", 0.1)
    monkeypatch.setattr(fuzz.common, "say", said.append)
    watch = SimpleNamespace(
        server=SimpleNamespace(deployment=SimpleNamespace(models=())), known={}, look=lambda _: None
    )
    fuzz.attack("nowhere", 40, 0, tally, watch)
    assert said and all(0 < int(line.split(" of 40 ")[0]) <= 40 for line in said)


@pytest.mark.parametrize("way", list(storm.WAYS.values()), ids=list(storm.WAYS))
def test_each_way_to_misbehave_goes_on_and_on(way):
    with serving(Timetable()) as fake:
        client = storm.Client(fake.url, 1)
        for _ in range(3):
            way(client)
        assert next(client.stream(storm.infer_message(storm.request("r")), timeout=20)).infer_response.outputs


def test_the_example_of_a_storm_names_a_way():
    (word,) = re.findall("--only '(.+?)'", storm.EXAMPLE)
    assert any(word in way for way in storm.WAYS)


@pytest.mark.parametrize("words", ["", "tritonserver ended by signal 6"])
def test_a_storm_tells_whether_the_server_ended(monkeypatch, words):
    monkeypatch.setattr(storm, "LAST_LOOK_S", 0)
    with serving(Timetable()) as fake:
        until_s = time.monotonic() + (0.2 if words else 60)
        alive = lambda: time.monotonic() < until_s  # noqa: E731
        server = SimpleNamespace(url=fake.url, pid=os.getpid(), alive=alive, last_words=lambda: words)
        found = storm.storm(server, storm.Client.refused_to_the_end, 0.5)
    assert found.ended == words and found.calls > 0 and found.seconds < (0.5 if words else 5)
