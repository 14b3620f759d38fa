"""The load tests of the studio, as they stand, against a front with a worker."""

import re
import subprocess
import sys
from pathlib import Path

from service_parts import Service

ROOT = Path(__file__).resolve().parents[2]


def drive(service, scenario, *options):
    """Run a scenario; returns its exit code and what it said."""
    command = [
        sys.executable, "-m", "locust", "-f", str(ROOT / "scenarios" / scenario), "--headless", "--only-summary",
        "--stop-timeout", "20", "--host", service.url, "--job-seconds", "5", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout + done.stderr


def test_authors_submit_follow_and_download(settings, target):
    with Service(settings(url=target, segment_s=4.0, per_minute=1000, jobs_at_once=4)) as service:
        code, said = drive(service, "jobs.py", "-u", "3", "-t", "6s", "--turnaround-p95", "100")
        counts = service.ask(service.queue.counts())
    assert code == 0, said
    assert "SLO turnaround p95 <= 100 s: met" in said
    turnaround = re.search(r"TASK\s+turnaround\s+(\d+)\s+0\(0.00%\)", said)
    assert turnaround and int(turnaround[1]) >= 3 and "turnaround per audio second" in said
    assert counts["done"] == int(turnaround[1]) and counts.get("failed", 0) == 0


def test_a_day_has_streams_and_tasks_and_a_violated_slo_is_the_exit_code(settings, target):
    with Service(settings(url=target, segment_s=4.0, per_minute=10_000, jobs_at_once=4)) as service:
        day = "--day-minutes", "0.1", "--listeners", "6", "--authors", "1", "--stream-seconds", "2"
        code, said = drive(service, "day.py", *day, "--ttfa-p95", "50", "--turnaround-p95", "0.0001x")
        counts = service.ask(service.queue.counts())
    assert code == 1, said
    assert "SLO first audio p95 <= 50 s: met" in said and "SLO turnaround p95 <= 0.0001x: violated" in said
    streams = re.search(r"STREAM\s+first audio\s+(\d+)\s+0\(0.00%\)", said)
    assert streams and int(streams[1]) >= 5 and counts["done"] >= 1


def test_tasks_that_fail_at_once_are_no_fast_ones(settings, target, conduct):
    conduct.refuse = "it does not fit"
    with Service(settings(url=target, segment_s=4.0, per_minute=1000, jobs_at_once=4)) as service:
        code, said = drive(service, "jobs.py", "-u", "2", "-t", "4s", "--turnaround-p95", "100")
        counts = service.ask(service.queue.counts())
    assert counts["failed"] >= 1 and code == 1 and "SLO turnaround p95 <= 100 s: violated (inf s)" in said, said


def test_an_slo_that_cannot_be_read_is_said_before_anything_is_sent(settings, target):
    with Service(settings(url=target), works=False) as service:
        code, said = drive(service, "jobs.py", "-u", "1", "-t", "1s", "--turnaround-p95", "soon")
        assert code != 0 and "write 2x (of the audio's length), or seconds" in said and "Traceback" not in said
        assert not service.ask(service.queue.counts())
