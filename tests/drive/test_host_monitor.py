"""The host monitor sees the processes of a server come and go, and whose the processor time was."""

import os
import socket
import subprocess
import sys
import time

import psutil

from harness.drive.host_monitor import HostMonitor

SERVER = """
import socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(listener.getsockname()[1], child.pid, flush=True)
sys.stdin.read(1)
again = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
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
        server.wait(10)
    account = record.summary(0, time.monotonic_ns())
    assert [f"process {again} " in event and "started" in event for event in account.server_events][-1]
    assert account.server_memory_bytes > 10**6 and 0 <= account.stolen_share <= account.stolen_share_max <= 1
    assert 0 <= account.other_share <= account.busy_share <= 1 + 1e-6 and account.cores == os.cpu_count()


def test_without_a_server_here_only_the_host_is_looked_at():
    with socket.create_server(("127.0.0.1", 0)):
        monitor = HostMonitor([], interval_s=0.05)
        while len(monitor.samples) < 3:
            time.sleep(0.01)
        record = monitor.close()
    account = record.summary(0, time.monotonic_ns())
    assert account.samples >= 2 and account.server_memory_bytes == 0 and account.server_events == ()
