"""Child processes end with their parent, whole groups of them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from conftest import still_running, wait_for

from harness.host.process_group import end_group, signals_held, spawn

ROOT = Path(__file__).resolve().parents[2]


def test_ending_a_group_ends_its_children_and_keeps_its_output(tmp_path):
    log = tmp_path / "log"
    code = "import os, subprocess, sys; print('hello', os.nice(0), flush=True); subprocess.run(['sleep', '600'])"
    process = spawn([sys.executable, "-c", code], log, niceness=3)
    wait_for(lambda: psutil.Process(process.pid).children())
    family = psutil.Process(process.pid).children(recursive=True)
    end_group(process, grace_s=2)
    end_group(process, grace_s=2)  # safe to call twice
    assert not still_running(family, 60)
    assert log.read_text().split()[0] == "hello" and int(log.read_text().split()[1]) >= 3


def test_a_child_does_not_outlive_a_killed_parent(tmp_path):
    code = (
        "import pathlib, time; from harness.host.process_group import spawn\n"
        f"print(spawn(['sleep', '600'], pathlib.Path({str(tmp_path / 'log')!r})).pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = psutil.Process(int(parent.stdout.readline()))
    wait_for(lambda: child.name() == "sleep")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not still_running([child], 60)


# A server that hangs when it is told to end, and a stage that waits for it in a call that holds the interpreter, as
# Triton's binding does: no thread of it runs, and SIGTERM is not handled.
HUNG = """
import ctypes, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
if not os.fork():
    ctypes.PyDLL(None).sleep(600)
open(sys.argv[1], "w").close()
while True:
    time.sleep(600)
"""
OWNER = """
import pathlib, sys, time
from harness.host.process_group import spawn
folder = pathlib.Path(sys.argv[1])
command = [sys.executable, "-c", sys.argv[2], str(folder / "began"), "a secret word"]
print(spawn(command, folder / "log", reaps=False, guarded_s=0.5).pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("killed", ["its owner", "the server"])
def test_a_server_that_hangs_and_a_stage_that_waits_for_it_do_not_outlive_the_owner_or_the_server(tmp_path, killed):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path), HUNG], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert owner.stdout is not None
    server = psutil.Process(int(owner.stdout.readline()))
    wait_for((tmp_path / "began").exists)
    group = [one for one in psutil.process_iter() if is_of(server.pid, one)]
    (guard,) = [one for one in group if one != server and one.ppid() != server.pid]
    assert len(group) == 3 and len(server.children()) == 1  # the server, its stage and the guard
    assert "a secret word" not in guard.cmdline()
    (owner if killed == "its owner" else server).kill()
    if killed == "its owner":
        owner.wait()
    assert not still_running(group, 60)
    owner.kill()
    owner.wait()
    owner.stdout.close()


def is_of(group, process):
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(process.pid) == group
    return False


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_held_is_raised_when_all_is_done_also_where_something_failed(signum):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    for error in (None, ValueError):
        done = []
        with pytest.raises(KeyboardInterrupt), signals_held() as came, signals_held() as inner:
            assert not came() and not inner()
            signal.raise_signal(signum)
            signal.raise_signal(signum)  # who is impatient
            done.append(inner() and not came())
            if error:
                raise error
        assert done == [True]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_that_is_ignored_stays_so_and_threads_hold_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_held() as came:
            signal.raise_signal(signal.SIGINT)
        assert not came()
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def hold():
        with signals_held() as came:
            seen.append(came())

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert seen == [False]


def states_of_children(pid):
    states = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            states.append(child.status())
    return states


@pytest.mark.parametrize("reaps", [True, False])
def test_children_of_a_command_that_does_not_wait_for_them_are_no_zombies(tmp_path, reaps):
    code = "import subprocess, time; child = subprocess.Popen(['true']); print('started', flush=True); time.sleep(600)"
    process = spawn([sys.executable, "-c", code], tmp_path / "log", reaps=reaps)
    try:
        wait_for(lambda: "started" in (tmp_path / "log").read_text())
        left = [psutil.STATUS_ZOMBIE] if reaps else []
        wait_for(lambda: states_of_children(process.pid) == left)
        assert states_of_children(process.pid) == left and process.poll() is None
    finally:
        end_group(process, grace_s=0)


def test_a_process_that_inherits_that_can_learn_again_how_its_children_end(tmp_path):
    code = (
        "import subprocess; from harness.host.process_group import reap_children\n"
        "print(subprocess.run(['false']).returncode); reap_children(); print(subprocess.run(['false']).returncode)"
    )
    process = spawn([sys.executable, "-c", code], tmp_path / "log", reaps=False)
    process.wait(60)
    assert (tmp_path / "log").read_text().split() == ["0", "1"]
