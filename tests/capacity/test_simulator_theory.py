"""The simulator against closed forms, and the closed forms against each other."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import queueing
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from harness.errors import InputError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "capacity"


def closed_forms():
    """The benchmark's table of them, loaded without its folder on the path."""
    spec = importlib.util.spec_from_file_location("closed_forms", FOLDER / "closed_forms.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FORMS = closed_forms().forms()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_simulated_figure_is_that_of_theory(form):
    sessions = 2_000_000 if "100" in form.name or "10," in form.name else 500_000
    assert form.simulated(sessions, np.random.default_rng(5)) == pytest.approx(form.expected, rel=0.02)


@pytest.mark.parametrize(("servers", "offered", "expected"), [(1, 1, 0.5), (10, 7, 0.0787), (20, 12, 0.00980)])
def test_erlang_b_is_that_of_the_tables(servers, offered, expected):
    assert queueing.erlang_b(servers, offered) == pytest.approx(expected, rel=2e-3)


def test_a_queue_of_no_places_is_erlang_b_and_a_long_one_is_erlang_c():
    assert queueing.bounded_line(8, 0, 6.0, 1.0)[0] == pytest.approx(queueing.erlang_b(8, 6.0))
    refused, wait_s = queueing.bounded_line(8, 400, 6.0, 1.0)
    assert refused == pytest.approx(0, abs=1e-9)
    assert wait_s == pytest.approx(queueing.mean_wait_s(8, 6.0, 1.0))


def test_patience_of_none_is_erlang_b_and_endless_patience_loses_nobody():
    assert queueing.impatient_share(8, 6.0, 1.0, 0.0) == pytest.approx(queueing.erlang_b(8, 6.0))
    assert queueing.impatient_share(8, 6.0, 1.0, 100.0) == pytest.approx(0, abs=1e-9)
    assert queueing.impatient_share(4, 8.0, 1.0, 50.0) == pytest.approx(0.5, rel=1e-6)  # half of twice the load


@given(servers=st.integers(1, 30), load=st.floats(0.1, 3), patience_s=st.floats(0, 3))
def test_who_is_more_patient_gives_up_less(servers, load, patience_s):
    here, more = (queueing.impatient_share(servers, load * servers, 1.0, each) for each in (patience_s, patience_s + 1))
    assert max(0.0, 1 - 1 / load) - 1e-9 <= more <= here + 1e-9 <= 1 + 1e-9


def test_at_a_load_of_one_patience_has_its_limit():
    near = queueing.impatient_share(3, 3 * (1 - 1e-7), 1.0, 0.7)
    assert queueing.impatient_share(3, 3.0, 1.0, 0.7) == pytest.approx(near, rel=1e-5)


def test_waits_above_none_are_erlang_c_and_their_integral_is_the_mean():
    assert queueing.wait_above(3, 2.4, 1.0, 0.0) == pytest.approx(queueing.erlang_c(3, 2.4))
    mean_s, _ = integrate.quad(lambda wait_s: queueing.wait_above(3, 2.4, 1.0, wait_s), 0, math.inf)
    assert mean_s == pytest.approx(queueing.mean_wait_s(3, 2.4, 1.0))


def test_sharing_with_equal_parts_is_geometric():
    assert queueing.sharing_sessions(6.0, 0.1 * np.arange(1, 500)) == pytest.approx(0.6 / 0.4)
    assert queueing.sharing_stay_s(2.0, 0.6) == pytest.approx(5.0)
    assert queueing.sharing_stay_s(2.0, 1.0) == math.inf


def test_sessions_by_day_follow_the_rate_late_and_damped():
    slow = [queueing.sessions_by_day(10, 1.0, 1e-6, at_s, 100.0) for at_s in (0.0, 50.0)]
    assert slow == pytest.approx([2e-5, 0.0], abs=1e-9)  # so short that it follows at once
    late = [queueing.sessions_by_day(10, 1.0, 10.0, at_s, 100.0) for at_s in range(100)]
    assert np.mean(late) == pytest.approx(100)
    assert 0 < int(np.argmax(late)) < 25


def test_one_user_of_a_closed_loop_never_waits():
    assert queueing.closed_loop_rate(1, 1, 2.0, 3.0) == pytest.approx(1 / 5)
    assert queueing.closed_loop_rate(100, 2, 1.0, 1.0) == pytest.approx(2.0, rel=1e-6)  # servers never idle


@pytest.mark.parametrize(
    "call",
    [
        lambda: queueing.erlang_b(0, 1.0),
        lambda: queueing.bounded_line(1, -1, 1.0, 1.0),
        lambda: queueing.impatient_share(1, 1.0, 1.0, -1.0),
        lambda: queueing.closed_loop_rate(0, 1, 1.0, 1.0),
    ],
)
def test_theory_refuses_what_cannot_be(call):
    with pytest.raises(InputError):
        call()


def test_the_benchmark_says_what_to_install(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("simulator")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install '.\\[bench\\]'"):
        script.works()
