"""When something breaks, every request has one ending, the endings add up, and nothing recorded is lost."""

import sys
from pathlib import Path

import pytest
from timetable_server import TimetableServer

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "load"))

import faults  # noqa: E402

pytestmark = pytest.mark.server
LIVED_THROUGH = [fault for fault in faults.FAULTS if fault.taken is not None]
DEADLY = [fault for fault in faults.FAULTS if fault.taken is None]
IN_A_RUN = {"client stopped with Ctrl-C", "Locust killed", "reader process killed", "server killed"}
RUNS = [fault for fault in faults.RUN_FAULTS if fault.name in IN_A_RUN]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with TimetableServer(faults.WORDS, root=tmp_path_factory.mktemp("timetable")) as server:
        yield server


@pytest.fixture
def doomed(tmp_path):
    with TimetableServer(faults.WORDS, root=tmp_path) as server:
        yield server


@pytest.mark.parametrize("fault", LIVED_THROUGH, ids=lambda fault: fault.name)
def test_requests_that_a_fault_strikes_end_as_it_says_and_no_others(server, fault):
    assert faults.instrument(server, fault).wrong == ()


@pytest.mark.parametrize("fault", DEADLY, ids=lambda fault: fault.name)
def test_requests_end_when_their_server_does(doomed, fault):
    assert faults.instrument(doomed, fault).wrong == ()


@pytest.mark.parametrize("fault", [fault for fault in RUNS if fault.lives], ids=lambda fault: fault.name)
def test_a_struck_run_accounts_for_all_that_the_server_took(server, fault):
    assert faults.run(server, fault).wrong == ()


@pytest.mark.parametrize("fault", [fault for fault in RUNS if not fault.lives], ids=lambda fault: fault.name)
def test_a_struck_run_accounts_for_all_that_it_sent(doomed, fault):
    assert faults.run(doomed, fault).wrong == ()
