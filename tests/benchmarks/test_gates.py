"""The simulated runs of benchmarks/load/gates.py: steady ones are VALID, each fault is found by its own gate."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def gates():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks" / "load"))
        yield importlib.import_module("gates")


def judged(gates, mix, load, seconds, seeds, **more):
    return [gates.judge(gates.Cell(getattr(gates, mix), load, seconds, **more), seed) for seed in seeds]


@pytest.mark.parametrize(("mix", "load", "seconds"), [("SHORT", 0.9, 38), ("SHORT", 0.3, 60), ("MIXED", 0.6, 38)])
def test_short_runs_whose_last_requests_still_speak_are_valid(gates, mix, load, seconds):
    """As seen: 38 s of healthy traffic were INVALID by a trend of first audio and by Little's law, every time."""
    done = judged(gates, mix, load, seconds, range(12))
    assert sum(not each.valid for each in done) <= 3  # 12 x 5% would be more than 3 once in 400
    names = {name for each in done for name, passed in each.gates.items() if passed is None}
    assert "Little's law" in names or seconds == 60


def test_ninety_minute_sessions_found_in_progress_are_a_steady_load(gates):
    done = judged(gates, "NINETY", 0.6, 120, range(8), steady=True)
    assert all(each.valid for each in done)
    assert {each.gates["Little's law"] for each in done} == {None}


@pytest.mark.parametrize("number", range(3))
def test_a_server_that_slows_down_is_found_by_its_steps(gates, number):
    (found,) = judged(gates, "SHORT", 0.6, 600, [number], fault=gates.SLOWER)
    assert found.gates["step time"] is False


@pytest.mark.parametrize(("fault", "name"), [("LOST", "records"), ("READER", "records"), ("RISING", "arrivals")])
def test_records_and_arrivals_are_held_against_what_was_submitted_and_due(gates, fault, name):
    (found,) = judged(gates, "SHORT", 0.6, 40, [1], fault=getattr(gates, fault))
    assert not found.valid and found.gates[name] is False


def test_sessions_that_never_end_are_found_by_littles_law(gates):
    (found,) = judged(gates, "SHORT", 0.3, 200, [1], fault=gates.HUNG)
    assert found.gates["Little's law"] is False


def test_a_fault_that_cannot_be_told_is_neither_found_nor_missed(gates):
    cell = gates.Cell(gates.SHORT, 0.6, 40, fault=gates.SLOWER, finds=("step time",))
    said = [gates.Judged(passed is not False, {"step time": passed}, "") for passed in (True, False, None)]
    tally = gates.Tally(cell, tuple(said))
    assert (tally.found, tally.missed) == (1, 1)
    figures = gates.figures([tally], [tally])
    assert figures["found_share"] == 0.5 and figures["testable_share"] == pytest.approx(2 / 3)
    assert figures["false_alarm_share"] == pytest.approx(1 / 3) and figures["cells_above_limit"] == 0
