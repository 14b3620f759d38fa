"""The time to first audio on the server's metrics page is that of its clients: undilated."""

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
