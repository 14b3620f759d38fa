"""Child processes that cannot outlive their parent.

Run as a module it is the launcher itself: it ties its life to its parent's, sets its niceness and becomes the command.
A launcher is used rather than ``preexec_fn`` because forking a process with gRPC threads is unsafe.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def spawn(
    command: Sequence[str],
    log: Path,
    *,
    niceness: int = 0,
    environment: Mapping[str, str] | None = None,
    reaps: bool = True,
) -> subprocess.Popen:
    """Start a command in its own process group, with its output in a log file; it gets SIGTERM when we die.

    ``reaps`` False: the command does not wait for its children, so that the kernel reaps them. They inherit that: see
    ``reap_children``.
    """
    launcher = [sys.executable, str(Path(__file__).resolve()), str(os.getpid()), str(niceness), str(int(reaps))]
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


def _launch(parent: int, niceness: int, reaps: bool, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before we asked to be notified
        sys.exit(1)
    if not reaps:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.umask(0o077)  # files and shared memory for this user only
    if niceness:
        os.nice(niceness)
        _nice_session(niceness)
    os.execvp(command[0], command)


def _nice_session(niceness: int) -> None:
    """Set the session group's nice value too: where the kernel groups tasks by session, only that counts outside it."""
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:
        group.write(str(niceness))


if __name__ == "__main__":
    _launch(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4:])
