"""The rungs of further ladders, chosen by the limit that the first ones showed."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from harness.sweep.near_limit import rungs_near_limit

LADDER = (1, 8, 24, 48, 80, 120, 180)
rungs = st.lists(st.integers(1, 500), min_size=1, max_size=9, unique=True).map(lambda each: tuple(sorted(each)))


def test_a_rung_is_added_at_the_limit():
    assert rungs_near_limit(LADDER, 97.2, reached=True) == (1, 8, 24, 48, 80, 97, 120, 180)
    assert rungs_near_limit(LADDER, 0.4, reached=True) == LADDER


def test_none_is_added_where_one_is_near_it():
    assert rungs_near_limit(LADDER, 84, reached=True) == LADDER


def test_rungs_go_on_where_no_slo_was_violated():
    assert rungs_near_limit((1, 8, 48), 48, reached=False) == (1, 8, 48, 72, 108)
    assert rungs_near_limit((1, 8, 48), 48, reached=False, room=80.5) == (1, 8, 48, 72, 80)
    assert rungs_near_limit((1, 8, 48), 48, reached=False, room=48) == (1, 8, 48)


@given(rungs, st.floats(0.1, 1000), st.booleans(), st.floats(1, 1e9))
def test_rungs_rise_and_those_of_the_plan_stay(sessions, most, reached, room):
    found = rungs_near_limit(sessions, most, reached=reached, room=room)
    assert set(sessions) <= set(found) and len(found) <= len(sessions) + 2
    assert all(low < high for low, high in itertools.pairwise(found))


def test_a_rung_at_the_limit_is_never_beyond_the_room():
    assert rungs_near_limit((1, 6, 12, 17), 25, reached=True, room=17.5) == (1, 6, 12, 17)
