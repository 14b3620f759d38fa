"""Effects of knobs: known functions give the shares that can be worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.capacity.fitting.knob_effects import decompose, find_factors
from harness.errors import InconclusiveError

POINTS = [{"a.x": a, "b.y": b, "c.z": c} for a, b, c in itertools.product((0, 1, 2), (5, 7), (1, 2))]


def answers(function) -> list[float]:
    return [function(point["a.x"], point["b.y"], point["c.z"]) for point in POINTS]


def test_an_additive_answer_has_main_effects_in_proportion_to_their_variances():
    effects = decompose(POINTS, answers(lambda a, b, c: 3 * a + b))
    assert effects.main == pytest.approx((6 / 7, 1 / 7, 0))  # variances 9 x 2/3 and 1
    assert sum(effects.pairs.values()) == pytest.approx(0, abs=1e-12) and effects.rest == pytest.approx(0, abs=1e-9)
    assert effects.means[0] == pytest.approx([6, 9, 12])


def test_a_product_of_centred_knobs_is_all_interaction():
    effects = decompose(POINTS, answers(lambda a, b, c: (a - 1) * (b - 6)))
    assert effects.pairs[0, 1] == pytest.approx(1) and effects.total(0) == pytest.approx(1)
    assert max(effects.main) == pytest.approx(0, abs=1e-12)


@given(st.lists(st.floats(-100, 100), min_size=12, max_size=12))
def test_shares_lie_between_none_and_all_and_add_up(values):
    if np.var(values) < 1e-6:
        return
    effects = decompose(POINTS, values)
    shares = [*effects.main, *effects.pairs.values(), effects.rest]
    assert min(shares) >= 0 and sum(shares) == pytest.approx(1)


def test_cells_that_were_not_measured_are_fitted_from_the_others():
    full = answers(lambda a, b, c: 3 * a + b + 0.1 * c)
    kept = [index for index in range(12) if index not in (4, 9)]
    effects = decompose([POINTS[i] for i in kept], [full[i] for i in kept])
    assert effects.filled == 2 and effects.cells == 12
    assert effects.main == pytest.approx(decompose(POINTS, full).main, abs=0.05)


def test_knobs_that_are_turned_together_are_one_factor():
    points = [{"a.d": d, "b.d": d, "a.i": i, "b.i": 1} for d in (0, 9, 5) for i in (1, 2)]
    delay, instances = find_factors(points)
    assert delay.knobs == ("a.d", "b.d") and [level["a.d"] for level in delay.levels] == [0, 5, 9]
    assert instances.knobs == ("a.i",)


@pytest.mark.parametrize(
    ("points", "values", "why"),
    [
        (POINTS[:3], [1.0, 2.0, 3.0], "need at least 4 points"),
        (POINTS, [math.nan] * 12, "need at least 4 points"),
        (POINTS, [1.0] * 12, "the same answer"),
        ([{"a.x": 1}] * 4, [1.0, 2.0, 3.0, 4.0], "span 1 combinations"),
    ],
)
def test_it_refuses_what_shows_no_effect(points, values, why):
    with pytest.raises(InconclusiveError, match=why):
        decompose(points, values)
