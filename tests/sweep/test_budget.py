"""How long a trial is taken to last, and how long a confirmation has to."""

from pathlib import Path

import pytest

from harness.clock import Clock
from harness.drive.load import Load
from harness.planfile.reading import load_plan
from harness.records.schema import Rung, Trial
from harness.records.summary import Summary
from harness.sweep.budget import decidable_s, estimated_s

ROOT = Path(__file__).resolve().parents[2]


def ladder(wall_s, held_s, sessions=(1, 2, 4), seconds=8.0):
    window = [Rung(1.0, 1.0, int(start * 1e9), int((start + 6) * 1e9), Summary()) for start in (2.0, held_s - 6)]
    load = Load.ladder(seconds, 1, sessions)
    return Trial("l", "ladder", {}, load.record(), "2026-01-01T00:00:00", wall_s, True, (), tuple(window))


def test_a_trial_is_taken_to_last_as_long_as_those_before_it():
    load = Load.ladder(8.0, 1, (1, 2, 4))
    assert estimated_s(load) == 24 + 12
    assert estimated_s(load, [ladder(wall_s=31, held_s=24)]) == 24 + 7
    assert estimated_s(load, [ladder(wall_s=21, held_s=16), ladder(wall_s=25, held_s=16)]) == 16 + 7  # they end early
    with_two_more = Load.ladder(8.0, 1, (1, 2, 3, 4, 6))
    assert estimated_s(with_two_more, [ladder(wall_s=21, held_s=16)]) == 16 + 5 + 2 * 8
    another = Load.ladder(8.0, 1, (1, 2))
    assert estimated_s(another, [ladder(wall_s=21, held_s=16)]) == 16 + 5  # its full time
    assert estimated_s(Load.poisson(40.0, 1, rate_per_s=1.0), [ladder(wall_s=21, held_s=16)]) == 1.5 + 40 + 5


def test_the_whole_of_a_dilated_trial_takes_longer():
    """An open loop begins with its sessions in progress, half a second after the order and over one second."""
    slower = Clock(10.0)
    assert estimated_s(Load.ladder(8.0, 1, (1, 2, 4)), clock=slower) == 240 + 12
    assert estimated_s(Load.poisson(40.0, 1, rate_per_s=1.0, steady=3), clock=slower) == 415 + 12


@pytest.mark.parametrize(
    ("rate", "seconds"),
    [(10.0, 40.0), (2.0, 54.0), (0.5, 120.0)],  # 59 + 2 x sqrt(59) requests at a share of 0.7; three times at the most
)
def test_a_confirmation_lasts_until_a_slo_can_be_decided(rate, seconds):
    spec = load_plan(ROOT / "scenarios" / "quick.yaml")
    assert decidable_s(spec, spec.traffic_mix(), rate) == seconds
