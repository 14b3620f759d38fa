"""What ``heldout.py`` fits and what it holds out: deployments, mixes and shares of the highest rate."""

from __future__ import annotations

from dataclasses import dataclass

from harness import wire

SLOS = {"short": {"ttfa_p95_s": 1.5, "rtf_p95": 0.9}}
MIXES = {
    "fitted": {
        "short": {"weight": 0.7, "length": {"uniform": [4, 12]}, "speakers": [1, 2]},
        "long": {"weight": 0.3, "length": {"uniform": [20, 60]}, "speakers": [2, 4]},
    },
    "longer": {
        "short": {"weight": 0.5, "length": {"uniform": [6, 18]}, "speakers": [1, 1]},
        "long": {"weight": 0.5, "length": {"lognormal": {"median": 30, "sigma": 0.5, "max": 120}}, "speakers": [1, 4]},
    },
    "ninety": {  # half of the sessions in progress last 90 minutes
        "short": {"weight": 0.998, "length": {"uniform": [6, 16]}, "speakers": [1, 2]},
        "ninety": {"weight": 0.002, "length": {"fixed": 5400}, "speakers": [4, 4]},
    },
}
SHARES = (0.6, 0.85)
NEAR = 0.95  # near saturation, where predictions are hardest: of one GPU with sessions of some seconds


def delays(ms: float) -> dict:
    return {f"{stage}.delay_us": round(1000 * ms) for stage in wire.STAGES}


@dataclass(frozen=True)
class Case:
    """A held-out deployment under a mix. ``patience``: factor of rung durations; 90-minute sessions open slowly."""

    name: str
    knobs: dict
    mix: str = "fitted"
    gpus: int = 1
    patience: int = 1

    def shares(self) -> tuple[float, ...]:
        """Shares of the highest rate of its open-loop runs."""
        return (*SHARES, NEAR) if self.gpus == self.patience == 1 else SHARES


FITTED = (
    delays(0),
    delays(25),
    {**delays(0), f"{wire.DIFFUSION}.instances": 2},
    {**delays(0), f"{wire.VOCODER}.delay_us": 20_000},
    delays(5),
    {**delays(0), **{f"{stage}.max_batch": 4 for stage in wire.STAGES}},
)
CASES = (
    Case("10 ms delay", delays(10)),
    Case("delay of one stage, longer mix", {**delays(0), f"{wire.DIFFUSION}.delay_us": 15_000}, "longer"),
    Case("batches up to 8", {**delays(5), **{f"{stage}.max_batch": 8 for stage in wire.STAGES}}),
    Case("2 diffusion instances, 5 ms delay", {**delays(5), f"{wire.DIFFUSION}.instances": 2}),
    Case("90-minute sessions", delays(10), "ninety", patience=5),
    Case("2 GPUs", delays(10), "fitted", 2),
)
