"""What the scripts of benchmarks/service/ rest on: their gates, their callers, and whom a fault hits."""

import asyncio
import contextlib
import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from harness.service.settings import StudioSettings
from harness.service.worker import TaskWorker


@pytest.fixture
def load(monkeypatch):
    """``load(name)``: a script as a module, found as it is when it runs."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks" / "service"))
    return importlib.import_module


def test_a_fault_finds_the_process_of_the_consumer_that_holds_a_task(load):
    worker = TaskWorker(StudioSettings(), None, None, None)
    assert load("job_faults").pid_of(f"{worker.name}-3") == os.getpid()
    assert load("job_faults").pid_of("a-host-with-dashes-77-a1b2c3-0") == 77


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        ({"not_done": 1}, "not_done"),
        ({"long_not_done": 1}, "long_not_done"),
        ({"front_grew_mib": 50.0}, "front_grew_mib"),
        ({"redis_grew_mib": 50.0}, "redis_grew_mib"),
        ({"worker_grew_mib": 300.0}, "worker_grew_mib"),
    ],
)
def test_the_load_of_the_job_service_has_a_gate_for_each_loss_and_each_leak(load, worse, name):
    """A worker may grow by four copies of each carry: 30 MiB after 90 minutes."""
    jobs = load("jobs")
    fine = {"not_done": 0, "long_not_done": 0, "long_tasks": 2, "long_minutes": 90.0, "worker_grew_mib": 230.0}
    assert jobs.carry_mib(90.0) == pytest.approx(29.7, abs=0.1)
    assert jobs.problems_of(fine) == [] and jobs.problems_of(fine | worse) == [name]
    assert jobs.problems_of(fine | {"long_minutes": 10.0}) == ["worker_grew_mib"]


def test_a_poller_that_waits_for_its_first_task_longer_than_the_front_keeps_connections_still_follows_it(load):
    jobs = load("jobs")
    task = json.dumps({"status": "done", "ended": "2026-01-01T00:00:00.000Z"}).encode()

    async def answer(reader, writer):
        with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 0.5)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(task) + task)
            await writer.drain()
        writer.close()

    async def main():
        made, followed = asyncio.Queue(), jobs.Followed()
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            polling = asyncio.create_task(jobs._polls(server.sockets[0].getsockname()[1], made, followed))
            await asyncio.sleep(1.0)
            made.put_nowait({"self": "/v1/tasks/a"})
            made.put_nowait(None)
            await polling
        return followed.ends

    assert asyncio.run(main()) == ["done"]


def test_costs_of_a_task_that_come_out_below_zero_are_fitted_again_without_them(load, monkeypatch):
    """Clipping one of three costs leaves the others at what they were beside a negative one."""
    turnaround = load("turnaround")

    class Served:
        """A step of 10 ms; a segment costs 0.2 s less for each 1000 frames before it, and 0.3 s."""

        def ask(self, found):
            return found

        def rung(self, sessions, frames):
            return 0.01

        def turnarounds(self, plan):
            segments = int(plan.task_frames[0]) // turnaround.SEGMENT_FRAMES
            before = turnaround.SEGMENT_FRAMES * segments * (segments - 1) / 2
            return np.array([plan.task_frames[0] * 0.01 + 1.0 + 0.3 * (segments - 1) - 2e-4 * before])

    fitted = turnaround.fit(Served(), 30)
    for segments in (1, 12):
        took_s = Served().turnarounds(turnaround.Schedule("", None, np.array([75 * segments]), None, None))[0]
        found_s = fitted.task_s + fitted.between[0] * (segments - 1) + 75 * segments * 0.01
        assert fitted.between[1] == 0.0 and found_s == pytest.approx(took_s, abs=0.15)
