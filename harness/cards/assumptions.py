"""What is not known before a GPU is measured: unknowns by name, their ranges, and which measurement narrows each.

The ranges are assumptions. They are wide, were written down from published figures, and are never fitted to the
figures that benchmarks/gpu/estimates.py compares estimates with; that script shows how they fare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from harness import wire
from harness.cards.card import BANDWIDTH, THROUGHPUT, Card
from harness.cards.ranges import Draw, Number, Range, at
from harness.device_profile import PREFILL

ESTIMATED_STAGES = (wire.LLM, PREFILL, wire.DIFFUSION, wire.VOCODER, wire.VOICE)
MEMORY, COMPUTE = "memory efficiency of kernels", "compute efficiency of kernels"
ACTIVATIONS, LAUNCH = "activations through memory", "launch cost in a graph"
EAGER, HOST = "launch cost without a graph", "host time"
HOP, SPLIT = "hop between stages", "batches split between stages"
FIRST_STEPS, PROCESSES = "steps before first audio", "memory of processes"

OF_STAGES = {
    MEMORY: Range(low=0.45, likely=0.7, high=0.95, source="of the bandwidth reached; decoding engines: 0.5 to 0.9"),
    COMPUTE: Range(low=0.25, likely=0.5, high=0.8, source="of the throughput reached; prompts in engines: 0.3 to 0.7"),
    ACTIVATIONS: Range(low=0.3, likely=0.8, high=1.2, source="of the counted bytes, those that caches do not hold"),
    LAUNCH: Range(low=1.3, likely=2.2, high=4.0, source="µs; NVIDIA on CUDA graphs (2019): 3.4 for a kernel of 2.9"),
}  # fmt: skip
COMMON = {
    EAGER: Range(low=5.0, likely=11.0, high=25.0, source="µs a kernel; CUDA alone 4 to 6, torch's dispatch the rest"),
    HOST: Range(low=0.35, likely=1.0, high=3.0, source="times HOST_MS: copies and Python around a step"),
}
OF_STAGED = {
    HOP: Range(low=0.3, likely=0.8, high=1.6, source="ms between stages in Triton; 0.3 to 0.5 on an idle CPU host"),
    SPLIT: Range(low=1.0, likely=2.0, high=4.0, source="sessions spread over stages; processes in turns on a GPU"),
}  # fmt: skip
OF_SERVING = {
    FIRST_STEPS: Range(low=1.5, likely=3.0, high=6.0, source="frame steps between the end of a prompt and first audio"),
    PROCESSES: Range(low=0.7, likely=1.0, high=1.4, source="times the bytes of gpu_memory.py"),
}
HOST_MS = {wire.STAGED: (0.4, 0.006), wire.FUSED: (0.3, 0.01)}  # of a step, and of each session in it
EAGER_HOST_MS = 0.3  # of a call that is no graph, beside its launches

PROFILE, QUICK, STREAMS = "profile", "quick", "streams"
MEASUREMENTS = {
    PROFILE: (
        "harness profile --preset {preset} --device cuda", 7.0,
        (BANDWIDTH, THROUGHPUT, MEMORY, COMPUTE, ACTIVATIONS, LAUNCH, EAGER, HOST),
    ),
    QUICK: (
        "harness profile --preset {preset} --device cuda --quick --budget-seconds 25", 0.5,
        (BANDWIDTH, THROUGHPUT, EAGER, LAUNCH),
    ),
    STREAMS: (
        "python benchmarks/gpu/streams.py --preset {preset} --device gpu --topology {topology}", 3.0,
        (HOP, SPLIT, FIRST_STEPS, PROCESSES, HOST),
    ),
}  # fmt: skip
"""By name: the command, its minutes on the GPU, and the unknowns that it settles."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """The ranges behind an estimate: of the card, of each stage, of all stages, and of serving.

    A draw places an unknown for all stages alike: errors of a guess are shared. ``basis``: device_profile.ESTIMATED or
    SCALED; ``note``: where narrower ranges come from.
    """

    shares: Mapping[str, Range]
    stages: Mapping[str, Mapping[str, Range]]
    common: Mapping[str, Range]
    basis: str
    note: str = ""

    @classmethod
    def of(cls, card: Card, topology: str, basis: str) -> Assumptions:
        """The ranges for a card that nobody measured."""
        serving = {**OF_SERVING, **(OF_STAGED if topology == wire.STAGED else {})}
        return cls(
            shares=card.shares,
            stages=dict.fromkeys(ESTIMATED_STAGES, OF_STAGES),
            common={**COMMON, **serving},
            basis=basis,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every unknown, once."""
        of_stages = dict.fromkeys(name for ranges in self.stages.values() for name in ranges)
        return (*self.shares, *of_stages, *self.common)

    def values(self, stage: str, draw: Draw) -> dict[str, Number]:
        """The value of every unknown, for a stage."""
        return {**at(self.shares, draw), **at(self.stages[stage], draw), **at(self.common, draw)}

    def common_values(self, draw: Draw) -> dict[str, Number]:
        return at(self.common, draw)

    def with_stage(self, stage: str, **changes: Range) -> Assumptions:
        """With other ranges of a stage, by the names of unknowns."""
        return replace(self, stages={**self.stages, stage: {**self.stages[stage], **changes}})

    def ranges(self) -> dict[str, tuple[float, float, float]]:
        """Every range as (low, likely, high), named ``stage: unknown`` where stages differ."""
        found = {name: each for name, each in (*self.shares.items(), *self.common.items())}
        for stage, own in self.stages.items():
            for name, each in own.items():
                alike = all(others.get(name) == each for others in self.stages.values())
                found[name if alike else f"{stage}: {name}"] = each
        return {name: (each.low, each.likely, each.high) for name, each in found.items()}
