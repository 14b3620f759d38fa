"""From the records of a load test to the rungs of a trial."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from harness.client.target import Target
from harness.deploy.config import Deployment
from harness.drive.generator import UserClass
from harness.drive.load import Load
from harness.drive.options import settings_for
from harness.drive.stop_rule import settle_s
from harness.records.load_log import Records
from harness.records.load_test import HeldRung, HostSummary, TestRun
from harness.records.schema import Chunks, Outcome, Result
from harness.sweep.trial import TrialRequest, _rungs, asked, deployed, failed_trial, trial_id
from harness.sweep.trial_log import note_of
from harness.traffic.mix import MIXES

SECOND = 10**9
RUNG_S = 4.0
WHY = "others took 0.60 of 2 cores, 32% of the 1.90 that the run used (backup, process 7, took 0.60)"


def heard(start_s: float, end_s: float) -> Result:
    times = np.arange(round(start_s * SECOND), round(end_s * SECOND), SECOND // 10, dtype=np.int64)
    chunks = Chunks(times, times - 1, np.full(len(times), 3200, dtype=np.int64))
    began, ended = int(times[0]) - 1, int(times[-1]) + 1
    return Result("r", "short", 1, 3, len(times), 0, 1, "closed", began, began, ended, Outcome.DONE, chunks=chunks)


def records_of(load_values: dict, rungs=()) -> Records:
    asked = settings_for(load_values, [UserClass("user", MIXES["quick"])]).record()
    run = TestRun(url="a:1", target=Target.of("a:1").record(), run_s=None, asked=asked)
    return Records(run=run, results=[heard(0.5, 20)], rungs=list(rungs))


def held(users: int, start_s: float, disturbed: str = "", others_share: float | None = 0.01) -> HeldRung:
    return HeldRung(
        users=users,
        start_ns=round(start_s * SECOND),
        end_ns=round((start_s + RUNG_S) * SECOND),
        others_share=others_share,
        stolen_share=0.002,
        disturbed=disturbed,
    )


def test_disturbed_rungs_are_apart_and_say_whether_they_were_measured_again():
    attempts = [held(1, 0), held(2, 4, WHY, 0.3), held(2, 8), held(4, 12, WHY, 0.3)]
    records = records_of({"ladder": "1,2,4", "rung_s": str(RUNG_S)}, attempts)
    rungs, disturbed = _rungs(records, None, (), ())
    settle_ns = round(settle_s(RUNG_S) * SECOND)
    assert [rung.start_ns for rung in rungs] == [settle_ns, 8 * SECOND + settle_ns]
    assert [(rung.others_share, rung.stolen_share, rung.disturbed) for rung in rungs] == [(0.01, 0.002, "")] * 2
    assert [(rung.start_ns - settle_ns, rung.disturbed, rung.repeated) for rung in disturbed] == [
        (4 * SECOND, WHY, True),
        (12 * SECOND, WHY, False),
    ]


def test_a_rung_of_older_records_knows_nothing_of_others():
    records = records_of({"ladder": "1,2", "rung_s": str(RUNG_S)}, [HeldRung(users=1, start_ns=0, end_ns=4 * SECOND)])
    ((rung,), disturbed) = _rungs(records, None, (), ())
    assert (rung.others_share, rung.stolen_share, rung.disturbed, disturbed) == (None, None, "", ())


def test_an_open_loop_is_one_rung_with_what_others_took():
    machine = HostSummary(
        samples=9, cores=2, stolen_share=0.01, stolen_share_max=0.1, busy_share=0.8, other_share=0.2,
        other_share_max=0.5, server_memory_bytes=1, server_events=(),
    )  # fmt: skip
    records = records_of({"rate_per_s": "1"})
    end = SimpleNamespace(start_ns=SECOND, end_ns=10 * SECOND, machine=machine)
    for seen, shares in ((machine, (0.2, 0.01)), (None, (None, None))):
        ((rung,), disturbed) = _rungs(records, SimpleNamespace(**{**vars(end), "machine": seen}), (), ())
        assert (rung.others_share, rung.stolen_share) == shares and disturbed == ()
        assert (rung.start_ns, rung.end_ns) == (SECOND, 10 * SECOND)


def test_the_note_of_a_ladder_says_what_was_measured_again_and_why():
    (rung,), (spoilt,) = _rungs(
        records_of({"ladder": "1,2", "rung_s": str(RUNG_S)}, [held(1, 0), held(2, 4, WHY, 0.3)]), None, (), ()
    )
    failed = failed_trial(TrialRequest({}, Load.ladder(RUNG_S, 1, (1, 2))), "")
    trial = replace(failed, valid=True, rungs=(rung,))
    assert note_of(trial).startswith("VALID, up to ")
    repeated = replace(spoilt, repeated=True)
    note = note_of(replace(trial, disturbed=(repeated, repeated, spoilt)))
    assert f"VALID (disturbed rungs: 2 measured again, 1 left out; {WHY}), up to " in note


def test_the_same_point_and_load_always_get_one_name():
    load = Load.ladder(5.0, 1, (1, 2))
    name = trial_id({"a.x": 1, "b.y": 2}, load)
    assert trial_id({"b.y": 2, "a.x": 1}, Load.ladder(5.0, 1, (1, 2))) == name
    others = [
        trial_id({"a.x": 1}, load),
        trial_id({"a.x": 1, "b.y": 2}, replace(load, seed=2)),
        trial_id({"a.x": 1, "b.y": 2}, load, repeat=1),
        trial_id({"a.x": 1, "b.y": 2}, Load.poisson(5.0, 1, 0.5)),
    ]
    assert len({name, *others}) == 5


def test_what_requests_ask_for_at_a_point_goes_to_locust_and_the_rest_to_triton():
    point = {"diffusion_steps": 5, "chunk_frames": 4, "neural_vocoder.delay_us": 900}
    options = Load.ladder(5.0, 1, (1, 2), asks=asked(point)).options()
    assert options[options.index("--diffusion-steps") + 1] == "5"
    assert options[options.index("--chunk-frames") + 1] == "4"
    assert deployed(Deployment(), point).knobs == {"neural_vocoder.delay_us": 900}


@pytest.mark.parametrize("kind", ["ladder", "open"])
def test_a_repeat_draws_other_requests_and_keeps_the_name_of_its_load(kind):
    load = Load.ladder(10.0, 7, (1, 2)) if kind == "ladder" else Load.poisson(10.0, 7, rate_per_s=2.0)
    repeat = TrialRequest({}, load, repeat=1)
    again = repeat.drawn_load
    assert TrialRequest({}, load).drawn_load == load
    assert again.seed != load.seed and replace(again, seed=7) == load
    failed = failed_trial(repeat, "it failed")
    assert (failed.load.seed, failed.trial_id) == (again.seed, trial_id({}, load, 1))
