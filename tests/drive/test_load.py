"""One description of a load: Locust's options are made from it, and make it again; trials keep their names."""

from pathlib import Path

import configargparse
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.drive.load import REQUEST_KNOBS, Load
from harness.drive.options import add_arguments, load_of
from harness.errors import InputError
from harness.records.load import TrialLoad
from harness.records.store import Run
from harness.sweep.trial import REPEAT_SEED, trial_id
from harness.traffic.arrivals import Arrivals, RateStage, Trace

ROOT = Path(__file__).resolve().parents[2]


def parsed(options: list[str]) -> dict:
    """Options as Locust's own parser hands them on."""
    parser = configargparse.ArgumentParser()
    parser.add_argument("-u", "--users", type=int, dest="num_users")
    parser.add_argument("-t", "--run-time")
    add_arguments(parser)
    return vars(parser.parse_args(options))


RATES = st.floats(1e-6, 1e4, allow_nan=False)
STAGES = st.lists(st.builds(RateStage, st.floats(1e-3, 1e5), RATES, RATES), min_size=1, max_size=4).map(tuple)
PROCESSES = st.one_of(
    st.builds(Arrivals, st.sampled_from(["constant", "poisson"]), RATES),
    st.builds(Arrivals, st.just("gamma"), RATES, st.floats(0.01, 100)),
    st.builds(lambda stages: Arrivals("stages", stages=stages), STAGES),
)
COMMON = {
    "seed": st.integers(0, 2**31),
    "steady": st.none() | st.integers(0, 50),
    "asks": st.fixed_dictionaries(
        {}, optional={"chunk_frames": st.integers(1, 100), "diffusion_steps": st.integers(1, 20)}
    ),
}
LIMITED = COMMON | {
    "seconds": st.none() | st.integers(1, 100_000).map(float),
    "iterations": st.none() | st.integers(1, 10**6),
}
LADDERS = st.builds(
    Load,
    sessions=st.sets(st.integers(1, 500), min_size=1, max_size=8).map(sorted).map(tuple),
    seconds=st.floats(0.1, 1e4),
    precision=st.none() | st.floats(1e-3, 0.9),
    until_saturated=st.booleans(),
    **COMMON,
)
CLOSED = st.builds(Load, **LIMITED)
OPEN = st.builds(Load, arrivals=PROCESSES, **LIMITED)


@settings(max_examples=300)
@given(st.one_of(LADDERS, CLOSED, OPEN))
def test_options_of_a_load_make_the_same_load_again(load):
    assert load_of(parsed(load.options())) == load


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("rate_per_s", [None, 4.0])
def test_a_trace_goes_by_the_path_of_its_file(tmp_path, rate_per_s, repeat):
    (tmp_path / "day.csv").write_text("TIMESTAMP\n1\n3\n")
    load = Load(arrivals=Arrivals("trace", rate_per_s, trace=Trace.read(tmp_path / "day.csv"), repeat=repeat))
    again = load_of(parsed(load.options()))
    assert again.arrivals.trace.path == load.arrivals.trace.path and again.record() == load.record()


def test_a_trace_without_a_file_has_no_options():
    trace = Trace("made.csv", "0" * 64, np.array([0.0, 1.0]))
    with pytest.raises(InputError, match="made.csv was not read from a file"):
        Load(arrivals=Arrivals("trace", trace=trace)).options()


POINT = {"neural_vocoder.delay_us": 900, "chunk_frames": 4}


@pytest.mark.parametrize(
    ("point", "load", "repeat", "name"),
    [
        (POINT, Load.ladder(5.0, 1, (1, 2), asks={"chunk_frames": 4}), 0, "ladder-adaaf50c60"),
        (POINT, Load.ladder(8, 7, (1, 4, 8), precision=0.03), 1, "ladder-bf13639d89"),
        ({}, Load.poisson(30.0, 12, 0.8421, 3, {"diffusion_steps": 5}), 0, "open-7c213cedae"),
        ({}, Load.poisson(60, 12, 2), 0, "open-a6e5e0a088"),
    ],
)
def test_trials_have_the_names_that_they_had_in_earlier_versions(point, load, repeat, name):
    """A stored run goes on: its trials are known by these names."""
    assert trial_id(point, load, repeat) == name


def load_of_record(record: TrialLoad, repeat: int) -> Load:
    seed = max(record.seed - repeat * REPEAT_SEED, 0)
    asks = {knob: getattr(record, knob) for knob in REQUEST_KNOBS if getattr(record, knob) is not None}
    if record.loop == "open":
        return Load.poisson(record.seconds, seed, record.rate_per_s, asks=asks)
    return Load.ladder(record.seconds, seed, record.sessions, asks=asks, precision=record.precision)


@pytest.mark.parametrize("run", ["sample-quick", "sample-sweep"])
def test_trials_of_the_stored_samples_still_have_their_names(run):
    trials = Run.open(ROOT / "results" / run).trials()
    for trial in trials:
        loads = [(load_of_record(trial.load, repeat), repeat) for repeat in range(3)]
        assert trial.trial_id in [trial_id(trial.deployment, load, repeat) for load, repeat in loads]
    assert trials
