"""A tritonserver that crashed is not alive, also where its own handler of the crash hangs."""

import psutil
import pytest
from conftest import still_running, wait_for

from harness.deploy.config import Deployment
from harness.deploy.server import TritonServer
from harness.host.process_group import spawn

HANGS = "trap '' TERM; printf 'started\\n%s\\n' '{}'; sleep 600 & wait; wait"


@pytest.fixture
def server(tmp_path):
    server = TritonServer(Deployment("tiny"), root=tmp_path)
    server.folder.mkdir(parents=True)
    yield server
    if server._process:
        server._process.kill()
    server.stop()


def started(server, line):
    server._process = spawn(["sh", "-c", HANGS.format(line)], server.log)
    wait_for(lambda: "started" in server.log.read_text() and line in server.log.read_text())
    return server._process


@pytest.mark.parametrize("line", ["Signal (11) received.", "Signal (6) received."])
def test_one_that_hangs_after_a_crash_is_killed(server, line):
    process = psutil.Process(started(server, line).pid)
    group = [process, *process.children()]
    wait_for(lambda: not server.alive())
    assert not still_running(group, 60)
    assert line in server.last_words() or line in server.log.read_text()


def test_the_last_words_of_a_crash_are_what_was_said_before_the_stack(server):
    said = "E1 sync.cc:105] ASSERTION FAILED: prior > 0"
    stack = " 0# 0x0000560E52AF952D in tritonserver\n13# 0x00007F13BA9278EC in libc.so.6"
    server.log.write_text(f"started\n{said}\nSignal (6) received.\n{stack}\n\n")
    assert f"its last line: {said} / Signal (6) received.;" in server.last_words()


@pytest.mark.parametrize("line", ["Signal (15) received.", "a text about Signal (11) received."])
def test_one_that_is_asked_to_end_or_speaks_of_signals_is_not(server, line):
    started(server, line)
    assert server.alive()
    server._crashed_s = server._crashed_s and server._crashed_s - 60  # as if it had been a minute ago
    assert server.alive()
