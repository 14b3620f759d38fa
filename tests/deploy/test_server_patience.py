"""How long a server may take to start, on a free host and on a crowded one."""

import os
import sys
import time
from pathlib import Path

import pytest

from harness.client.target import Target
from harness.deploy.config import Deployment
from harness.deploy.flags import MOST_STRETCH, START_S, server_flags
from harness.deploy.server import TritonServer, _AtRest
from harness.deploy.start_watch import StartWatch
from harness.errors import ServerError
from harness.host.process_group import end_group, spawn

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("load_per_cpu", "times"), [(0.1, 1.0), (2.0, 2.0), (50.0, 4.0)])
def test_a_server_that_gives_way_to_others_has_longer_to_start(monkeypatch, tmp_path, load_per_cpu, times):
    server = TritonServer(Deployment("tiny"), root=tmp_path)
    server.folder.mkdir(parents=True)
    server.url = "127.0.0.1:1"  # nobody listens
    server.target = Target.of(server.url)
    server._process = spawn(["sleep", "60"], server.log)
    load = load_per_cpu * len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    began_s = time.monotonic()
    try:
        with pytest.raises(ServerError, match=r"was not ready after \d+ s"):
            server._wait_ready(0.4, lambda: False)
    finally:
        waited_s = time.monotonic() - began_s
        server._process.kill()
        server.stop()
    assert 0.4 * times <= waited_s < 0.4 * times + 30


def test_triton_itself_waits_longer_for_its_processes_than_we_do_for_it():
    words = "python,stub-timeout-seconds="
    limit_s = next(flag.partition(words)[2] for flag in server_flags(Path("m"), Path("b")) if words in flag)
    assert float(limit_s) > START_S * MOST_STRETCH
    for page in ("docs/how-to/own-triton.md", "harness/report/sweep.html.j2"):
        assert f"{words}{limit_s} " in (ROOT / page).read_text()


RESTS = "import time; time.sleep(60)"
WORKS = "while True: pass"
WITH_CHILD = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {WORKS!r}]); time.sleep(60)"


@pytest.mark.parametrize(("program", "rests"), [(RESTS, True), (WORKS, False), (WITH_CHILD, False)])
def test_a_start_is_at_rest_when_no_process_of_it_does_anything(tmp_path, program, rests):
    process = spawn([sys.executable, "-c", program], tmp_path / "log")
    try:
        time.sleep(2.0)
        watch, until_s = StartWatch(process.pid, patience_s=1.0), time.monotonic() + 3.0
        found = False
        while not found and time.monotonic() < until_s:
            found = watch.is_at_rest()
            time.sleep(0.05)
    finally:
        end_group(process, 0.0)
    assert found == rests


def test_a_server_that_came_to_rest_while_it_started_is_started_again(monkeypatch, tmp_path):
    server, runs = TritonServer(Deployment("tiny"), root=tmp_path), []

    def run(*_):
        runs.append(1)
        if len(runs) < 3:
            raise _AtRest("it waits")

    monkeypatch.setattr(server, "_run", run)
    server._run_until_ready(None, [], 1.0, lambda: False)
    assert len(runs) == 3
    monkeypatch.setattr(server, "_run", lambda *_: (_ for _ in ()).throw(_AtRest("it waits")))
    with pytest.raises(ServerError, match="it waits"):
        server._run_until_ready(None, [], 1.0, lambda: False)
