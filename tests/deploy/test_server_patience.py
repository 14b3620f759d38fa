"""How long a server may take to start, on a free host and on a crowded one."""

import os
import time
from pathlib import Path

import pytest

from harness.client.target import Target
from harness.deploy.config import Deployment
from harness.deploy.flags import MOST_STRETCH, START_S, server_flags
from harness.deploy.server import TritonServer
from harness.errors import ServerError
from harness.host.process_group import spawn


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
    """Where its own limit passes first, it waits for ever for a process that it does not tell to end (2.51)."""
    words = "python,stub-timeout-seconds="
    limit_s = next(flag.partition(words)[2] for flag in server_flags(Path("m"), Path("b")) if words in flag)
    assert float(limit_s) > START_S * MOST_STRETCH
