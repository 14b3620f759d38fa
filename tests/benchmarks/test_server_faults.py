"""What the benchmark of a server's faults calls untrue or left behind, and that it strikes all at every phase."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "model"))

import served  # noqa: E402
import server_faults as faults  # noqa: E402

from harness import wire  # noqa: E402
from harness.records.schema import Outcome  # noqa: E402


@pytest.mark.parametrize("topology", wire.TOPOLOGIES)
def test_every_process_is_struck_and_every_phase_both_ways(topology):
    kinds = faults.kinds_of(topology)
    assert len(kinds) == len(set(kinds)) >= 20
    models = set(wire.TOPOLOGIES[topology]) - {wire.FRAME}
    assert {kind.process for kind in kinds if kind.blow == faults.KILL} == models | {faults.TRITON, faults.SERVE}
    phases = {faults.START, faults.PREFILL, faults.SPEECH, faults.RELOAD, faults.STOP}
    for blow in (faults.KILL, faults.PAUSE):
        assert {kind.phase for kind in kinds if kind.blow == blow} == phases


def saying(words):
    """A `harness serve` that printed these words."""
    return SimpleNamespace(said=lambda: words)


def judged(process, error, phase=faults.SPEECH, outcome=Outcome.ERROR, said=""):
    kind = faults.Kind(wire.STAGED, faults.KILL, process, phase)
    seen = faults.Seen(kind)
    faults.judge_client(kind, saying(said), SimpleNamespace(outcome=outcome, error=error), seen)
    return seen.untrue


@pytest.mark.parametrize(
    ("process", "error"),
    [
        (wire.LLM, f"{wire.LLM} ended while it served this session, and is restarting; retry"),
        (faults.TRITON, "the server at x ended the connection, with 3200 samples of audio: Stream removed"),
        (faults.SERVE, "no Triton answers at x: start one"),
    ],
)
def test_an_error_that_names_what_was_struck_is_true(process, error):
    assert judged(process, error) == []
    assert judged(process, "", outcome=Outcome.CANCELLED) == []


@pytest.mark.parametrize(
    ("process", "error"),
    [
        (wire.LLM, f"{wire.VOCODER} ended while it served this session"),
        (wire.ENTRY, "the process that served this request has ended, or the network failed"),
        (wire.LLM, f"KeyError: {wire.LLM} ended"),
        (wire.LLM, f"Traceback: {wire.LLM} ended"),
        (wire.LLM, f"{wire.LLM} ended, perhaps for want of memory"),
        (faults.TRITON, "an error"),
        (faults.TRITON, ""),
    ],
)
def test_an_error_that_names_another_or_guesses_is_untrue(process, error):
    assert judged(process, error) != []


def test_a_process_that_took_triton_along_is_told_as_the_servers_end():
    gone = "the server at x ended the connection"
    words = "tritonserver ended by signal 6; its last line: …; restarting it"
    assert judged(wire.LLM, gone, said=words) == [] and judged(wire.LLM, gone) != []


def test_a_client_that_is_told_nothing_was_told_no_truth():
    kind = faults.Kind(wire.STAGED, faults.KILL, wire.LLM, faults.SPEECH)
    seen = faults.Seen(kind)
    faults.judge_client(kind, saying(""), None, seen)
    assert seen.untrue == ["the client was told nothing"]


def test_shared_memory_and_zombies_beyond_those_before_are_left_behind(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(faults.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(faults.time, "sleep", lambda _: None)
    monkeypatch.setattr(faults, "holdings", lambda serve: {"regions": 6, "zombies": 0})
    seen = faults.Seen(None)
    faults.judge_holdings({"regions": 5, "zombies": 1}, None, seen)
    assert seen.left == ["regions: 5 to 6"]
    assert faults.grown({"zombies": 0}, {"zombies": 0, "vibevoice_sessions": 1.0}) == ["vibevoice_sessions: 0 to 1"]


@pytest.mark.parametrize(
    ("error", "process", "deployed", "wrong"),
    [
        ("", wire.LLM, 7, []),
        ("", wire.LLM, 8, ["it was loaded with 7, and has 8"]),
        ("Triton refused it", wire.LLM, 8, []),
        (None, wire.LLM, 8, []),
        ("", faults.TRITON, 8, []),  # `harness serve` starts another one as it did first
    ],
)
def test_a_reload_that_was_accepted_must_last(error, process, deployed, wrong):
    kind = faults.Kind(wire.STAGED, faults.KILL, process, faults.RELOAD)
    seen = faults.Seen(kind)
    loading = SimpleNamespace(error=error, value=7, deployed=lambda: deployed)
    faults.judge_configuration(kind, saying(""), loading, seen)
    assert seen.untrue == wrong


def test_a_server_that_is_gone_refused_nothing():
    for process, wrong in ((wire.LLM, 0), (faults.TRITON, 1), (faults.SERVE, 1)):
        kind = faults.Kind(wire.STAGED, faults.KILL, process, faults.RELOAD)
        seen = faults.Seen(kind)
        faults.judge_loading(kind, "Triton refused the new configuration of x: Socket closed", seen)
        assert len(seen.untrue) == wrong


def test_a_key_of_no_server_is_left_behind_and_one_of_another_server_is_not(tmp_path, monkeypatch):
    """A process whose server was killed once made a key of process 1."""
    monkeypatch.setattr(served, "SHARED", tmp_path)
    one = served.Serve.__new__(served.Serve)
    one.process, one.marks, one._keys_before = SimpleNamespace(pid=7), {"70-"}, set()
    for name in ("harness-stages-40-1-25", "harness-stages-40-70-1", "harness-control-40-80-1", "harness_7_ab"):
        (tmp_path / name).touch()
    commands = {1: ["/sbin/init"], 80: ["/opt/bin/tritonserver"]}
    monkeypatch.setattr(served.psutil, "Process", lambda pid: SimpleNamespace(cmdline=lambda: commands[pid]))
    names = {path.name for path in one.shared()}
    assert names == {"harness-stages-40-1-25", "harness-stages-40-70-1", "harness_7_ab"}


def test_a_process_that_has_the_number_of_one_that_ended_is_none_of_the_server(monkeypatch):
    one = served.Serve.__new__(served.Serve)
    one.process = SimpleNamespace(pid=os.getpid())
    reused, own = (
        SimpleNamespace(pid=os.getpid(), is_running=lambda is_own=is_own: is_own) for is_own in (False, True)
    )
    one.family = {1: reused, 2: own}
    monkeypatch.setattr(served.psutil, "Process", lambda pid: SimpleNamespace(children=lambda recursive: []))
    assert one.look() == [own]


def test_figures_count_kinds_and_fail_where_one_is_wrong(capsys):
    kind = faults.Kind(wire.FUSED, faults.KILL, wire.ENTRY, faults.SPEECH)
    rows = [faults.Seen(kind), faults.Seen(kind, back_s=3.0), faults.Seen(kind, untrue=["x", "y"], left=["z"])]
    assert faults.report(rows[:2]) == 0
    assert faults.report(rows) == faults.common.EXIT_FAILED
    last = capsys.readouterr().out.splitlines()[-1]
    assert '"kinds": 3, "untrue": 1, "left_behind": 1, "back_s_max": 3.0' in last


class Streaming:
    """A client whose stream goes on, or is silent, or ends."""

    def __init__(self, chunks_per_look, ends_after=10**9):
        self._heard, self.per_look, self.ends_after, self.looks = 0, chunks_per_look, ends_after, 0

    @property
    def result(self):
        return "ended" if self.looks >= self.ends_after else None

    @property
    def heard(self):
        self.looks += 1
        self._heard += self.per_look
        return self._heard

    def finish(self, seconds):
        return self.result or "stopped"


@pytest.mark.parametrize(
    ("client", "told", "waits"),
    [(Streaming(1), "stopped", False), (Streaming(0, ends_after=5), "ended", False), (Streaming(0), "stopped", True)],
    ids=["goes on", "is told", "is silent"],
)
def test_a_client_that_goes_on_is_not_waited_for_and_one_that_is_silent_is(monkeypatch, client, told, waits):
    clock = [0.0]
    monkeypatch.setattr(served.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(served.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    assert served.outcome_of(client) == told
    assert (clock[0] >= served.TOLD_S) == waits


def test_a_probe_that_a_dead_process_holds_does_not_hide_that_the_server_is_back(monkeypatch):
    made = []

    class Probe:
        def __init__(self, url, script, frames):
            made.append(self)
            self.result = SimpleNamespace(outcome=Outcome.DONE) if len(made) == 3 else None

        def finish(self, seconds):
            self.stopped = True

    clock = [0.0]
    monkeypatch.setattr(served, "Client", Probe)
    monkeypatch.setattr(served.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(served.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    assert served.speaks("url") and clock[0] < 2 and all(probe.stopped for probe in made)
    assert not served.speaks("url", seconds=5) and len(made) == 3 + served.PROBES
    assert not served.speaks("url", goes_on=lambda: False)
