"""What the benchmark of a server's faults calls untrue or left behind, and that it strikes all at every phase."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "model"))

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


def test_figures_count_kinds_and_fail_where_one_is_wrong(capsys):
    kind = faults.Kind(wire.FUSED, faults.KILL, wire.ENTRY, faults.SPEECH)
    rows = [faults.Seen(kind), faults.Seen(kind, back_s=3.0), faults.Seen(kind, untrue=["x", "y"], left=["z"])]
    assert faults.report(rows[:2]) == 0
    assert faults.report(rows) == faults.common.EXIT_FAILED
    last = capsys.readouterr().out.splitlines()[-1]
    assert '"kinds": 3, "untrue": 1, "left_behind": 1, "back_s_max": 3.0' in last
