"""The load test of tasks, as it stands, against a front with a worker."""

import re
import subprocess
import sys
from pathlib import Path

from service_parts import Service

ROOT = Path(__file__).resolve().parents[2]


def test_authors_submit_follow_and_download(settings, target):
    with Service(settings(url=target, segment_s=4.0, per_minute=1000, jobs_at_once=4)) as service:
        command = [
            sys.executable, "-m", "locust", "-f", str(ROOT / "scenarios" / "jobs.py"), "--headless", "--only-summary",
            "-u", "3", "-t", "6s", "--stop-timeout", "20", "--host", service.url, "--job-seconds", "5",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        counts = service.ask(service.queue.counts())
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    turnaround = re.search(r"TASK\s+turnaround\s+(\d+)\s+0\(0.00%\)", said)
    assert turnaround and int(turnaround[1]) >= 3 and "turnaround per audio second" in said
    assert counts["done"] == int(turnaround[1]) and counts.get("failed", 0) == 0
