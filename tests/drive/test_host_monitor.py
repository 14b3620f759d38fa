"""The host monitor sees the processes of a server come and go, and whose the processor time was."""

import math
import os
import socket
import subprocess
import sys
import time

import psutil

import harness.drive.host_monitor
from harness.drive.disturbance import HostSample
from harness.drive.host_monitor import LEADER_VARIABLE, HostMonitor

SERVER = """
import socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print(listener.getsockname()[1], child.pid, flush=True)
sys.stdin.read(1)
again = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print(again.pid, flush=True)
sys.stdin.read()
child.kill()
again.kill()
"""


def test_a_stage_process_that_died_and_came_back_is_listed():
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        port, child = map(int, server.stdout.readline().split())
        monitor = HostMonitor([port], interval_s=60)
        while not monitor.samples:
            time.sleep(0.01)
        psutil.Process(child).kill()
        server.stdin.write("x")
        server.stdin.flush()
        again = int(server.stdout.readline())
        record = monitor.close()
    finally:
        server.stdin.close()
        server.wait(60)
    account = record.summary(0, time.monotonic_ns())
    assert [f"process {again} " in event and "started" in event for event in account.server_events][-1]
    assert account.server_memory_bytes > 10**6 and 0 <= account.stolen_share <= account.stolen_share_max <= 1
    assert 0 <= account.other_share <= account.busy_share <= 1 + 1e-6 and account.cores == os.cpu_count()


SPINS = "import time\nend = time.monotonic() + 120\nwhile time.monotonic() < end: pass"


def spinning() -> psutil.Process:
    """A process that is no child of ours."""
    command = f"{sys.executable} -c '{SPINS}' >/dev/null 2>&1 & echo $!"
    return psutil.Process(int(subprocess.run(["sh", "-c", command], capture_output=True, text=True).stdout))


def watched(enough) -> tuple[HostSample, ...]:
    """Samples of this host, as soon as they are enough; a busy host needs longer."""
    monitor, deadline_s = HostMonitor([], interval_s=0.3), time.monotonic() + 60
    while not enough(monitor.samples) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return monitor.close().samples


def named_in(samples) -> set[int]:
    return {pid for each in samples for _, pid, _ in each.others}


def own_s(samples) -> float:
    """Seconds of the whole host that were the monitor's own."""
    used = [each.own_share * each.seconds for each in samples]
    return sum(each for each in used if not math.isnan(each))


def test_another_process_is_named_and_the_one_that_leads_the_trial_is_not(monkeypatch):
    other = spinning()
    try:
        named = named_in(watched(lambda samples: other.pid in named_in(samples)))
        monkeypatch.setenv(LEADER_VARIABLE, str(other.pid))
        least_s = 0.05 / (os.cpu_count() or 1)
        led = watched(lambda samples: len(samples) > 4 and own_s(samples) > least_s)
    finally:
        other.kill()
    assert other.pid in named and other.pid not in named_in(led)
    assert own_s(led) > least_s


def test_who_used_the_cpu_is_not_known_where_the_server_is_hidden(monkeypatch):
    """Behind a port that only forwards, such as that of a container, the server would count as others."""
    with socket.create_server(("127.0.0.1", 0)) as forwarder:
        port = forwarder.getsockname()[1]
        monkeypatch.setattr(harness.drive.host_monitor, "_FORWARDERS", (psutil.Process().name(),))
        monitor = HostMonitor([port], interval_s=0.3)
        while len(monitor.samples) < 4:
            time.sleep(0.05)
        record = monitor.close()
    assert record.load(0, time.monotonic_ns()) is None
    summary = record.summary(0, time.monotonic_ns())
    assert summary.other_share is None and summary.busy_share > 0 and summary.samples > 1


def test_without_a_server_here_only_the_host_is_looked_at():
    with socket.create_server(("127.0.0.1", 0)):
        monitor = HostMonitor([], interval_s=0.05)
        while len(monitor.samples) < 4:
            time.sleep(0.01)
        record = monitor.close()
    account = record.summary(0, time.monotonic_ns())
    assert account.samples >= 2 and account.server_memory_bytes == 0 and account.server_events == ()
