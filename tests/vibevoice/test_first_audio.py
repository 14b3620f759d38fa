"""What a channel sends: a carry in pieces; and the time to first audio is that of its clients, undilated."""

import importlib
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from harness import wire
from harness.clock import HOST, Clock

OF_A_STUB = tuple(f"harness.vibevoice.{name}" for name in ("backend", "entry.stage_calls", "entry.talk"))


@pytest.fixture
def talk(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", MagicMock())
    for name in OF_A_STUB:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(OF_A_STUB[-1])
    for name in OF_A_STUB:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("clock", "seconds"), [(HOST, 4.0), (Clock(20.0), 0.2)])
def test_first_audio_is_on_the_clock_of_the_emulated_gpu(talk, monkeypatch, clock, seconds):
    heard, now_ns = [], [7 * 10**9]
    fake_time = SimpleNamespace(monotonic=lambda: now_ns[0] / 1e9, monotonic_ns=lambda: now_ns[0])
    monkeypatch.setattr(talk, "time", fake_time)
    monkeypatch.setattr(talk.backend, "response", MagicMock())
    channel = talk.Channel(MagicMock(), True, 5.0, heard.append, clock)
    for _ in range(2):
        now_ns[0] += 4 * 10**9
        channel.audio(np.zeros(wire.SAMPLES_PER_FRAME, np.float32))
    assert heard == [pytest.approx(seconds)]


def test_a_carry_is_sent_in_pieces_that_pass_through_little_shared_memory(talk, monkeypatch):
    sent = MagicMock()
    monkeypatch.setattr(talk.backend, "response", sent)
    whole = np.random.default_rng(0).bytes(2 * talk.CARRY_PIECE + 5)
    talk.Channel(MagicMock(), True, 5.0, lambda _: None, HOST).carry(whole)
    pieces = [each.kwargs[wire.CARRY] for each in sent.call_args_list]
    assert [len(piece) for piece in pieces] == [talk.CARRY_PIECE, talk.CARRY_PIECE, 5]
    assert b"".join(piece.tobytes() for piece in pieces) == whole
