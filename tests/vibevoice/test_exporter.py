"""What a process exports to Triton's Prometheus page: what has changed, once, and that the counts add up."""

import subprocess
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import pytest

from harness import wire
from harness.errors import RequestError
from harness.server_metrics import (
    EXPORT_SECONDS,
    FIRST_AUDIO,
    FIRST_AUDIO_BUCKETS,
    FRAMES,
    KV_LIMIT,
    KV_PROMISED,
    KV_USED,
    ORPHANED,
    OUTCOMES,
    QUEUE_LENGTH,
    REQUESTS,
    SERVER_METRICS,
    SESSIONS,
    SESSIONS_LIMIT,
    STAGE_SESSIONS,
)
from harness.vibevoice.engine.loop import Counts
from harness.vibevoice.engine.step_metrics import step_readings
from harness.vibevoice.entry.tally import Tally
from harness.vibevoice.process import exporter as exporting
from harness.vibevoice.process.exporter import CountedHistogram, Exporter, Reading, session_readings
from harness.vibevoice.sessions.admission import AdmissionQueue, Busy
from harness.vibevoice.sessions.failures import ClientLeft, StageEnded
from harness.vibevoice.sessions.table import Sessions

OWNER = wire.ENTRY, "entry_0@0"


class Stream:
    frames = 0


class Page:
    """Stands where Triton's metric families are: ``values`` by name and labels, and the calls that made them."""

    def __init__(self):
        self.values, self.calls, self.families = {}, 0, Counter()

    def family(self, metric):
        self.families[metric.name] += 1
        return SimpleNamespace(Metric=lambda labels, buckets=(): self.metric(metric.name, labels, buckets))

    def counters(self, name, description):
        return SimpleNamespace(Metric=lambda labels: self.metric(name, labels))

    def metric(self, name, labels, buckets=()):
        key = name, *labels.values()
        self.values.setdefault(key, [] if buckets else 0)

        def call(change):
            def changed(value):
                self.calls += 1
                self.values[key] = change(self.values[key], value)

            return changed

        by_call = {
            "set": lambda _, new: new,
            "increment": lambda old, more: old + more,
            "observe": lambda old, x: [*old, x],
        }
        return SimpleNamespace(**{name: call(change) for name, change in by_call.items()})


@pytest.fixture
def page():
    return Page()


@pytest.fixture
def tally():
    return Tally(AdmissionQueue(places=4, limit=8, patience_s=1), OWNER)


def test_the_engine_tells_what_its_counts_have_grown_by_and_nothing_twice(page):
    counts = Counts()
    exporter = Exporter([lambda: step_readings(counts)], page.family)
    exporter.update()
    assert not page.calls
    counts.step(2, 5_000_000)
    counts.step(2, 7_000_000)
    counts.prompt_tokens, counts.prompt_ns = 40, 2_000_000_000
    exporter.update()
    exporter.update()
    counts.step(4, 1_000_000)
    exporter.update()
    assert page.values == {
        (wire.ENGINE_STEPS, "2"): 2,
        (wire.ENGINE_STEPS, "4"): 1,
        (wire.ENGINE_STEP_SECONDS, "2"): pytest.approx(0.012),
        (wire.ENGINE_STEP_SECONDS, "4"): pytest.approx(0.001),
        (wire.ENGINE_PROMPT_TOKENS,): 40,
        (wire.ENGINE_PROMPT_SECONDS,): 2.0,
    }
    assert page.calls == 6  # one call of the server for what has grown
    assert set(page.families.values()) == {1}


def test_every_series_is_there_before_the_first_request(page, tally):
    """Otherwise the first increase would be lost: Prometheus needs a value before it."""
    Exporter([tally.readings], page.family).update()
    assert {page.values[REQUESTS.name, outcome] for outcome in OUTCOMES} == {0} == {page.values[FRAMES.name,]}
    assert page.values[FIRST_AUDIO.name,] == []
    assert page.values[SESSIONS_LIMIT.name, *OWNER] == 4


def test_requests_frames_and_first_audio_add_up_whatever_becomes_of_the_requests(page, tally):
    exporter = Exporter([tally.readings], page.family)
    endings = {
        "done": None,
        "rejected": Busy(f"{wire.BUSY}no room"),
        "refused": RequestError(f"{wire.REFUSED}no such voice"),
        "failed": StageEnded("the stage ended"),
        "cancelled": ClientLeft(),
    }
    for frames, error in enumerate(endings.values()):
        stream = Stream()
        tally.begin(stream)
        if frames:
            tally.first_audio_s.append(frames / 10)
        stream.frames = frames
        exporter.update()
        tally.end(stream, error)
        exporter.update()
    asking = Stream()
    tally.begin(asking)
    tally.forget(asking)
    tally.end(asking, None)
    exporter.update()
    assert {outcome: page.values[REQUESTS.name, outcome] for outcome in OUTCOMES} == dict.fromkeys(endings, 1)
    assert page.values[FRAMES.name,] == 0 + 1 + 2 + 3 + 4
    assert page.values[FIRST_AUDIO.name,] == [0.1, 0.2, 0.3, 0.4]


def test_a_total_that_is_low_for_a_moment_is_not_counted_twice(page):
    totals = iter([5, 3, 6])
    exporter = Exporter([lambda: [Reading(FRAMES, next(totals))]], page.family)
    for _ in range(3):
        exporter.update()
    assert page.values[FRAMES.name,] == 6


def test_sessions_and_the_queue_are_those_of_the_admission_queue(page, tally):
    tally.queue.free = 1
    tally.queue._waiting.append(object())
    exporter = Exporter([tally.readings], page.family)
    exporter.update()
    assert page.values[SESSIONS.name, *OWNER] == 3 and page.values[QUEUE_LENGTH.name, *OWNER] == 1
    before, tally.queue.free = page.calls, 4
    exporter.update()
    exporter.update()
    assert page.values[SESSIONS.name, *OWNER] == 0 and page.calls == before + 1


def test_a_gauge_of_an_earlier_process_is_set_to_zero(page):
    page.values[SESSIONS.name, *OWNER] = 3  # its process was killed, and another one has its name
    Exporter([lambda: [Reading(SESSIONS, 0, OWNER)]], page.family).update()
    assert page.values[SESSIONS.name, *OWNER] == 0


def test_a_stage_tells_its_sessions_its_kv_cache_and_those_that_nobody_closed(page):
    now = [0.0]
    stage = SimpleNamespace(sessions=Sessions("stage", clock=lambda: now[0]), kv_limit_bytes=100)
    stage.kv_used_bytes, stage.kv_bytes = 7, 9
    stage.sessions.open(1, "idle")
    exporter = Exporter([lambda: session_readings(stage, OWNER)], page.family)
    exporter.update()
    now[0] = stage.sessions.idle_limit_s + 1
    stage.sessions.open(2, "next")
    exporter.update()
    names = STAGE_SESSIONS, ORPHANED, KV_USED, KV_PROMISED, KV_LIMIT
    assert [page.values[metric.name, *OWNER] for metric in names] == [1, 1, 7, 9, 100]
    stage.sessions.close(2)
    assert stage.sessions.orphaned == 1


def test_a_stage_without_a_kv_cache_tells_none(page):
    Exporter([lambda: session_readings(SimpleNamespace(sessions=Sessions("x")), OWNER)], page.family).update()
    assert {name for name, *_ in page.values} == {STAGE_SESSIONS.name, ORPHANED.name}


def test_a_histogram_of_counters_has_the_series_of_a_histogram(page):
    exporter = Exporter(
        [lambda: [Reading(FIRST_AUDIO, 0.3), Reading(FIRST_AUDIO, 500.0)]],
        lambda metric: CountedHistogram(metric, page.counters),
    )
    exporter.update()
    buckets = {le: count for (name, *le), count in page.values.items() if name.endswith("_bucket") for le in le}
    assert list(buckets) == [f"{most:g}" for most in FIRST_AUDIO_BUCKETS] + ["+Inf"]
    assert [buckets[le] for le in ("0.25", "0.5", "120", "+Inf")] == [0, 1, 1, 2]
    assert page.values[f"{FIRST_AUDIO.name}_sum",] == 500.3 and page.values[f"{FIRST_AUDIO.name}_count",] == 2


def test_what_exporting_costs_is_exported_too(page):
    exporter = Exporter([lambda: [Reading(FRAMES, sum(range(100_000)))]], page.family, OWNER)
    exporter.update()
    exporter.update()
    assert 0 < page.values[EXPORT_SECONDS.name, *OWNER] < 1


def test_frames_are_not_lost_between_threads(page, tally):
    """Each stream counts its own frames in its own thread while another one reads them all."""
    exporter, streams = Exporter([tally.readings], page.family), [Stream() for _ in range(8)]

    def speak(stream):
        for _ in range(2_000):
            stream.frames += 1

    threads = [threading.Thread(target=speak, args=(stream,)) for stream in streams]
    for stream, thread in zip(streams, threads, strict=True):
        tally.begin(stream)
        thread.start()
    while any(thread.is_alive() for thread in threads):
        exporter.update()
    for stream in streams:
        tally.end(stream, None)
        exporter.update()
    assert page.values[FRAMES.name,] == 16_000


def test_names_are_those_of_prometheus():
    assert len({metric.name for metric in SERVER_METRICS}) == len(SERVER_METRICS)
    for metric in SERVER_METRICS:
        assert metric.name.startswith("vibevoice_") and metric.about and not metric.about.endswith(".")
        engine = metric.name.startswith("vibevoice_engine_")  # older than the rule
        assert engine or metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram")


def test_a_process_that_ends_leaves_no_gauge_behind_and_loses_no_count(page, tally):
    exporter = Exporter([tally.readings], page.family)
    exporter.update()
    tally.queue.free, stream = 1, Stream()
    tally.begin(stream)
    exporter.update()
    stream.frames = 7
    exporter.close()
    gauges = [page.values[metric.name, *OWNER] for metric in (SESSIONS, SESSIONS_LIMIT, QUEUE_LENGTH)]
    assert gauges == [0, 0, 0] and page.values[FRAMES.name,] == 7


def test_gauges_that_the_end_of_an_earlier_process_set_to_zero_are_told_again(page, tally):
    """Triton ends the old process of a model after the new one has begun, and both have one name."""
    exporter = Exporter([tally.readings], page.family)
    exporter.update()
    page.values[SESSIONS_LIMIT.name, *OWNER] = 0
    for _ in range(4):
        exporter.update()
    assert page.values[SESSIONS_LIMIT.name, *OWNER] == 4


def test_nothing_is_told_to_a_server_that_is_gone(page, monkeypatch):
    """A call to it would never return, with the interpreter held: the process would be left behind for ever."""
    exporter = Exporter([lambda: [Reading(SESSIONS, 1, OWNER)]], page.family, OWNER)
    exporter.update()
    told = page.calls
    monkeypatch.setattr(exporting.os, "getppid", lambda: 1)
    exporter.update()
    exporter.close()
    assert told and page.calls == told


HANGS = """
import threading, time
from harness.vibevoice.process import exporter, hangs

hangs._HUNG_S, exporter.EVERY_S = 0.5, 0.05
exporter.Exporter([lambda: time.sleep(60)], None).keep_updated()
time.sleep(60)
"""


def test_a_process_that_hangs_in_a_call_ends():
    done = subprocess.run([sys.executable, "-c", HANGS], timeout=120, capture_output=True, text=True)
    assert done.returncode == 1 and "Timeout" in done.stderr


LOADS = """
import time
from harness.vibevoice.process import exporter, hangs

hangs._HUNG_S, exporter.EVERY_S = 0.5, 0.01
told = []
exporter.Exporter([lambda: told.append(1) or []], None).keep_updated()
while not told:
    time.sleep(0.01)
with hangs.long_call():
    before = len(told)
    time.sleep(1)
    assert len(told) == before  # none began: its timer would have ended this process
"""


def test_a_long_call_is_not_taken_for_one_that_hangs():
    done = subprocess.run([sys.executable, "-c", LOADS], timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


ENDS = """
import sys, threading, time
from types import SimpleNamespace
from harness.server_metrics import SESSIONS
from harness.vibevoice.process import exporter

exporter.EVERY_S, exporter._END_S = 0.01, float(sys.argv[2])
calls, called = [], threading.Event()

def one_call(value):
    in_thread = threading.current_thread() is not threading.main_thread()
    calls.append(in_thread)
    if in_thread:
        called.set()
        time.sleep(float(sys.argv[1]))

metric = SimpleNamespace(set=one_call)
readings = [exporter.Reading(SESSIONS, 1, ("model", str(i))) for i in range(1_000)]
one = exporter.Exporter([lambda: readings], lambda _: SimpleNamespace(Metric=lambda labels: metric))
one.keep_updated()
called.wait()
if sys.argv[3] == "finalize":
    one.close()
    print(sum(calls), one._thread.is_alive(), flush=True)
"""


def ended(*arguments):
    done = subprocess.run([sys.executable, "-c", ENDS, *arguments], timeout=120, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_an_exporter_ends_after_the_call_it_is_in_and_not_after_all_of_them():
    """On a busy host a call takes long; where the interpreter ended meanwhile, the process crashed."""
    assert ended("1.5", "60", "finalize") == (0, "1 False\n")
    assert ended("0.3", "60", "exit") == (0, "")


def test_a_process_whose_exporter_does_not_end_ends_without_its_interpreter():
    code, said = ended("60", "0.2", "finalize")
    assert code == 1 and "exporter has not ended in 0.2 s" in said and said.endswith("1 True\n")
