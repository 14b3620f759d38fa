"""Messages between a master and its workers: heard as they were sent, and refused by name if they are damaged."""

import math
from dataclasses import replace
from types import SimpleNamespace

import msgpack
import pytest
from test_user import result

from harness.client.replicas import ConnectionStatistics
from harness.drive.distributed import MasterTest, WorkerReport
from harness.drive.generator import UserClass
from harness.drive.options import settings_for
from harness.drive.readers.live_stats import Progress, Running
from harness.traffic.mix import MIXES

REPORT = WorkerReport(
    results=(result(),),
    progress=Progress(active=1, running=(Running("short", 0.2, 0.4, 0, 2.5, "r"),)),
    submitted=2,
    lost=0,
    lag_p99_s=0.001,
    connections=ConnectionStatistics(counted={"a:1": 3}),
    wall_ns=1,
    shares_servers_clock=True,
    record=settings_for({"rate_per_s": "1"}, [UserClass("user", MIXES["quick"])]).record(),
    done=False,
    failed="",
    pid=7,
)


def sent(report, **spoilt):
    return msgpack.unpackb(msgpack.packb(report.to_plain() | spoilt))


def test_a_report_of_a_worker_is_heard_as_it_was_sent():
    (heard,) = WorkerReport.from_plain(sent(REPORT)).results
    assert replace(heard, chunks=None) == replace(REPORT.results[0], chunks=None)
    assert replace(WorkerReport.from_plain(sent(REPORT)), results=()) == replace(REPORT, results=())
    assert math.isnan(WorkerReport.from_plain(sent(replace(REPORT, lag_p99_s=math.nan))).lag_p99_s)


SPOILT = {
    "submitted": ({"submitted": "many"}, "submitted: Input should be a valid integer"),
    "record": ({"record": {"loop": "open"}}, "it has no 'arrivals'"),
    "results": ({"results": [{"request_id": "r"}]}, "chunks"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_message_makes_the_test_invalid_once_and_does_not_end_it(name):
    changes, words = SPOILT[name]
    with pytest.raises((ValueError, KeyError), match=words):
        WorkerReport.from_plain(sent(REPORT, **changes))
    faults, master = [], object.__new__(MasterTest)
    master._running, master._unreadable = True, set()
    master.recorder = SimpleNamespace(add_fault=faults.append)
    for _ in range(2):
        master._hear(None, SimpleNamespace(data=sent(REPORT, **changes), node_id="w1"))
    (fault,) = faults
    assert "worker w1 sent a message that cannot be read" in fault and words in fault


def master_of(*workers):
    """A master that waits for these workers; ``ended`` counts how often it ended its test."""
    master, ended = object.__new__(MasterTest), []
    master._running, master._finishing, master._begun = True, False, False
    master._reports, master._shift_ns, master._wall_ns, master._expected = {}, {}, 1, set(workers)
    master._runner = SimpleNamespace(clients=workers)
    master.host_monitor = SimpleNamespace(count_as_own=lambda pid: None)
    master.end = lambda: ended.append(True)
    return master, ended


def test_the_test_ends_at_the_first_worker_that_refuses_it_and_never_begins():
    """Workers refuse a server with time dilation; the master does not wait through the whole -t."""
    master, ended = master_of("w1", "w2")
    why = "a server with time dilation needs a load from one Locust process"
    for worker in ("w1", "w2"):
        report = replace(REPORT, results=(), done=True, failed=why)
        master._hear(None, SimpleNamespace(data=sent(report), node_id=worker))
    assert ended == [True] and not master._begun


def test_a_test_does_not_begin_without_a_worker_that_refused_it():
    master, ended = master_of("w1", "w2")
    for worker, failed in (("w1", "no server"), ("w2", "")):
        report = replace(REPORT, results=(), failed=failed)
        master._hear(None, SimpleNamespace(data=sent(report), node_id=worker))
    assert ended == [True] and not master._begun
