"""One real Triton server for all tests that need one."""

import asyncio
import contextlib
import fcntl
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import interpreter
import psutil
import pytest
from hypothesis import HealthCheck, settings

from harness.client.stream import SpeechClient
from harness.deploy.server import serving
from harness.records.schema import Request

ROOT = Path(__file__).resolve().parents[1]
SERVER_MARK = "mark.server"
pytest_plugins = ("service_fixtures", "stuck")
settings.register_profile(  # a busy machine is no failure
    "no deadline", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("no deadline")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background: what tests start would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Two workers share few cores, and threads of OpenMP that wait for small tasks take whole ones. Before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
HAS_GPU = Path("/proc/driver/nvidia").exists()
with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
    # Triton's functions are for its interpreter or for its compiler from the first import on, which comes with
    # transformers in many tests. Set for the import only: processes that tests start are to compile.
    patch.setenv("TRITON_INTERPRET", "" if HAS_GPU else "1")
    importlib.import_module("triton")
    if not HAS_GPU:
        interpreter.hasten()
# Tests that run side by side disturb each other; those of the limit set it themselves.
os.environ.setdefault("LOCUST_MAX_OTHERS", "1e9")
os.environ.pop("COLUMNS", None)  # set to 80 in pytest-xdist's workers; a console keeps what it finds when it is made


def pytest_ignore_collect(collection_path, config):
    """Where only tests with the server run, other files are not imported: that takes longer than many tests."""
    if config.option.markexpr.startswith("server") and collection_path.match("test_*.py"):
        return True if SERVER_MARK not in collection_path.read_text() else None
    return None


def pytest_collection_modifyitems(items):
    lost = {item.path for item in items if item.get_closest_marker("server")}
    if lost := [str(path) for path in lost if SERVER_MARK not in path.read_text()]:
        raise pytest.UsageError(f"{', '.join(lost)}: `make test` finds server tests by {SERVER_MARK!r} in their file")


@pytest.fixture(scope="session", autouse=True)
def a_home_of_its_own(tmp_path_factory):
    """Keys that last are of users, not of tests; processes that tests start inherit this."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True)
def a_host_of_its_own(request, monkeypatch, tmp_path_factory):
    """Sign-offs of tests that run side by side measure nothing: one need not wait for another."""
    if (job := sys.modules.get("harness.signoff")) and not request.node.get_closest_marker("server"):
        monkeypatch.setattr(job, "LOCK_FOLDER", tmp_path_factory.getbasetemp())


@pytest.fixture
def the_only_sign_off(tmp_path_factory):
    """A second sign-off on a host is refused: that of another process of pytest is waited for."""
    with open(tmp_path_factory.getbasetemp().parent / "sign-off.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def triton(tmp_path_factory):
    """A running ``TritonServer`` at preset tiny; a test that reloads a stage puts it back."""
    with serving(root=tmp_path_factory.mktemp("triton")) as server:
        yield server


@pytest.fixture(autouse=True)
def a_server_that_lives(request):
    """Triton (2.51) may end after a reload, of a lock that the old process of a model held: it is started again."""
    server = request.getfixturevalue("triton") if "triton" in request.fixturenames else None
    if server is not None and not server.alive() and "lock_exception" in server.log.read_text(errors="replace"):
        server.restart()


@pytest.fixture
def speak(triton):
    """``speak(*requests, on_audio=None) -> [Result]``: all requests at once on the shared server."""

    def run(*requests, on_audio=None):
        async def together():
            async with SpeechClient(triton.url) as client:
                audio = [on_audio(i) if on_audio else None for i in range(len(requests))]
                calls = [client.speak(r, "closed", on_audio=a) for r, a in zip(requests, audio, strict=True)]
                return await asyncio.gather(*calls)

        return asyncio.run(together())

    return run


@pytest.fixture
def here(monkeypatch, capsys):
    """``here(*arguments)``: the command in this process, as ``python -m harness`` calls it: exit code and output."""
    from harness.cli import main

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
        monkeypatch.setattr(main.signal, "signal", lambda *_: None)
        monkeypatch.chdir(ROOT)
        with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
            main.main()
        return ended.value.code, "".join(capsys.readouterr())

    return call


def make_request(name="r", script="Speaker 1: Hello.", speakers=(1,), frames=4, **more):
    return Request(name, "short", script, tuple(speakers), frames, due_ns=time.monotonic_ns(), **more)


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def still_running(processes, timeout_s):
    """Those of the processes that have not ended within the time; one that only waits to be reaped has ended."""
    deadline = time.monotonic() + timeout_s
    while True:
        running = [one for one in processes if one.is_running() and not is_zombie(one)]
        if not running or time.monotonic() > deadline:
            return running
        time.sleep(0.05)


def is_zombie(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
