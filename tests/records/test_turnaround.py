"""SLOs on the turnaround of tasks."""

import math

import numpy as np
import pytest

from harness.errors import PlanError
from harness.records.turnaround import SubmittedTask, TurnaroundSlo

AUDIO_S = np.array([60.0, 120.0, 600.0, 60.0])
TURNAROUND_S = np.array([30.0, 240.0, 300.0, np.inf])


def test_a_limit_in_lengths_of_the_audio_and_one_in_seconds():
    per_audio, seconds = TurnaroundSlo.parse("turnaround_p75", "2x"), TurnaroundSlo.parse("turnaround_p50", 250)
    assert per_audio == TurnaroundSlo(0.75, 2.0, True) and seconds == TurnaroundSlo(0.5, 250.0, False)
    assert per_audio.value(TURNAROUND_S, AUDIO_S) == 2.0 and seconds.value(TURNAROUND_S, AUDIO_S) == 240.0
    assert per_audio.deadline_s(AUDIO_S).tolist() == [120, 240, 1200, 120]
    assert seconds.deadline_s(AUDIO_S).tolist() == [250] * 4
    assert (str(per_audio), str(seconds)) == ("turnaround p75 <= 2x", "turnaround p50 <= 250 s")


def test_a_task_that_did_not_end_is_the_slowest():
    assert TurnaroundSlo.parse("turnaround_p95", "9x").value(TURNAROUND_S, AUDIO_S) == np.inf
    assert np.isnan(TurnaroundSlo.parse("turnaround_p95", 1).value(np.zeros(0), np.zeros(0)))


@pytest.mark.parametrize(
    ("key", "limit", "message"),
    [
        ("turnaround", "2x", "write turnaround_p95"),
        ("turnaround_p0", "2x", "write turnaround_p95"),
        ("ttfa_p95_s", 1.0, "write turnaround_p95"),
        ("turnaround_p95", "2", "write 2x"),
        ("turnaround_p95", "0x", "write 2x"),
        ("turnaround_p95", -1, "write 2x"),
        ("turnaround_p95", True, "write 2x"),
        ("turnaround_p95", None, "write 2x"),
    ],
)
def test_what_is_no_slo_is_refused_in_words(key, limit, message):
    with pytest.raises(PlanError, match=message):
        TurnaroundSlo.parse(key, limit)


def test_a_task_that_failed_or_goes_on_past_its_deadline_violates_and_one_within_it_does_not_count():
    slo = TurnaroundSlo.parse("turnaround_p95", "2x")
    done = [SubmittedTask(0.0, 60.0, 30.0) for _ in range(20)]
    assert slo.of(done, 100.0) == pytest.approx(0.5)
    within, past = SubmittedTask(90.0, 60.0), SubmittedTask(0.0, 60.0)
    assert slo.of([*done, within, within], 100.0) == pytest.approx(0.5)
    assert slo.of([*done, past, past], 130.0) == math.inf
    assert slo.of([*done, *(SubmittedTask(0.0, 60.0, math.inf) for _ in range(2))], 100.0) == math.inf
    assert math.isnan(slo.of([within], 100.0)) and math.isnan(slo.of([], 100.0))
