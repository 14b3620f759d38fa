"""Child processes that cannot outlive their parent.

Run as a module it is the launcher itself: it ties its life to its parent's, sets its niceness and becomes the command.
A launcher is used rather than ``preexec_fn`` because forking a process with gRPC threads is unsafe.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_GUARD = "guard"
_REST_S = 1.0  # after a guarded command has ended, until its children are killed


def spawn(
    command: Sequence[str],
    log: Path,
    *,
    niceness: int = 0,
    environment: Mapping[str, str] | None = None,
    reaps: bool = True,
    guarded_s: float = 0.0,
) -> subprocess.Popen:
    """Start a command in its own process group, with its output in a log file; it gets SIGTERM when we die.

    ``reaps`` False: the command does not wait for its children, so that the kernel reaps them. They inherit that: see
    ``reap_children``. ``guarded_s`` above 0: also a command that hangs, or children that do, end with us: a guard kills
    the group so many seconds after our death, and soon after the command's.
    """
    how = (os.getpid(), niceness, int(reaps), guarded_s)
    launcher = [sys.executable, str(Path(__file__).resolve()), *map(str, how)]
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
        return subprocess.Popen(
            [*launcher, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


@contextlib.contextmanager
def signals_held() -> Iterator[Callable[[], bool]]:
    """Delay Ctrl-C and SIGTERM until the block has finished. Yields a function that tells whether one arrived.

    One that arrived is raised as KeyboardInterrupt at the end. During a gRPC call it could hang the process, and during
    clean-up it would leave the rest undone. Ignored signals stay ignored; only the main thread receives any.
    """
    came: list[int] = []
    held = {}
    if threading.current_thread() is threading.main_thread():
        held = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        held = {each: handler for each, handler in held.items() if handler not in (signal.SIG_IGN, None)}
    for each in held:
        signal.signal(each, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        for each, handler in held.items():
            signal.signal(each, handler)
        if came:
            raise KeyboardInterrupt


def is_launched(pid: int) -> bool:
    """Whether a spawned process has become its command, whose arguments are its own from then on."""
    with contextlib.suppress(OSError):
        return Path(__file__).name.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def hide_argument(pid: int, text: str) -> bool:
    """Overwrite a word in the arguments of a child that has parsed them, since every user of the host can read them.

    Returns whether it is gone; where the system forbids the change, it stays.
    """
    word = text.encode()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            arguments = memory.read(end - start)
            if (place := arguments.find(word)) >= 0:
                memory.seek(start + place)
                memory.write(b"x" * len(word))
    except (OSError, ValueError, IndexError):
        return False
    return word not in Path(f"/proc/{pid}/cmdline").read_bytes()


def end_group(process: subprocess.Popen, grace_s: float) -> None:
    """Ask a spawned process to end, wait for it, then kill what is left of its group. Safe to call twice."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reap_children() -> None:
    """Restore this process's ability to wait for its children, whatever it inherited."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _launch(parent: int, niceness: int, reaps: bool, guarded_s: float, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if guarded_s:
        with contextlib.suppress(OSError, AttributeError):  # a kernel or a Python without pidfd_open: SIGTERM must do
            _start_guard(parent, guarded_s)
    if os.getppid() != parent:  # the parent died before we asked to be notified
        sys.exit(1)
    if not reaps:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.umask(0o077)  # files and shared memory for this user only
    if niceness:
        os.nice(niceness)
        _nice_session(niceness)
    os.execvp(command[0], command)


def _start_guard(parent: int, grace_s: float) -> None:
    """Start the guard of this group, as a child of no process of it that might wait for it or count it.

    It is a command of its own, as everybody can read that of this process, with its keys.
    """
    ends = os.pidfd_open(parent), os.pidfd_open(os.getpid())
    guard = [
        sys.executable,
        "-I",
        "-S",
        str(Path(__file__).resolve()),
        _GUARD,
        *map(str, (*ends, os.getpid(), grace_s)),
    ]
    if between := os.fork():
        os.waitpid(between, 0)
        return
    try:
        if not os.fork():
            for end in ends:
                os.set_inheritable(end, True)
            os.execv(guard[0], guard)
    finally:
        os._exit(0)


def _guard(parent: int, command: int, group: int, grace_s: float) -> None:
    """Kill a group once its command has ended, or should have; ``parent`` and ``command`` are pidfds."""
    ended = select.poll()
    for end in (parent, command):
        ended.register(end, select.POLLIN)
    if command not in (end for end, _ in ended.poll()):
        ended.unregister(parent)
        ended.poll(1e3 * grace_s)
    time.sleep(_REST_S)
    os.killpg(group, signal.SIGKILL)  # this process is in it, so that its number is no other's yet


def _nice_session(niceness: int) -> None:
    """Set the session group's nice value too: where the kernel groups tasks by session, only that counts outside it."""
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:
        group.write(str(niceness))


if __name__ == "__main__":
    if sys.argv[1] == _GUARD:
        _guard(*map(int, sys.argv[2:5]), float(sys.argv[5]))
    else:
        _launch(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", float(sys.argv[4]), sys.argv[5:])
