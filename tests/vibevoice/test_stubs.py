"""What the command lines of processes tell of the models of a server, and of whose they are."""

import os
import subprocess
import sys
import time

import pytest

from harness.errors import ServerError
from harness.vibevoice.process import stubs
from harness.vibevoice.process.stubs import Stub, own_server, stub_of, stubs_of


@pytest.fixture
def process(tmp_path):
    """A process with the command line of a stub that this one started."""
    adapter = tmp_path / "models" / "voice_encoder" / "1" / "model.py"
    adapter.parent.mkdir(parents=True)
    adapter.write_text("import time\ntime.sleep(60)\n")
    words = [str(adapter), "harness_1_ab", "16777216", "1048576", str(os.getpid()), str(tmp_path), "336"]
    started = subprocess.Popen(["backends/python/triton_python_backend_stub", *words], executable=sys.executable)
    yield started
    started.kill()
    started.wait()


def test_the_stubs_of_a_server_are_found_while_they_live(process):
    (found,) = [stub for stub in stubs_of(os.getpid()) if stub.pid == process.pid]
    assert (found.model, found.region, found.server) == ("voice_encoder", "harness_1_ab", os.getpid())
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - found.started_ns
    assert 0 <= age_ns < 60e9
    assert stub_of(os.getpid()) is None and stubs_of(os.getppid()) == []
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert stub_of(process.pid) is None
    process.wait()
    assert stub_of(process.pid) is None


def test_a_process_whose_server_has_ended_does_not_take_its_new_parent_for_one(monkeypatch):
    """Its key and its note would be those of process 1, which never ends, and stay for ever."""
    assert own_server() == os.getppid()
    monkeypatch.setattr(stubs, "stub_of", lambda pid: Stub(pid, "voice_encoder", "region", os.getppid()))
    assert own_server() == os.getppid()
    monkeypatch.setattr(stubs, "stub_of", lambda pid: Stub(pid, "voice_encoder", "region", 4_000_000))
    with pytest.raises(ServerError, match="4000000, has ended"):
        own_server()
