"""Names of the devices of a run, by where they are."""

from __future__ import annotations

from harness.records.schema import RunManifest

ELSEWHERE = "the Triton at ", "Triton of "  # how names begin of devices that the harness did not deploy
CLUSTER = "host of the Ray cluster "


def is_here(manifest: RunManifest) -> bool:
    """Whether the run's server was started on its own host."""
    return not manifest.device.startswith((*ELSEWHERE, CLUSTER))
