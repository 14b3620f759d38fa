"""What benchmarks reuse from the tests: a timetable server, a faulty network, a device with known physics."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import capacity_truth  # noqa: E402
import queueing  # noqa: E402
from network import Network  # noqa: E402
from timetable_server import FAILURE, TimetableServer  # noqa: E402

__all__ = ["FAILURE", "Network", "TimetableServer", "capacity_truth", "queueing"]
