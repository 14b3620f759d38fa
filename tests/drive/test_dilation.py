"""Time dilation of a load: requests leave later, Results are undilated, and the host must not be too busy."""

import asyncio
import time
from contextlib import contextmanager
from types import SimpleNamespace

import grpc
import pytest
from fake_triton import Timetable, serving

from harness import wire
from harness.client.stream import SpeechClient
from harness.client.target import Target
from harness.clock import HOST, Clock
from harness.device_profile import StagePoint
from harness.drive.dilation import AIM, FACTORS, Crowd, await_speech, is_steady, real_time_sessions, smallest_factor
from harness.drive.disturbance import HostLoad, HostSample
from harness.drive.generator import LoadSettings
from harness.drive.host_monitor import HostRecord, _on_clock
from harness.drive.load_report import report_of
from harness.drive.observed import Observed, ReaderTotals
from harness.drive.readers.pool import ReaderPool
from harness.drive.recorder import Recorder
from harness.drive.validity import unhurried
from harness.errors import ServerError
from harness.records.metrics import per_request
from harness.records.schema import Outcome, Request
from harness.traffic.mix import MIXES, ScriptSource

SLOWER = 20.0


def request(number=0, due_ns=0):
    return Request(f"r{number}", "short", "Speaker 1: Hi there.", (0,), 5, due_ns=due_ns)


def test_a_client_finds_out_and_its_result_is_undilated():
    """A server that takes 0.2 s to its first chunk, and 0.1 s for each later one, on a host where time is dilated."""

    async def speak(url):
        async with SpeechClient(url) as client:
            await client.ready()
            assert client.clock == Clock(SLOWER)
            return await client.speak(request(due_ns=client.clock.now_ns()), "closed")

    with serving(Timetable(first_s=0.2, interval_s=0.1, dilation=SLOWER)) as fake:
        result = asyncio.run(speak(fake.url))
    row = per_request([result]).iloc[0]
    assert result.outcome is Outcome.DONE
    ttfa_s, rtf = 0.2 / SLOWER, 0.1 / SLOWER / wire.SECONDS_PER_FRAME
    most = SLOWER / 2  # a busy host is later; undilated figures are SLOWER times these
    assert 0.75 * ttfa_s <= row["ttfa_s"] < most * ttfa_s and 0.75 * rtf <= row["rtf"] < most * rtf
    assert result.sent_ns >= result.due_ns and (result.chunks.received_ns >= result.chunks.sent_at_ns).all()


def test_requests_leave_when_they_are_due_on_the_dilated_clock():
    with serving(Timetable(dilation=SLOWER)) as fake:
        pool = ReaderPool(fake.url)
        began_s, due_ns = time.monotonic(), pool.clock.now_ns() + 20_000_000
        results = [pool.submit(request(i, due_ns=due_ns + i * 5_000_000), "open") for i in range(3)]
        results = [ticket.wait() for ticket in results]
        took_s = time.monotonic() - began_s
        pool.close()
    assert pool.clock == Clock(SLOWER) and took_s >= 0.03 * SLOWER
    assert [result.due_ns - due_ns for result in results] == [0, 5_000_000, 10_000_000]
    late_ns = [result.sent_ns - result.due_ns for result in results]
    assert all(0 <= each < 100_000_000 for each in late_ns)  # 2 s of the host; dilated twice it would be 0.38 s
    assert pool.lag_p99_s < 0.1  # of the dilated clock


def test_a_grace_is_of_the_dilated_clock():
    with serving(Timetable(first_s=1.0, dilation=SLOWER)) as fake:
        pool = ReaderPool(fake.url)
        ticket = pool.submit(request(), "open")
        pool.close(grace_s=0.5)  # 10 s of the host
    assert ticket.result.outcome is Outcome.DONE


def test_samples_of_the_host_are_on_the_clock_of_the_servers():
    samples = [HostSample(round(at_s * 1e9), 1.0, 0.0, 0.5, 0.4, 0.1) for at_s in (100, 101, 102)]
    record = HostRecord(tuple(_on_clock(each, Clock(2.0)) for each in samples), cores=2)
    load = record.load(50 * 10**9, 51 * 10**9)
    assert load and (load.own, load.others) == (pytest.approx(0.8), pytest.approx(0.2))
    assert record.summary(50 * 10**9, 51 * 10**9).busy_share == 0.5


@pytest.mark.parametrize(("own", "others", "at", "factor"), [(0.5, 0.0, 10, 5), (1.0, 0.0, 10, 10), (0.5, 0.6, 10, 12)])
def test_the_smallest_factor_leaves_the_host_room(own, others, at, factor):
    load = HostLoad(cores=2, own=own, others=others, stolen=0.0, felt=0.0)
    assert smallest_factor(load, at) == factor in FACTORS
    assert at * own / 2 / factor + others / 2 <= AIM


def test_a_busy_host_makes_a_dilated_test_invalid():
    assert unhurried(0.59, 20.0).passed and unhurried(None, 20.0).passed is None
    gate = unhurried(0.8, 20.0)
    assert (
        gate.passed is False
        and "used 80% of this host with time dilated 20 times" in gate.says
        and "--dilate" in gate.says
    )


def test_as_many_sessions_are_tried_as_keep_pace_with_speech():
    def points(each_ms, steps=None):
        return [StagePoint(batch=b, steps=steps, ms=b * each_ms) for b in (1, 2, 4, 8)]

    stages = {wire.LLM: points(10), wire.DIFFUSION: points(10, steps=10), wire.VOCODER: points(10)}
    profile = SimpleNamespace(timed=stages.__getitem__)
    assert real_time_sessions(profile) == 4
    slow = SimpleNamespace(timed=lambda stage: points(100, steps=10))
    assert real_time_sessions(slow) == 1


def test_a_request_without_a_result_is_on_the_clock_too():
    with serving(Timetable(dilation=SLOWER)) as fake:
        pool = ReaderPool(fake.url)
        ahead = pool.submit(request(due_ns=pool.clock.now_ns() + 10**12), "open")
        ahead.cancel()
        result, now_ns = ahead.wait(120), pool.clock.now_ns()
        pool.close()
    assert result.sent_ns == 0 and abs(now_ns - result.ended_ns) < 10**9


WITHHELD = [
    (grpc.StatusCode.UNIMPLEMENTED, ""),
    (grpc.StatusCode.PERMISSION_DENIED, "not for you"),
    (grpc.StatusCode.UNAVAILABLE, "This protocol is restricted, expecting header 'triton-grpc-protocol-key'"),
]


async def ready(url):
    async with SpeechClient(url) as client:
        await client.ready()
        return client.clock, (await client.replicas.connection_statistics()).clockless


@pytest.mark.parametrize("error", WITHHELD)
def test_a_server_that_withholds_its_configuration_is_taken_to_be_undilated_and_noted(error):
    with serving(Timetable(dilation=SLOWER, config_error=error)) as fake:
        assert asyncio.run(ready(fake.url)) == (HOST, {fake.url: 1})


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND])
def test_a_server_whose_configuration_cannot_be_read_is_not_ready(code):
    with serving(Timetable(config_error=(code, "out of order"))) as fake:
        with pytest.raises(ServerError, match="time dilation is not known: .*out of order"):
            asyncio.run(ready(fake.url))


@pytest.mark.parametrize(("emulated", "valid"), [(True, False), (False, True)])
def test_a_test_of_emulated_gpus_is_invalid_where_their_clock_is_not_known(emulated, valid):
    with serving(Timetable(emulated=emulated, config_error=WITHHELD[0])) as fake:
        pool, recorder = ReaderPool(fake.url), Recorder(LoadSettings(MIXES["quick"]), Target.of(fake.url), None)
        recorder.all_users_run(recorder.start_ns)
        recorder.take(pool.submit(request(due_ns=recorder.start_ns), "closed").wait(120))
        pool.close()
    totals = ReaderTotals(1, pool.lost, pool.lag_p99_s, pool.connections)
    observed = recorder.observed(time.monotonic_ns(), totals, HostRecord())
    certificate = report_of(observed).certificate
    said = "does not give its configuration"
    assert (not any(said in gate.says for gate in certificate.gates if gate.passed is False)) is valid
    assert any(said in note for note in certificate.notes) is valid


def test_the_share_of_this_host_says_nothing_about_a_server_on_another():
    samples = tuple(HostSample(at_s * 10**9, 1.0, 0.0, 0.9, 0.9, 0.0) for at_s in range(1, 6))

    def gate_of(*addresses):
        observed = Observed(
            LoadSettings(MIXES["quick"]), Target.of(",".join(addresses)), (), 10**9, 5 * 10**9,
            host=HostRecord(samples, cores=2), dilation=SLOWER,
        )  # fmt: skip
        gates = report_of(observed).certificate.gates
        return next(gate for gate in gates if gate.name == "host share")

    assert gate_of("127.0.0.1:8001").passed is False
    for others in (("192.0.2.1:8001",), ("127.0.0.1:8001", "192.0.2.1:8001")):
        gate = gate_of(*others)
        assert gate.passed is None and "another host" in gate.says


@contextmanager
def crowd_at(timetable, sessions=3):
    with serving(timetable) as fake:
        pool = ReaderPool(fake.url)
        crowd = Crowd(pool, MIXES["shorts"], ScriptSource())
        try:
            crowd.begin(sessions)
            yield fake, pool, crowd
        finally:
            crowd.end()
            pool.close()


def test_the_host_is_watched_only_once_every_session_speaks():
    with crowd_at(Timetable(first_s=1.5, interval_s=0.01)) as (_, pool, crowd):
        assert crowd.silent == 3
        await_speech(crowd, pool)
        assert crowd.silent == 0


def test_no_dilation_is_chosen_while_sessions_are_silent(monkeypatch):
    monkeypatch.setattr("harness.drive.dilation.OPEN_S", 2.0)
    with crowd_at(Timetable(hang_after=0)) as (_, pool, crowd):
        with pytest.raises(ServerError, match="after 2 s .* 3 sessions have sent no audio"):
            await_speech(crowd, pool)


def test_a_user_whose_session_ends_begins_another_and_one_without_room_does_not_count():
    with crowd_at(Timetable()) as (fake, pool, crowd):
        await_speech(crowd, pool)
        while len(fake.requests) <= 6:
            time.sleep(0.01)
    with crowd_at(Timetable(fail_after=0, error=f"{wire.BUSY}no room")) as (fake, pool, crowd):
        await_speech(crowd, pool)
        assert len(fake.requests) == 3
    with crowd_at(Timetable(fail_after=0)) as (_, pool, crowd):
        with pytest.raises(ServerError, match="a request failed: .*ran out of memory"):
            await_speech(crowd, pool)


def test_a_rate_is_steady_once_enough_readings_lie_near_their_mean():
    assert is_steady((10.0, 10.2, 9.9, 10.1)) and not is_steady((10.0, 10.0, 10.0))
    assert not is_steady((2.0, 5.0, 8.0, 10.0)) and not is_steady((0.0,) * 4)
