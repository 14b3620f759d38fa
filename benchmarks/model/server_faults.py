"""Kills and stops each process of `harness serve` in each phase, and judges what clients and the user are told.

After each fault: is every message true, does the server respond again within 15 s, and what is left behind (processes,
shared memory, keys, state files, ports, temporary folders; sessions and KV cache on the metrics page)? A reload that
was accepted must last, whatever was restarted meanwhile. "stop" is SIGSTOP for 6 s, then SIGCONT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import psutil
from served import PATIENCE_S, SERVE, SHORT, TRITON, Client, Serve, outcome_of, speaks, wait_for
from tritonclient.grpc import service_pb2_grpc

from harness import wire
from harness.client.target import Target
from harness.deploy.config import Deployment
from harness.deploy.control import config_of, load_changes
from harness.deploy.leftovers import remove_stale
from harness.errors import HarnessError
from harness.host.keys import control_headers
from harness.host.places import ROOT
from harness.records.schema import Outcome, Result
from harness.vibevoice.sessions.table import is_alive

EXAMPLE = "python benchmarks/model/server_faults.py --topology fused --only 'kill vibevoice_full_pipeline'"
START, PREFILL, SPEECH, RELOAD, STOP = "start", "prefill", "speech", "reload", "stop"
KILL, PAUSE = "kill", "stop"
PAUSE_S = 6.0  # longer than the 3 s after which a stage's process is killed, shorter than a client's silence limit
BACK_S = 15.0
UNCLEAR = re.compile(r"\b[A-Z]\w*(Error|Exception)\b|Traceback|\.py\b|perhaps|probably|may have|, or the way")
GONE = r"ended the connection|no Triton answers|the server is stopping"
TEMPORARY = Path("/tmp")
LONG = "Speaker 1: " + "It is early, and the market has not opened yet. " * 2_000
VALUES = itertools.cycle((7, 8))  # of a knob, so that each reload changes it
KNOBS = {wire.STAGED: f"{wire.LLM}.delay_us", wire.FUSED: "engine.max_batch"}


@dataclass(frozen=True)
class Kind:
    """One process, the fault, and its phase."""

    topology: str
    blow: str
    process: str
    phase: str

    @property
    def name(self) -> str:
        return f"{self.blow} {self.process}"

    @property
    def ends_server(self) -> bool:
        return self.phase == STOP or (self.blow == KILL and self.process == SERVE)


@dataclass
class Seen:
    """The outcome of a fault. ``untrue`` and ``left`` have a phrase for each violation."""

    kind: Kind
    told: str = ""  # to the client
    said: str = ""  # by `harness serve`
    back_s: float | None = None
    heard_s: float | None = None  # from the fault until the client got an error
    took_s: float = 0.0  # to judge it, with the start of its server
    untrue: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def kinds_of(topology: str) -> list[Kind]:
    """The kinds of faults, those that a server survives first: they share one server."""
    stages = [model for model in wire.TOPOLOGIES[topology] if model not in (wire.ENTRY, wire.FRAME)]
    models = [wire.ENTRY, *stages]
    frame_path = [model for model in models if model != wire.VOICE]
    pairs = [
        *((KILL, model, PREFILL) for model in models),
        *((KILL, model, SPEECH) for model in models),
        *((PAUSE, model, SPEECH) for model in frame_path),
        (PAUSE, wire.ENTRY, PREFILL),
        (PAUSE, TRITON, SPEECH),
        (PAUSE, SERVE, SPEECH),
        *((KILL, model, RELOAD) for model in frame_path[:2]),
        (PAUSE, frame_path[-1], RELOAD),
        *((KILL, process, phase) for phase in (SPEECH, RELOAD, STOP) for process in (TRITON, SERVE)),
        *((KILL, model, STOP) for model in frame_path[:2]),
        *((PAUSE, process, STOP) for process in (TRITON, wire.ENTRY, SERVE)),
        *((KILL, process, START) for process in (TRITON, SERVE, *frame_path[:2])),
        *((PAUSE, process, START) for process in (TRITON, frame_path[-1])),
    ]
    return [Kind(topology, *pair) for pair in pairs]


def strike(kind: Kind, victim: psutil.Process) -> None:
    """Kill the process, or stop it for a while."""
    if kind.blow == KILL:
        victim.kill()
        return
    victim.send_signal(signal.SIGSTOP)
    time.sleep(PAUSE_S)
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.send_signal(signal.SIGCONT)


# ── Phases ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def while_starting(kind: Kind, serve: Serve, seen: Seen) -> None:
    found: list[psutil.Process] = []
    early = TRITON if kind.process == SERVE else kind.process
    wait_for(lambda: found.append(serve.find(early)) or found[-1] or serve.process.poll() is not None, early)
    time.sleep(0.3)
    serve.look()
    strike(kind, serve.find(kind.process) or found[-1])
    served = serve.ready()
    if kind.process == SERVE and kind.blow == KILL:
        return
    if served:
        seen.back_s = 0.0
        expect(seen, speaks(serve.url), "it says that it serves, and does not speak")
        return
    code = serve.wait(20)
    expect(seen, code not in (None, 0), f"it ended with {code}")
    expect(seen, kind.process in serve.said() or "Triton ended" in serve.said(), "it does not say what ended")


def while_serving(kind: Kind, serve: Serve, seen: Seen) -> None:
    serve.next_fault()
    victim = serve.find(kind.process)
    before = holdings(serve)
    client = Client(serve.url, *((LONG, 5_000) if kind.phase == PREFILL else (SHORT, 30_000)))
    loading = None
    if kind.phase == PREFILL:
        time.sleep(0.4)
        expect(seen, not client.heard, "prefill was over before the fault")
    else:
        client.wait_for_speech()
    if kind.phase == RELOAD:
        loading = Loading(serve)
        time.sleep(0.3)
    struck_s = time.monotonic()
    strike(kind, victim)
    if not kind.ends_server:
        judge_back(kind, serve, seen, struck_s)
    result = client.finish(PATIENCE_S) if kind.ends_server else outcome_of(client)
    judge_client(kind, serve, result, seen)
    if result is not None and result.outcome is Outcome.ERROR:
        seen.heard_s = client.ended_s - struck_s
    if loading:
        judge_loading(kind, loading.finish(), seen)
    if not kind.ends_server:
        judge_serve(kind, serve, seen, struck_s)
        judge_holdings(before, serve, seen)
    if loading:
        judge_configuration(kind, serve, loading, seen)


def while_stopping(kind: Kind, serve: Serve, seen: Seen) -> None:
    client = Client(serve.url, SHORT)
    client.wait_for_speech()
    victim = serve.find(kind.process)
    serve.process.send_signal(signal.SIGINT)
    time.sleep(0.15)
    with contextlib.suppress(psutil.NoSuchProcess):
        strike(kind, victim)
    code = serve.wait(30)
    if kind.process != SERVE or kind.blow != KILL:
        expect(seen, code == 130, f"Ctrl-C ended it with {code}")
    result = client.finish(30)
    told = result.error if result else "nothing"
    seen.told = told
    expect(seen, bool(re.search(f"{GONE}|{kind.process} ended", told)), f"client told {told!r}")
    expect(seen, not UNCLEAR.search(told), f"unclear: {told!r}")


class Loading:
    """A change of one model's configuration, in a thread."""

    def __init__(self, serve: Serve):
        self.error: str | None = None
        self.url, self.topology, self.value = serve.url, serve.topology, next(VALUES)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        before = Deployment(topology=self.topology)
        after = Deployment(topology=self.topology, knobs={KNOBS[self.topology]: self.value})
        try:
            with Target.of(self.url).channel(self.url) as channel:
                load_changes(channel, before.served(), after.served(), control_headers(self.url))
            self.error = ""
        except HarnessError as error:
            self.error = str(error)

    def finish(self) -> str | None:
        self._thread.join(60)
        return self.error

    def deployed(self) -> int:
        """The value with which the model is loaded."""
        with Target.of(self.url).channel(self.url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            if self.topology == wire.FUSED:
                return int(config_of(stub, wire.ENTRY).parameters["max_batch"].string_value)
            return config_of(stub, wire.LLM).sequence_batching.oldest.max_queue_delay_microseconds


# ── Judgement ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def expect(seen: Seen, holds: bool, otherwise: str) -> None:
    if not holds:
        seen.untrue.append(otherwise)


def died_with(kind: Kind, serve: Serve) -> bool:
    """Whether Triton crashed because one of its processes was killed while it held a shared lock."""
    return kind.process not in (TRITON, SERVE) and "tritonserver ended by signal 6" in serve.said()


def judge_client(kind: Kind, serve: Serve, result: Result | None, seen: Seen) -> None:
    """The client's message must name the failed process, without guessing; otherwise its stream must continue."""
    if result is None:
        seen.untrue.append("the client was told nothing")
        return
    seen.told = result.error or str(result.outcome)
    if result.outcome is not Outcome.ERROR:
        return
    named = GONE if kind.process in (TRITON, SERVE) or died_with(kind, serve) else f"{kind.process} ended"
    if kind.phase == RELOAD:  # a reload also ends the model's old processes
        named = f"{named}|{wire.LLM} ended|{wire.ENTRY} ended"
    expect(seen, bool(re.search(named, result.error)), f"client told {result.error!r}")
    expect(seen, not UNCLEAR.search(result.error), f"unclear: {result.error!r}")


def judge_loading(kind: Kind, error: str | None, seen: Seen) -> None:
    expect(seen, error is not None, "the reload has not ended after 60 s")
    if error:
        expect(seen, not re.search(r"Traceback|\.py\b", error), f"reload told {error!r}")
        refused, gone = "Triton refused the new configuration" in error, kind.ends_server or kind.process == TRITON
        expect(seen, not (refused and gone), f"reload: {error!r}")


def judge_configuration(kind: Kind, serve: Serve, loading: Loading, seen: Seen) -> None:
    """A restart does not undo a reload that was accepted. A server that ended starts as it first did."""
    if loading.error != "" or kind.ends_server or kind.process == TRITON or died_with(kind, serve):
        return
    now = loading.deployed()
    expect(seen, now == loading.value, f"it was loaded with {loading.value}, and has {now}")


def judge_serve(kind: Kind, serve: Serve, seen: Seen, struck_s: float) -> None:
    """A user who looks at `harness serve` learns of a process that was restarted."""
    expect(seen, serve.process.poll() is None, "it ended")
    if kind.process == SERVE or (kind.process, kind.blow) == (TRITON, PAUSE):
        return
    if kind.process == TRITON or died_with(kind, serve):
        expect(seen, says(serve, "tritonserver was restarted", struck_s), "it does not say that it restarted Triton")
        expect(seen, kind.process != TRITON or "signal 9" in serve.said(), "it does not say how Triton ended")
        return
    if kind.phase == RELOAD:  # the process that was struck is replaced anyway
        return
    told = says(serve, f"{kind.process} ended", struck_s)
    expect(seen, told, f"it does not say that {kind.process} was restarted")


def says(serve: Serve, words: str, struck_s: float) -> bool:
    """Whether it says something within the time limit for recovery, and some seconds for what it says last."""
    deadline = max(struck_s + BACK_S, time.monotonic() + 3)
    while words not in serve.said() and time.monotonic() < deadline:
        time.sleep(0.1)
    return words in serve.said()


def judge_end(kind: Kind, serve: Serve, seen: Seen) -> None:
    """Judge what the user reads when a fault ended the server."""
    seen.said = serve.said()
    expect(seen, "Traceback" not in seen.said, "a stack trace")


def judge_back(kind: Kind, serve: Serve, seen: Seen, struck_s: float) -> None:
    time.sleep(0.5)
    if speaks(serve.url, struck_s + PATIENCE_S - time.monotonic(), lambda: serve.process.poll() is None):
        seen.back_s = time.monotonic() - struck_s
    expect(seen, seen.back_s is not None and seen.back_s <= BACK_S, f"back after {seen.back_s} s")


def holdings(serve: Serve) -> dict[str, float]:
    """Shared-memory files, dead processes and sessions of a server that runs."""
    triton = serve.find(TRITON)
    dead = sum(not is_alive(child.pid) for child in triton.children(recursive=True)) if triton else 0
    files = serve.shared()
    notes = sum(path.suffix == ".model" for path in files)
    return {"regions": len(files) - notes, "notes of processes": notes, "zombies": dead, **serve.held()}


def judge_holdings(before: dict[str, float], serve: Serve, seen: Seen) -> None:
    """No more is held than before, within the time limit for recovery."""
    deadline = time.monotonic() + BACK_S
    while (more := grown(before, holdings(serve))) and time.monotonic() < deadline:
        time.sleep(0.2)
    seen.left += more


def grown(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """A phrase for each thing of which there is more."""
    was = {what: before.get(what, 0) for what in after}
    return [f"{what}: {was[what]:.0f} to {now:.0f}" for what, now in after.items() if now > was[what]]


def judge_left(kind: Kind, serve: Serve, seen: Seen) -> None:
    """Judge what a server left. Files that only the next start can remove are checked after that start."""
    deadline = time.monotonic() + BACK_S
    cleans_up = kind.process != SERVE or kind.blow != KILL
    while time.monotonic() < deadline and (
        serve.look() or open_ports(serve) or (cleans_up and (serve.shared() or serve.folders))
    ):
        time.sleep(0.1)
    seen.left += [f"process {' '.join(one.cmdline()[:2])}" for one in serve.look()]
    if not cleans_up:
        remove_stale(ROOT)
    seen.left += [f"port {port}" for port in open_ports(serve)]
    seen.left += [str(path) for path in (*serve.shared(), *serve.folders, *environments(serve))]


def open_ports(serve: Serve) -> list[int]:
    """Those that still listen: the last threads of a process may end a little after its first one."""
    found = []
    for port in serve.ports:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found


def environments(serve: Serve) -> list[Path]:
    """Folders created by Triton while this server started; those of another starting server get time to disappear."""

    def made() -> list[Path]:
        found = []
        for path in TEMPORARY.glob("python_env_*"):
            with contextlib.suppress(OSError):
                if serve.began_s <= path.stat().st_ctime <= serve.ready_s + 1:
                    found.append(path)
        return found

    deadline = time.monotonic() + 20
    while made() and time.monotonic() < deadline:
        time.sleep(0.5)
    return made()


PHASES = {START: while_starting, STOP: while_stopping}


class Servers:
    """The server of each kind in turn; kinds that it survives share it with the previous one."""

    def __init__(self) -> None:
        self.now: Serve | None = None
        self._next: Serve | None = None

    def of(self, kind: Kind) -> Serve:
        """Raises HarnessError where it does not start."""
        if self.now is not None and (kind.phase == START or self.now.process.poll() is not None):
            self.now.end()
            self.now = None
        if self.now is None:
            self.now, self._next = self._next or Serve(kind.topology), None
            if kind.phase != START and not self.now.ready():
                raise HarnessError(f"`harness serve` does not start: {self.now.said()}")
        return self.now

    def prepare(self, kind: Kind, following: Kind | None) -> None:
        """Start the server of the following kind while this one ends its own."""
        if kind.ends_server and following is not None and following.phase != START:
            self._next = Serve(following.topology)

    def end(self) -> None:
        for serve in filter(None, (self.now, self._next)):
            serve.end()
        self.now = self._next = None
        remove_stale(ROOT)


def suffer(kinds: Sequence[Kind]) -> Iterator[Seen]:
    servers = Servers()
    try:
        for kind, following in zip(kinds, (*kinds[1:], None), strict=True):
            common.say(f"{kind.topology}: {kind.name} at {kind.phase} …")
            seen, began_s = Seen(kind), time.monotonic()
            serve = servers.of(kind)
            servers.prepare(kind, following)
            try:
                PHASES.get(kind.phase, while_serving)(kind, serve, seen)
            except (HarnessError, psutil.Error) as error:
                seen.untrue.append(f"{type(error).__name__}: {error}")
            if kind.phase == START or kind.ends_server or serve.process.poll() is not None or following is None:
                finish(kind, serve, seen)
                servers.now = None
            seen.took_s = time.monotonic() - began_s
            common.say(f"    {'; '.join((*seen.untrue, *seen.left)) or 'right'}, after {seen.took_s:.1f} s")
            yield seen
    finally:
        servers.end()


def finish(kind: Kind, serve: Serve, seen: Seen) -> None:
    """End a server as its user would, or let it end by itself; judge its last messages and what it leaves."""
    if serve.process.poll() is None:
        if not kind.ends_server:
            serve.process.send_signal(signal.SIGINT)
        expect(seen, serve.wait(30) is not None, "it did not end within 30 s")
    judge_end(kind, serve, seen)
    judge_left(kind, serve, seen)
    serve.end()
    remove_stale(ROOT)


def report(rows: Sequence[Seen]) -> int:
    table = common.table("Faults of a server", "topology", "phase", "fault")
    for column in ("client told after (s)", "back after (s)", "took (s)"):
        table.add_column(column, justify="right")
    for column in ("client told", "wrong"):
        table.add_column(column, overflow="fold")
    for seen in rows:
        wrong = "; ".join((*seen.untrue, *(f"left: {each}" for each in seen.left))) or "-"
        table.add_row(
            seen.kind.topology, seen.kind.phase, seen.kind.name, seconds(seen.heard_s), seconds(seen.back_s),
            seconds(seen.took_s), seen.told[:110], wrong[:400],
        )  # fmt: skip
    figures = {
        "kinds": len(rows),
        "untrue": sum(bool(seen.untrue) for seen in rows),
        "left_behind": sum(bool(seen.left) for seen in rows),
        "back_s_max": most(seen.back_s for seen in rows),
        "told_s_max": most(seen.heard_s for seen in rows),
        "took_s": sum(seen.took_s for seen in rows),
        "load_per_core": os.getloadavg()[1] / (os.cpu_count() or 1),  # on a busy host no start takes less than 15 s
        "rows": [dataclasses.asdict(seen) for seen in rows],
    }
    common.finish(table, figures)
    return common.EXIT_FAILED if figures["untrue"] or figures["left_behind"] else 0


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, EXAMPLE)
    parser.add_argument("--topology", choices=tuple(wire.TOPOLOGIES), help="of the server; both unless given")
    parser.add_argument(
        "--only", type=common.several(str), default=[""], help="kinds whose fault and phase hold one of these texts"
    )
    given = parser.parse_args(arguments)
    topologies = (given.topology,) if given.topology else tuple(wire.TOPOLOGIES)
    kinds = [kind for topology in topologies for kind in kinds_of(topology)]
    chosen = [kind for kind in kinds if any(text in f"{kind.name} at {kind.phase}" for text in given.only)]
    if not chosen:
        parser.error(f"no kind holds {' or '.join(map(repr, given.only))}")
    rows = []
    try:
        for topology in topologies:
            some = [kind for kind in chosen if kind.topology == topology]
            for seen in suffer(some[:: max(1, len(some) // 3)][:3] if given.quick else some):
                rows.append(seen)
    except KeyboardInterrupt:
        common.say("interrupted: these are the kinds until then")
        report(rows)
        raise
    return report(rows)


if __name__ == "__main__":
    common.run(main)
