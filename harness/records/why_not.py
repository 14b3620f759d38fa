"""Why an option lost: a deployment, a topology or a number of devices, with what rules it out and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from harness.topology import Knobs

DEPLOYMENT, TOPOLOGY, DEVICES = "deployment", "topology", "devices"
BY_SLO, BY_RATE, BY_UTILISATION, BY_RANGE, BY_MEMORY, BY_COLLAPSE, BY_LADDERS, BY_UNKNOWN = (
    "slo", "rate", "utilisation", "range", "memory", "collapse", "ladders", "unknown",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RuledOut:
    """A losing option of a plan.

    ``option``: DEPLOYMENT (``knobs``), TOPOLOGY (``topology``, by its best deployment ``knobs``) or DEVICES
    (``devices``, one fewer than planned). ``at_qps``: the load at which it is judged: on one device the rate that the
    planned deployment sustains, for a number of devices the target.

    ``by``: the kind of ``limit`` that rules it out. BY_SLO: ``value`` of the SLO's metric against ``allowed``, in its
    unit. BY_RATE: requests/s that it sustains against those of the planned deployment. BY_UTILISATION: as shares.
    BY_RANGE: sessions on a device (95th percentile) against the most measured. BY_MEMORY: an SLO, violated as sessions
    wait for KV memory; without ``allowed``, not even one session fits in it. BY_COLLAPSE: throughput falls as sessions
    grow. BY_LADDERS: its ladders against those of the planned deployment, which has more. BY_UNKNOWN: nothing is
    known of it, for the reason in ``limit``.

    ``excess``: value / allowed - 1, the share by which it is beyond the limit (below, for a rate or ladders); None
    where infinite or unknown. ``certain``: False where the measurements do not tell it from the planned deployment.
    ``rate_per_s``: what one device of it sustains. ``basis``: simulated, extrapolated or measured; "" if none.
    """

    option: Annotated[str, Field(pattern="^(deployment|topology|devices)$")]
    topology: str
    knobs: Knobs
    devices: int | None = None
    at_qps: float | None
    by: Annotated[str, Field(pattern="^(slo|rate|utilisation|range|memory|collapse|ladders|unknown)$")]
    limit: str
    value: float | None = None
    allowed: float | None = None
    excess: float | None = None
    certain: bool
    rate_per_s: float | None = None
    basis: str
