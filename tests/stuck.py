"""A test that outlives its timeout: the processes that it may wait for are killed.

pytest-timeout raises in the test. What cleans up after it may then wait for ever for a process that does not end: a
second exception is not raised. Where killing does not help (a call of a library that never returns), pytest ends its
own process (``faulthandler_timeout`` in pyproject.toml): pytest-xdist starts another, and the test has failed.
"""

import contextlib
import os
import threading

import psutil
import pytest

CLEANUP_S = 60.0
COLLECTION_FAILED: set[str] = set()


def allowed_s(item: pytest.Item) -> float:
    """How long a test and what cleans up after it may take, in seconds."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0] if marker else item.config.getini("timeout")) + CLEANUP_S


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    timer = threading.Timer(allowed_s(item), end_processes, [item.nodeid])
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


def end_processes(test: str) -> None:
    """Kill all that this process and its children started."""
    killed = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            killed.append(process.name())
            process.kill()
    os.write(2, f"\n{test} is stuck: killed were {', '.join(killed) or 'no processes'}\n".encode())


def pytest_collectreport(report):
    """pytest-xdist runs no test after an error while tests were collected: that is no run with a failure in it."""
    if report.failed:
        COLLECTION_FAILED.add(report.nodeid)


def pytest_sessionfinish(session):
    if COLLECTION_FAILED:
        session.exitstatus = pytest.ExitCode.INTERRUPTED
