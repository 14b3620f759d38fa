"""Reader processes: every request that goes in comes back as one Result, whatever dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_triton
import psutil
import pytest
from fake_triton import Timetable, serving
from network import Network
from replicas import Replica

from harness.client.target import Target
from harness.drive.readers.pool import POLLING, PROCESS, ReaderPool
from harness.errors import InputError, ServerError
from harness.records.schema import Outcome, Request

ROOT = Path(__file__).resolve().parents[2]
FAR_NS = 3600 * 10**9


def request(number: int, frames: int = 5, due_ns: int = 0) -> Request:
    return Request(f"r{number}", "short", "Speaker 1: Hi there.", (0,), frames, due_ns=due_ns)


def readers_left() -> list[psutil.Process]:
    """Reader processes of this one; other tests of it may keep a server."""
    return [each for each in psutil.Process().children(recursive=True) if is_reader(each)]


def is_reader(process: psutil.Process) -> bool:
    try:
        return PROCESS in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def test_every_request_comes_back_once():
    seen = []
    with serving(Timetable()) as fake:
        pool = ReaderPool(fake.url, processes=2)
        assert len(readers_left()) == 2
        tickets = [pool.submit(request(i, frames=1 + i % 7), "closed", seen.append) for i in range(40)]
        results = [ticket.wait() for ticket in tickets]
        pool.close()
    assert [result.request_id for result in results] == [f"r{i}" for i in range(40)]
    assert all(result.outcome is Outcome.DONE and len(result.chunks) == result.frames for result in results)
    assert sorted(each.request_id for each in seen) == sorted(result.request_id for result in results)
    assert (pool.submitted, pool.returned, pool.lost) == (40, 40, 0)
    assert pool.progress().samples == sum(int(result.chunks.samples.sum()) for result in results)
    assert readers_left() == []


def test_nothing_is_sent_before_it_is_due():
    with serving(Timetable()) as fake:
        pool = ReaderPool(fake.url)
        due_ns = time.monotonic_ns() + 200_000_000
        results = [pool.submit(request(i, due_ns=due_ns + i), "open").wait() for i in range(3)]
        pool.close()
    assert all(result.sent_ns >= result.due_ns == due_ns + i for i, result in enumerate(results))
    assert pool.lag_p99_s >= 0


def test_closing_cuts_off_what_runs_and_withdraws_what_is_not_due():
    with serving(Timetable(hang_after=2)) as fake:
        pool = ReaderPool(fake.url)
        running = pool.submit(request(0), "open")
        ahead = pool.submit(request(1, due_ns=time.monotonic_ns() + FAR_NS), "open")
        while pool.progress().samples < 2 * 3200:
            threading.Event().wait(0.01)
        pool.close(grace_s=0)
    assert (running.result.outcome, len(running.result.chunks)) == (Outcome.UNFINISHED, 2)
    assert (ahead.result.outcome, ahead.result.sent_ns) == (Outcome.UNFINISHED, 0)
    assert (pool.submitted, pool.returned) == (2, 2)


def test_within_the_grace_requests_may_finish():
    with serving(Timetable(first_s=0.1)) as fake:
        pool = ReaderPool(fake.url)
        ticket = pool.submit(request(0), "open")
        pool.close(grace_s=30)
    assert ticket.result.outcome is Outcome.DONE


def test_a_second_close_shortens_the_grace():
    with serving(Timetable(hang_after=1)) as fake:
        pool = ReaderPool(fake.url)
        ticket = pool.submit(request(0), "open")
        while not fake.requests:
            threading.Event().wait(0.01)
        closing = threading.Thread(target=pool.close, args=(3600,))
        closing.start()
        pool.close(grace_s=0)
        closing.join(120)
        assert not closing.is_alive()
    assert ticket.result.outcome is Outcome.UNFINISHED


def test_a_cancelled_request_says_so():
    with serving(Timetable(hang_after=0)) as fake:
        pool = ReaderPool(fake.url)
        running = pool.submit(request(0), "open")
        ahead = pool.submit(request(1, due_ns=time.monotonic_ns() + FAR_NS), "open")
        for ticket in (running, ahead):
            ticket.cancel()
            assert ticket.wait(120).outcome is Outcome.CANCELLED
        assert ahead.result.sent_ns == 0
        pool.close()


def test_a_reader_that_dies_makes_errors_of_its_requests():
    with serving(Timetable(hang_after=1)) as fake:
        pool = ReaderPool(fake.url)
        tickets = [pool.submit(request(i), "open") for i in range(3)]
        pool._readers[0].process.kill()
        results = [ticket.wait(120) for ticket in tickets]
        late = pool.submit(request(3), "open").wait(120)
        pool.close()
    for result in (*results, late):
        assert result.outcome is Outcome.ERROR and "died (exit code -9)" in result.error
    assert (pool.submitted, pool.returned, pool.lost) == (4, 0, 4)


def test_a_server_that_is_killed_makes_an_error_of_each_running_request():
    with serving(Timetable(hang_after=1)) as fake:
        pool = ReaderPool(fake.url)
        tickets = [pool.submit(request(i), "open") for i in range(5)]
        while pool.progress().samples < 5 * 3200:
            threading.Event().wait(0.01)
        fake.kill()
        results = [ticket.wait(120) for ticket in tickets]
        pool.close()
    assert all(result.outcome is Outcome.ERROR and len(result.chunks) == 1 for result in results)
    assert pool.returned == 5


def test_several_readers_spread_their_requests_over_several_servers():
    with serving(Timetable()) as one, serving(Timetable()) as other:
        pool = ReaderPool(f"{one.url},{other.url}", processes=2)
        targets = [pool.submit(request(i), "closed").wait(120).target for i in range(8)]
        pool.close()
    assert targets == [one.url, other.url, other.url, one.url] * 2  # each reader begins with another server
    assert (len(one.requests), len(other.requests), pool.lost) == (4, 4, 0)
    connections = pool.connections
    assert connections.served == {one.url: 4, other.url: 4} and connections.remembered == connections.served
    assert not any((+connections.reconnects, +connections.passed_over, connections.forgotten))


def test_a_connection_that_is_made_again_is_counted_once():
    with serving(Timetable(hang_after=1)) as fake, Network(fake.url) as network:
        pool = ReaderPool(network.url)
        ticket = pool.submit(request(0), "open")
        while not pool.progress().samples:
            threading.Event().wait(0.01)
        network.close()
        assert ticket.wait(120).outcome is Outcome.ERROR
        again = pool.submit(request(1), "open")
        while len(fake.requests) < 2:
            threading.Event().wait(0.01)
        pool.close()
    assert again.result.outcome is Outcome.UNFINISHED and pool.connections.reconnects == {network.url: 1}


def test_what_is_secret_reaches_the_server_and_no_command_line(monkeypatch):
    monkeypatch.setattr(fake_triton, "FakeTriton", Replica)
    with serving(Timetable()) as fake:
        pool = ReaderPool(Target.of(fake.url, headers=(("authorization", "Bearer s3cret"),)))
        seen = psutil.Process(pool._readers[0].process.pid)
        shown = [*seen.cmdline(), *seen.environ().values()]
        assert pool.submit(request(0), "open").wait(120).outcome is Outcome.DONE
        pool.close()
    assert fake.headers and all(each["authorization"] == "Bearer s3cret" for each in fake.headers)
    assert not any("s3cret" in each for each in shown)


def test_a_listener_that_fails_does_not_stop_the_others():
    with serving(Timetable()) as fake:
        pool = ReaderPool(fake.url)
        assert pool.submit(request(0), "open", lambda result: 1 / 0).wait(120).outcome is Outcome.DONE
        assert pool.submit(request(1), "open").wait(120).outcome is Outcome.DONE
        pool.close()


def test_a_request_that_cannot_be_written_is_an_error_not_a_crash():
    with serving(Timetable()) as fake:
        pool = ReaderPool(fake.url)
        result = pool.submit(request(0, frames=2**40), "open").wait(120)
        pool.close()
    assert (result.outcome, result.error) == (Outcome.ERROR, f"frames {2**40} does not fit Triton's INT32")


def test_an_unusable_pool_leaves_no_process():
    for url, processes, error in (("127.0.0.1:9", 2, ServerError), ("http://x", 1, InputError), ("x:1", 0, InputError)):
        with pytest.raises(error):
            ReaderPool(url, processes)
    assert readers_left() == []


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
if sys.argv[3] == "gevent":
    from gevent import monkey
    monkey.patch_all()
from harness.drive.readers.pool import POLLING, ReaderPool
from harness.records.schema import Request
pool = ReaderPool(sys.argv[2])
tickets = [pool.submit(Request(f"r{i}", "short", "Speaker 1: Hi.", (0,), 5), "open") for i in range(9)]
if sys.argv[3] == "gevent":
    print([str(ticket.wait().outcome) for ticket in tickets].count("done"))
    pool.close()
else:
    print(pool._readers[0].process.pid, flush=True)
    time.sleep(3600)
"""


def test_the_pool_works_under_gevent():
    with serving(Timetable()) as fake:
        command = [sys.executable, "-c", CHILD, str(ROOT), fake.url, "gevent"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.stdout.strip(), done.stderr) == ("9", "")


def test_a_reader_does_not_outlive_a_killed_load_generator():
    with serving(Timetable(hang_after=1)) as fake:
        command = [sys.executable, "-c", CHILD, str(ROOT), fake.url, "threads"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            reader = psutil.Process(int(parent.stdout.readline()))
            os.kill(parent.pid, signal.SIGKILL)
        gone, alive = psutil.wait_procs([reader], timeout=120)
    assert not alive


def test_a_reader_polls_sparingly_unless_the_user_says_otherwise(monkeypatch):
    for said, polling in (("", POLLING), ("-event_engine_dns", "-event_engine_dns")):
        if said:
            monkeypatch.setenv("GRPC_EXPERIMENTS", said)
        with serving(Timetable()) as fake:
            pool = ReaderPool(fake.url)
            assert psutil.Process(pool._readers[0].process.pid).environ()["GRPC_EXPERIMENTS"] == polling
            pool.close()
