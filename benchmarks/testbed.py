"""What the benchmarks of the instrument take from the tests: the server on a timetable, and the network that fails."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from network import Network  # noqa: E402
from timetable_server import FAILURE, TimetableServer  # noqa: E402

__all__ = ["FAILURE", "Network", "TimetableServer"]
