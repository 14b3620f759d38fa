"""A process that waits for its server in Triton's binding does not outlive the server."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.vibevoice.process.server_guard import ended_with

# As Triton's binding does, ``PyDLL`` holds the interpreter during a call: no thread of the process runs.
WATCHER = """
import ctypes, functools, json, os, sys
from pathlib import Path
from harness import wire
from harness.vibevoice.process import restarts
from harness.vibevoice.process.restarts import Note, Registry

folder = Path(sys.argv[1])
server = restarts.server_mark(os.getppid())
Registry(server, folder).put(Note(server, 2**22 + 1, "x_0_0", wire.VOCODER, json.dumps({}), 0), "dead")
restarts.Registry = functools.partial(Registry, folder=folder)

def load(model, config):
    (folder / "loads").touch()
    ctypes.PyDLL(None).sleep(600)

name = {"model_name": wire.VOICE, "model_instance_name": "voice_0", "model_instance_device_id": "0"}
restarts.attend({**name, "model_config": json.dumps({})}, load, None)
ctypes.CDLL(None).sleep(600)
"""
SERVER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@pytest.fixture(autouse=True)
def first_python(monkeypatch):
    """As in a stub: python3 on PATH is this environment's."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def within(seconds, holds):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def is_over(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def test_a_watcher_ends_with_its_server_although_it_is_having_a_model_loaded(tmp_path):
    server = subprocess.Popen([sys.executable, "-c", SERVER, WATCHER, str(tmp_path)])
    try:
        assert within(30, (tmp_path / "loads").exists), "no model is being loaded"
        family = psutil.Process(server.pid).children(recursive=True)
        assert len(family) == 2 and len(list(tmp_path.glob("*.model"))) == 2  # the watcher and its guard
        time.sleep(0.5)
        assert not any(map(is_over, family)), "it ended while its server runs"
        server.kill()
        server.wait()
        assert within(5, lambda: all(map(is_over, family))), "it waits for a server that has ended"
        assert [path.name for path in tmp_path.glob("*.model")] == ["dead.model"]
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in psutil.Process(server.pid).children():
                one.kill()
        server.kill()
        server.wait()


@pytest.mark.parametrize("raised", [None, ValueError])
def test_a_server_that_answers_leaves_its_process_as_it_was(tmp_path, raised):
    note = tmp_path / "note"
    note.touch()
    before = {child.pid for child in psutil.Process().children()}
    with contextlib.suppress(ValueError), ended_with(os.getppid(), [note]):
        (guard,) = [child for child in psutil.Process().children() if child.pid not in before]
        time.sleep(0.3)
        assert not is_over(guard)
        if raised:
            raise raised
    assert not guard.is_running() and note.exists()


def test_a_guard_ends_with_the_process_that_it_watches_and_keeps_its_note(tmp_path):
    """The note is how others learn that the process died."""
    note = tmp_path / "note"
    note.touch()
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from harness.vibevoice.process.server_guard import ended_with\n"
        "with ended_with(os.getppid(), [Path(sys.argv[1])]): print('guarded', flush=True); time.sleep(600)"
    )
    watched = subprocess.Popen([sys.executable, "-c", code, str(note)], stdout=subprocess.PIPE)
    assert watched.stdout is not None and watched.stdout.readline()
    (guard,) = psutil.Process(watched.pid).children()
    time.sleep(0.3)
    watched.kill()  # and not waited for: a zombie, as Triton's are
    assert within(5, lambda: is_over(guard)) and note.exists()
    watched.wait()
    watched.stdout.close()
