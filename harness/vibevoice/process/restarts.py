"""Restarts models whose process died: Triton (2.51) leaves them dead, and still reports them as ready.

Every process that serves a model writes a file about itself (its note), and removes it when it is unloaded. A note
whose process has ended shows that the process died: one of the watching processes then has its model loaded again,
with the configuration that was asked for last.

Triton loads a model while its old process serves. A process that dies meanwhile is not restarted, as its successor
comes. Where a restart overtakes a load that was asked for before, its configuration is old: the notes tell, and the
newer one is loaded after it.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import wire
from harness.content import content_of, read
from harness.host.keys import NOTE_SUFFIX, SHARED_FOLDER, read_private, server_mark, write_private
from harness.identity import StageIdentity
from harness.vibevoice.process.hangs import long_call
from harness.vibevoice.process.instances import instance_name
from harness.vibevoice.process.stubs import Stub, own_server, started_ns, stub_of, stubs_of
from harness.vibevoice.sessions.table import is_alive, is_stopped

# Models whose processes watch; the first one present watches for all. Loading a model blocks the process that asks for
# it until it is loaded, so the voice encoder, which has the least to do, comes first.
WATCHERS = (wire.VOICE, wire.LLM, wire.ENTRY)
_LOOK_S = 0.5
_STOPPED_LOOKS = 6
_TRY_AGAIN_S = 10.0  # after a failed load
_DEAD_LOOKS = 2  # before a restart: the process of a load that was just asked for appears meanwhile
_RESTARTS = "restarts"  # a parameter that is incremented: Triton does not load an unchanged configuration
_REPLACES = "replaces"  # a parameter: the process for which a restart is


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
    asked_ns: int = 0  # when its configuration was asked for: since_ns, or that of the process which it replaces
    newest: str = ""  # the configuration that was asked for last, as far as it knew when it began; "": its own
    newest_ns: int = 0
    started_ns: int = 0  # when the process started, as ``Stub`` has it: of another clock than since_ns

    @property
    def living(self) -> bool:
        return is_alive(self.pid)

    @property
    def asked(self) -> tuple[int, str]:
        """When the configuration was asked for that was asked for last, and that configuration."""
        if self.is_overtaken:
            return self.newest_ns, self.newest
        return self.asked_ns or self.since_ns, self.config

    @property
    def is_overtaken(self) -> bool:
        """Whether it is a restart with a configuration that had been replaced."""
        return self.newest_ns > (self.asked_ns or self.since_ns)

    def among(self, others: Iterable[Note]) -> Note:
        """This note with what those of the same model know of configurations."""
        known = {other.pid: other for other in others if other.model == self.model}
        replaced, asked_ns = _replaced_by(self.config)
        mine = asked_ns if replaced in known else self.since_ns  # a configuration that was read and loaded later is new
        newest_ns, newest = max((other.asked for other in known.values()), default=(0, ""))
        return replace(self, asked_ns=mine, newest=newest if newest_ns > mine else "", newest_ns=newest_ns)


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
    """Reloads models whose processes died, if it is this process's turn among those that watch.

    ``stubs``: the living processes of the server.
    """

    def __init__(
        self, registry: Registry, load: Callable[[str, str], None], pid: int, stubs: Callable[[], Iterable[Stub]]
    ):
        self.registry, self.load, self.pid, self.stubs = registry, load, pid, stubs
        self._not_before: dict[str, float] = {}  # model -> when to try again
        self._stopped: Counter[int] = Counter()  # process -> consecutive checks in which it was stopped
        self._due: Counter[str] = Counter()  # model -> consecutive checks in which it was to be restarted

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
        due = self._to_restart(notes)
        self._due = Counter({model: self._due[model] + 1 for model in due})
        ready = [model for model in due if self._due[model] >= _DEAD_LOOKS]
        return [model for model in ready if self._restart_if_due(model, now_s)]

    def _restart_if_due(self, model: str, now_s: float) -> bool:
        """Restart a model that still needs it: another may have loaded it while the restart before it took its time."""
        note = self._to_restart(self.registry.notes()).get(model)
        return note is not None and self._restart(note, now_s)

    def _to_restart(self, notes: dict[Path, Note]) -> dict[str, Note]:
        """The models that need a restart, each with a note of the process to replace; removes what is out of date."""
        by_age = sorted(notes.values(), key=lambda note: note.since_ns)
        newest, deployed = {note.instance: note for note in by_age}, {note.model: note for note in by_age}
        due = {model: note for model, note in deployed.items() if note.is_overtaken}
        for path, note in notes.items():
            if note.living:
                continue
            if newest[note.instance] != note:
                self.registry.remove(path)  # it was replaced long ago
            elif note.config == deployed[note.model].config:  # otherwise fewer instances have replaced it
                due[note.model] = note
        if due:
            known = {path.with_suffix("").name for path in notes}
            for stub in self.stubs():
                if stub.region not in known and stub.model in due and stub.started_ns > due[stub.model].started_ns:
                    del due[stub.model]  # it is being loaded
        return due

    def _end_stopped(self) -> None:
        """Kill processes that stay stopped: if one went on after Triton has replaced it, the server would crash."""
        for pid, times in self._stopped.items():
            if times >= _STOPPED_LOOKS:
                print(f"process {pid} has been stopped for {times * _LOOK_S:g} s; it is killed", flush=True)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _restart(self, note: Note, now_s: float) -> bool:
        model = note.model
        if now_s < self._not_before.get(model, 0.0):
            return False
        known = [note, *self.registry.notes().values()]
        asked_ns, config = max(other.asked for other in known if other.model == model)
        try:
            with long_call():
                self.load(model, restart_of(note, config, asked_ns))
        except Exception as error:
            print(f"{model}{wire.NOT_LOADED}: {error}", flush=True)
            self._not_before[model] = now_s + _TRY_AGAIN_S
            return False
        print(f"{model}{wire.LOADED_AGAIN}", flush=True)
        for path, other in self.registry.notes().items():
            if other.model == model and not other.living:
                self.registry.remove(path)
        return True


def restart_of(note: Note, config: str, asked_ns: int) -> str:
    """The configuration with which a process is replaced; ``asked_ns``: when ``config`` was asked for."""
    content = json.loads(config)
    parameters = content.setdefault("parameters", {})
    before = int(parameters.get(_RESTARTS, {}).get("string_value", 0))
    parameters[_RESTARTS] = {"string_value": str(before + 1)}
    parameters[_REPLACES] = {"string_value": f"{note.pid} {asked_ns}"}
    return json.dumps(content)


def _replaced_by(config: str) -> tuple[int, int]:
    """The process that a restart replaces, and when its configuration was asked for; zeros for one that is none."""
    told = json.loads(config).get("parameters", {}).get(_REPLACES, {}).get("string_value", "")
    pid, _, asked_ns = told.partition(" ")
    return (int(pid), int(asked_ns)) if pid.isdecimal() and asked_ns.isdecimal() else (0, 0)


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
    server, pid = own_server(), os.getpid()
    mark = server_mark(server)
    registry = Registry(mark)
    note = Note(
        mark, pid, instance_name(args), args["model_name"], args["model_config"], time.monotonic_ns(),
        identity, started_ns=started_ns(pid),
    )  # fmt: skip
    if own := stub_of(pid):
        with contextlib.suppress(OSError):
            (SHARED_FOLDER / own.region).chmod(0o600)  # Triton lets everybody read it
    path = registry.put(note.among(registry.notes().values()), own.region if own else f"{mark}-{pid}")
    atexit.register(path.unlink, missing_ok=True)
    if note.model in WATCHERS:
        _watch(Restarter(registry, load, pid, lambda: stubs_of(server)), server)


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
