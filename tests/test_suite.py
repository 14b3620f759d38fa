"""The suite itself: a test that hangs is ended, and what fails in `make test` runs once more, by itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MADE = subprocess.run(["make", "-n", "test"], cwd=TESTS.parent, capture_output=True, text=True, check=True).stdout
RECIPES = [line for line in MADE.splitlines() if " -m pytest " in line]
ENVIRONMENT = {
    "PYTHONPATH": str(TESTS),
    "PATH": "/usr/bin:/bin",
    "PYTEST_ADDOPTS": "-p no:locust -p stuck -o timeout=60",
}
CLEANUP = """
import subprocess, sys, time

def test_waits_for_a_process():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]):
        time.sleep(300)

def test_after_it():
    assert True
"""
NEVER_RETURNS = """
import ctypes, signal

def test_holds_the_interpreter():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    ctypes.PyDLL(None).pause()

def test_after_it():
    assert True
"""


def run(folder: Path, text: str, *options) -> str:
    (folder / "test_of_it.py").write_text(text)
    (folder / "conftest.py").write_text("import stuck\nstuck.CLEANUP_S = 1.0\n")
    command = [sys.executable, "-m", "pytest", "-n", "1", "--rootdir", folder, "-o", "timeout=1", *options, folder]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, cwd=folder)
    assert ended.returncode == 1
    return ended.stdout + ended.stderr


def test_a_cleanup_that_waits_for_a_process_ends(tmp_path):
    said = run(tmp_path, CLEANUP)
    assert "test_waits_for_a_process is stuck: killed were python" in said
    assert "1 failed, 1 passed" in said and "Timeout (>1.0s) from pytest-timeout" in said


def test_a_call_that_never_returns_ends_its_worker_and_the_next_test_runs(tmp_path):
    said = run(tmp_path, NEVER_RETURNS, "-o", "faulthandler_timeout=3", "-o", "faulthandler_exit_on_timeout=true")
    assert "1 failed, 1 passed" in said and "in test_holds_the_interpreter" in said
    assert "crashed while running" in said


FLAKY = """
from pathlib import Path

def test_fails_once():
    path = Path(__file__).with_name("seen")
    seen = path.exists()
    path.touch()
    assert seen

def test_passes():
    with open(Path(__file__).with_name("passes"), "a") as file:
        assert file.write("once ")
"""


@pytest.mark.parametrize(
    ("text", "passed", "sessions", "passes"),
    [
        (FLAKY, True, 2, 1),
        (FLAKY.replace("assert seen", "assert not path"), False, 2, 1),
        (f"{FLAKY}not python", False, 1, 0),
    ],
)
def test_what_failed_runs_once_more_and_what_never_ran_is_no_success(tmp_path, text, passed, sessions, passes):
    (tmp_path / "test_of_it.py").write_text(text)
    (tmp_path / "passes").touch()
    recipe = RECIPES[0].replace(".venv/bin/python", sys.executable)
    ran = subprocess.run(recipe, shell=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (ran.returncode == 0) is passed, ran.stdout
    assert ran.stdout.count("test session starts") == sessions
    assert (tmp_path / "passes").read_text().count("once") == passes


def test_every_part_of_the_suite_is_run_so():
    marks = ["not server", "server and not alone", "server and alone"]
    assert [re.findall("-m '(.+?)'", each) for each in RECIPES] == [[mark, mark] for mark in marks]
    assert all("|| { [ $? -eq 1 ] && " in each and "--last-failed " in each for each in RECIPES)
