"""Time dilation: a clock that runs slower than the host's, and what is asked of it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.clock import HOST, Clock, dilation_of
from harness.errors import InputError


@given(st.floats(1, 1000), st.integers(0, 10**16))
def test_a_time_of_the_host_comes_back(dilation, ns):
    clock = Clock(dilation)
    assert clock.on_host(clock.of_host(ns)) == pytest.approx(ns, abs=dilation, rel=1e-12)


def test_the_clock_of_the_host_changes_nothing():
    odd = (1 << 62) + 1  # a float could not hold it
    assert HOST.of_host(odd) == HOST.on_host(odd) == odd and Clock.of("") == Clock.of("1") == HOST


def test_a_dilated_clock_runs_slower(monkeypatch):
    clock, now_ns = Clock.of("20"), [4_000_000_000]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns[0])
    began_ns = clock.now_ns()
    now_ns[0] += 2_000_000_000
    assert clock.now_ns() - began_ns == 100_000_000 and clock.host_span(0.1) == 2.0


def test_a_dilation_is_a_factor_or_auto():
    assert (dilation_of("20"), dilation_of("1.5"), dilation_of("auto")) == (20.0, 1.5, "auto")
    for text in ("0.5", "x", "nan", "1e9", ""):
        with pytest.raises(InputError, match=r"give a factor from 1 to 1000, or auto"):
            dilation_of(text)
