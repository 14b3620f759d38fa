"""Others disturb a run where they take CPU that it could have used; the gate says who did."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.drive.disturbance import LEAST_NEEDED, HostSample, load_between
from harness.drive.generator import LoadSettings
from harness.drive.host_monitor import HostRecord
from harness.drive.load import Load
from harness.drive.load_report import report_of
from harness.drive.observed import ReaderTotals
from harness.drive.recorder import Recorder
from harness.drive.validity import undisturbed, undisturbed_rungs
from harness.records.load_test import HeldRung
from harness.traffic.mix import MIXES

SECOND = 10**9
LIMIT = 0.05


def sample(at_s, own, others, stolen=0.0, cores=2, seconds=1.0, named=()) -> HostSample:
    busy = (own + others) / cores
    return HostSample(
        round(at_s * SECOND), seconds, stolen / cores, busy, own / cores, others / cores, others=tuple(named)
    )


def load(*samples, cores=2, start_s=0.0, end_s=None):
    return load_between(samples, cores, round(start_s * SECOND), round((end_s or len(samples)) * SECOND))


def steady(own, others, stolen=0.0, cores=2):
    return load(*(sample(at, own, others, stolen, cores) for at in range(1, 7)), cores=cores)


@pytest.mark.parametrize(
    ("own", "others", "stolen", "cores", "disturbed"),
    [
        (1.9, 0.03, 0.0, 2, False),  # the background of an idle host
        (1.0, 0.04, 0.0, 2, False),
        (1.0, 1.0, 0.0, 2, True),  # half of the rate in issue: others took about one core
        (1.4, 0.5, 0.0, 2, True),
        (1.17, 0.07, 0.0, 2, False),  # one session of a ladder, beside what a host always does
        (1.17, 0.25, 0.0, 2, True),
        (1.0, 0.5, 0.0, 2, True),  # two cores may be two threads of one
        (6.0, 0.5, 0.0, 64, False),  # 8% of what the run needs, but 57 cores idle
        (6.0, 20.0, 0.0, 64, False),
        (6.0, 56.0, 0.0, 64, True),
        (60.0, 0.5, 0.0, 64, False),  # 1%
        (60.0, 3.5, 0.0, 64, True),
        (0.1, 0.1, 0.0, 2, False),  # hardly any load: nearly all is idle
        (1.5, 0.0, 0.2, 2, True),  # stolen time is missing wherever else cores idle
        (1.5, 0.0, 0.02, 2, False),
    ],
)
def test_what_others_took_counts_where_the_run_could_have_used_it(own, others, stolen, cores, disturbed):
    found = steady(own, others, stolen, cores)
    assert bool(found.disturbed(LIMIT)) is disturbed
    gate = undisturbed(found, LIMIT)
    assert gate.passed is not disturbed and f"others took {others:.2f} of {cores} cores" in gate.says


def test_bursts_count_though_half_of_the_time_a_core_is_idle():
    bursts = [sample(at, 1.0, 1.0 if at % 6 < 3 else 0.0) for at in range(1, 7)]
    found = load(*bursts)
    assert found.others == pytest.approx(0.5) and found.disturbed(LIMIT)


def test_the_process_that_took_most_is_named_and_many_of_one_name_are_one():
    build = [sample(at, 1.0, 0.9, named=[("cc1", 100 + at, 0.6), ("backup", 7, 0.3)]) for at in range(1, 5)]
    says = load(*build).disturbed(LIMIT)
    assert says == (
        "others took 0.90 of 2 cores: about 0.81 were missing to the run, 81% of the 1.00 that it used "
        "(cc1, 4 processes, took 0.60)"
    )
    one = load(*(replace(each, others=(("python3", 123, 0.9),)) for each in build)).disturbed(LIMIT)
    assert one.endswith("(python3, process 123, took 0.90)")
    assert load(*(sample(at, 1.0, 0.9) for at in range(1, 5))).disturbed(LIMIT).endswith("that it used")


def test_a_sample_counts_by_its_overlap_with_the_window():
    found = load(sample(1, 1.0, 1.0), sample(2, 1.0, 0.0), sample(3, 1.0, 0.0), start_s=0.5, end_s=3)
    assert found.others == pytest.approx(0.5 / 2.5)
    assert load(sample(1, 1.0, 1.0), start_s=0.6, end_s=3) is None  # too short to be judged
    unknown = replace(sample(2, 1.0, 1.0), other_share=math.nan)
    assert load(unknown) is None and load(sample(1, 1.0, 0.2), unknown).others == pytest.approx(0.2)


def test_who_used_the_cpu_is_not_testable_where_it_is_not_known():
    gate = undisturbed(None, LIMIT)
    assert gate.passed is None and "not known" in gate.says
    assert HostRecord().load(0, SECOND) is None


@given(
    own=st.floats(0, 64),
    others=st.floats(-0.2, 64),
    stolen=st.floats(0, 8),
    more=st.floats(0, 8),
    cores=st.integers(1, 64),
)
def test_more_of_others_or_less_need_never_makes_a_run_undisturbed(own, others, stolen, more, cores):
    found = steady(own, others, stolen, cores)
    assert found.others >= 0 and 0 <= found.felt <= found.others + found.stolen + 1e-9
    assert found.felt_share == pytest.approx(found.felt / max(own, LEAST_NEEDED))
    assert steady(own, max(others, 0) + more, stolen, cores).felt >= found.felt - 1e-9
    assert steady(own, others, stolen + more, cores).felt >= found.felt - 1e-9
    if others + stolen <= 0:
        assert not found.disturbed(LIMIT)


def reported(host: HostRecord, rungs=(), max_others=LIMIT, **load):
    """The report of a load test of ten seconds beside others."""
    recorder = Recorder(LoadSettings(MIXES["quick"], Load(**load), max_others=max_others), "127.0.0.1:1", None)
    recorder.begin(0)
    for each in rungs:
        recorder.add_rung(each)
    return report_of(recorder.observed(10 * SECOND, ReaderTotals(), host))


def test_a_load_test_that_others_disturb_is_invalid_for_its_window_and_a_ladder_for_its_rungs():
    host = HostRecord(tuple(sample(at, 1.0, 0.6, named=[("backup", 7, 0.6)]) for at in range(1, 11)), cores=2)
    beside = {gate.name: gate for gate in reported(host).certificate.gates}["other load"]
    assert beside.passed is False and beside.says.endswith(
        "(backup, process 7, took 0.60): stop what else runs here, or raise max_others (5%)"
    )
    assert {gate.name: gate.passed for gate in reported(host, max_others=0.9).certificate.gates}["other load"]
    rungs = [rung(1), rung(2), rung(4), rung(8, "others took 0.60 of 2 cores", 1), rung(8, "others took it", 2)]
    report = reported(host, rungs, sessions=(1, 2, 4, 8))
    assert {gate.name: gate.passed for gate in report.certificate.gates}["other load"]
    note = (
        "disturbed and measured again: rungs of 8 sessions; left out: rungs of 8 sessions; others took 0.60 of 2 cores"
    )
    assert note in report.reasons
    assert "other load" not in {gate.name for gate in reported(HostRecord()).certificate.gates}


def rung(users, disturbed="", start_s=0):
    return HeldRung(users=users, start_ns=start_s, end_ns=start_s + 1, others_share=0.3, disturbed=disturbed)


def test_a_ladder_needs_three_rungs_that_nobody_disturbed():
    says = "others took 0.60 of 2 cores: about 0.56 were missing (cc1, process 5, took 0.6)"
    spoilt = [rung(4, says), rung(8, says)]
    gate = undisturbed_rungs([rung(1), rung(2), *spoilt])
    assert gate.passed is False and gate.says.startswith(f"only 2 rungs were measured undisturbed, since {says}")
    assert undisturbed_rungs([rung(1), rung(2), *spoilt, rung(8)]).passed  # measured again
    assert undisturbed_rungs([rung(1), rung(2)]).passed  # as short as the plan has it
    assert undisturbed_rungs([]).passed is None
