"""What the simulator refuses, and how its compiled code is kept."""

from pathlib import Path

import numpy as np
import pytest

from harness.capacity.simulator import engine
from harness.capacity.simulator.compiled import COMPILED_FILES
from harness.capacity.simulator.engine import Counting, SimulationEngine
from harness.capacity.simulator.layout import SETUP, sources
from harness.capacity.simulator.pool import Autoscaler, Planned, Pool, random_failures
from harness.errors import InputError
from harness.jit import kept


def tenth(n):
    return 0.1 + 0 * n


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "1 device or more"),
        ({"routing": "nearest"}, "unknown routing 'nearest': use one of shared"),
        ({"on_failure": "weep"}, "unknown on_failure"),
        ({"queue_limit": -1}, "a queue holds 0"),
        ({"patience_s": -1.0}, "patience is 0"),
        ({"memory_bytes": 0.0}, "memory is above 0"),
        ({"planned": (Planned(0.0, "fail", 2),)}, "not one of 0 to 1"),
        ({"autoscaler": Autoscaler(3, 4, 1, 1, 0)}, "begins with as many devices as its autoscaler allows"),
        ({"token_s": -1.0}, "a token of context takes 0"),
        ({"step_time": lambda n: -n}, "more than 0 seconds"),
        ({"step_time": lambda n: 1e-169 * n}, "1e-09 to 1e\\+06 s"),
        ({"step_time": lambda n: 1e169 * n}, "1e-09 to 1e\\+06 s"),
    ],
)
def test_a_pool_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        SimulationEngine(Pool(**({"devices": 2, "step_time": tenth} | changes)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Planned(0.0, "explode", 0), "a device can fail, repair, drain, raise"),
        (lambda: Autoscaler(2, 1, 1, 1, 0), "maximum not below it"),
        (lambda: Autoscaler(1, 2, 1, 0.5, 0), "must be in order"),
        (lambda: Autoscaler(1, 2, 1, 1, 0, every_s=0), "above 0"),
        (lambda: Autoscaler(1, 2, 1, 1, 0, stabilise_s=-1), "stabilise_s must be 0 or more"),
        (lambda: Autoscaler(1, 2, 1, 1, 0, floors=((5, 1), (1, 1))), "in order of time"),
        (lambda: Counting(("one",), 0.0), "more than 0 seconds"),
        (lambda: Counting(("one",), 1.0, windows=5, batches=2), "cannot be divided evenly"),
        (lambda: Counting(("one",), 1.0, limits={"two": {}}), "a limit is one on ttfa_s, rtf, stall_s of one"),
        (lambda: Counting(("one",), 1.0, limits={"one": {"joy": 1}}), "not {'joy': 1} of one"),
        (lambda: random_failures(1, 10, 0, 1, np.random.default_rng()), "between failures"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_an_autoscaler_without_an_end_is_refused():
    scaled = SimulationEngine(Pool(1, tenth, autoscaler=Autoscaler(1, 2, 1, 1, 0)))
    with pytest.raises(InputError, match="when to stop"):
        scaled.finish()


def test_code_is_compiled_for_the_process_alone_where_no_folder_can_be_written():
    asked = []

    def jit(cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    assert kept(len, jit) is len
    assert asked == [True, False]


def test_every_file_of_compiled_code_is_in_the_name_that_kept_code_goes_by():
    folder = Path(engine.__file__).parent
    users = {path.name for path in folder.glob("*.py") if "@compiled" in path.read_text()}
    assert users | {"compiled.py"} == set(COMPILED_FILES)
    assert sources() in SETUP.names
