"""Restarts models whose process died: Triton (2.51) leaves them dead, and still reports them as ready.

Every process that serves a model writes a file about itself (its note), and removes it when it is unloaded. A note
whose process has ended shows that the process died: one of the watching processes then has its model loaded again,
with the configuration in the note.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import wire
from harness.content import content_of, read
from harness.host.keys import NOTE_SUFFIX, SHARED_FOLDER, read_private, server_mark, write_private
from harness.identity import StageIdentity
from harness.vibevoice.process.instances import instance_name
from harness.vibevoice.sessions.table import is_alive, is_stopped

# Models whose processes watch; the first one present watches for all. Loading a model blocks the process that asks for
# it until it is loaded, so the voice encoder, which has the least to do, comes first.
WATCHERS = (wire.VOICE, wire.LLM, wire.ENTRY)
_LOOK_S = 0.5
_STOPPED_LOOKS = 6
_TRY_AGAIN_S = 10.0  # after a failed load
_RESTARTS = "restarts"  # a parameter that is incremented: Triton does not load an unchanged configuration


@dataclass(frozen=True)
class Note:
    """One process that serves a model."""

    server: str  # the tritonserver's mark: see ``server_mark``
    pid: int
    instance: str
    model: str
    config: str  # JSON, as Triton gave it
    since_ns: int  # of CLOCK_MONOTONIC; an unloaded process may for a while coexist with its successor
    identity: StageIdentity | None = None  # what it computes with

    @property
    def living(self) -> bool:
        return is_alive(self.pid)


class Registry:
    """The notes of one server's processes, as files."""

    def __init__(self, server: str, folder: Path = SHARED_FOLDER):
        self.server, self.folder = server, folder

    def put(self, note: Note, name: str) -> Path:
        path = self.folder / f"{name}{NOTE_SUFFIX}"
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        write_private(draft, json.dumps(content_of(note)))
        draft.rename(path)
        return path

    def remove(self, path: Path) -> None:
        """Remove the note of a process that died, and its shared memory, which Triton keeps until the server ends."""
        path.with_suffix("").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def notes(self) -> dict[Path, Note]:
        found = {}
        for path in self.folder.glob(f"*{NOTE_SUFFIX}"):
            with contextlib.suppress(OSError, ValueError, TypeError):  # removed meanwhile, or not ours
                # Anybody may write here, and the configuration in a note gets loaded.
                note = read(Note, json.loads(read_private(path)))
                if note.server == self.server:
                    found[path] = note
        return found


class Restarter:
    """Reloads models whose processes died, if it is this process's turn among those that watch."""

    def __init__(self, registry: Registry, load: Callable[[str, str], None], pid: int):
        self.registry, self.load, self.pid = registry, load, pid
        self._not_before: dict[str, float] = {}  # model -> when to try again
        self._stopped: Counter[int] = Counter()  # process -> consecutive checks in which it was stopped

    def look(self, now_s: float) -> list[str]:
        """Check once; returns the models that were reloaded."""
        notes = self.registry.notes()
        stopped = {note.pid for note in notes.values() if is_stopped(note.pid)}
        self._stopped = Counter({pid: self._stopped[pid] + 1 for pid in stopped})
        living = [note for note in notes.values() if note.living and note.pid not in stopped]
        watching = [(WATCHERS.index(note.model), note.pid) for note in living if note.model in WATCHERS]
        if not watching or min(watching)[1] != self.pid:
            return []
        self._end_stopped()
        by_age = sorted(notes.values(), key=lambda note: note.since_ns)
        newest, deployed = {note.instance: note for note in by_age}, {note.model: note.config for note in by_age}
        died: dict[str, Note] = {}
        for path, note in notes.items():
            if note.living:
                continue
            if newest[note.instance] != note:
                self.registry.remove(path)  # it was replaced long ago
            elif note.config == deployed[note.model]:  # otherwise a smaller number of instances has replaced it
                died[note.model] = note
        return [model for model, note in died.items() if self._restart(model, note, now_s)]

    def _end_stopped(self) -> None:
        """Kill processes that stay stopped: if one went on after Triton has replaced it, the server would crash."""
        for pid, times in self._stopped.items():
            if times >= _STOPPED_LOOKS:
                print(f"process {pid} has been stopped for {times * _LOOK_S:g} s; it is killed", flush=True)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _restart(self, model: str, note: Note, now_s: float) -> bool:
        if now_s < self._not_before.get(model, 0.0):
            return False
        try:
            self.load(model, one_more_restart(note.config))
        except Exception as error:
            print(f"{model}{wire.NOT_LOADED}: {error}", flush=True)
            self._not_before[model] = now_s + _TRY_AGAIN_S
            return False
        print(f"{model}{wire.LOADED_AGAIN}", flush=True)
        for path, other in self.registry.notes().items():
            if other.model == model and not other.living:
                self.registry.remove(path)
        return True


def one_more_restart(config: str) -> str:
    """The configuration with its restart counter incremented."""
    content = json.loads(config)
    parameters = content.setdefault("parameters", {})
    before = int(parameters.get(_RESTARTS, {}).get("string_value", 0))
    parameters[_RESTARTS] = {"string_value": str(before + 1)}
    return json.dumps(content)


def identities() -> list[dict[str, Any]]:
    """The identity of every live process of this process's server, one per instance of each model.

    It includes the seconds for which the instance has been served without interruption (wire.AGE_S).
    """
    notes = Registry(server_mark(os.getppid())).notes().values()
    living = sorted((note for note in notes if note.living), key=lambda note: note.since_ns)
    oldest = {note.instance: note.since_ns for note in reversed(living)}
    newest = {note.instance: note for note in living}
    now_ns = time.monotonic_ns()
    told = [(note.identity, now_ns - oldest[note.instance]) for note in newest.values() if note.identity]
    return [{**identity.content(), wire.AGE_S: age_ns / 1e9} for identity, age_ns in told]


def attend(args: dict, load: Callable[[str, str], None], identity: StageIdentity) -> None:
    """Write this process's note, and start watching the others if its model does so; ``args`` are Triton's."""
    server, pid = os.getppid(), os.getpid()
    mark = server_mark(server)
    registry = Registry(mark)
    note = Note(
        mark, pid, instance_name(args), args["model_name"], args["model_config"], time.monotonic_ns(),
        identity,
    )  # fmt: skip
    region = Path("/proc/self/cmdline").read_bytes().split(b"\0")[2].decode()
    with contextlib.suppress(OSError):
        (SHARED_FOLDER / region).chmod(0o600)  # Triton lets everybody read it
    path = registry.put(note, region)
    atexit.register(path.unlink, missing_ok=True)
    if note.model in WATCHERS:
        _watch(Restarter(registry, load, pid), server)


def _watch(restarter: Restarter, server: int) -> None:
    """Watch in a thread until the process ends: no thread may run while the interpreter shuts down."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(_LOOK_S) and os.getppid() == server:
            restarter.look(time.monotonic())

    thread = threading.Thread(target=run, daemon=True, name="restarter")
    thread.start()
    atexit.register(thread.join, 2 * _LOOK_S)
    atexit.register(over.set)  # registered last, called first
