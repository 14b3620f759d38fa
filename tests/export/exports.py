"""What tests of exports share: the sample run, and a time before its plan expires."""

from datetime import UTC, datetime
from pathlib import Path

from harness.export.fleet import Accepted, PlannedFleet, fleet_of

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "results" / "sample-quick"
BEFORE_EXPIRY = datetime(2026, 12, 1, tzinfo=UTC)
SIGNED = Accepted()


def planned_fleet() -> PlannedFleet:
    """The fleet of the sample run for 5 requests/s."""
    return fleet_of(SAMPLE, 5, SIGNED, BEFORE_EXPIRY)
