"""The profile of a GPU that nobody measured, in the form of a measured one, with an interval for every time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from harness import wire
from harness.cards import calibration, memory
from harness.cards.assumptions import Assumptions
from harness.cards.card import BANDWIDTH, THROUGHPUT, Card
from harness.cards.costs import ModelCosts, Work
from harness.cards.ranges import HIGH, LOW, draws_of
from harness.cards.times import CallTimes, CardTimes
from harness.device_profile import (
    ESTIMATE,
    ESTIMATED,
    PREFILL,
    ModelSizes,
    Profile,
    ProfileManifest,
    ProfilePoint,
    StagePoint,
)
from harness.errors import InputError
from harness.host.provenance import commit

# The points of a full measured profile (vibevoice/profiling/profiler.py), and a batch of 128 sessions.
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (100, 400, 7_600, 32_000, 63_000)
PROMPTS, PROMPT_CONTEXTS = (64, 256, 1024, 4096), (0, 7_600, 32_000)
STEPS, STEPS_BATCH, VOICE_SECONDS = (5, 20), 8, (3, 10, 30)
_SEED = 0

Timed = Callable[[CardTimes], CallTimes]


def assumptions_for(card: Card, costs: ModelCosts, topology: str, measured: Profile | None = None) -> Assumptions:
    """The ranges for a card; with a measured profile of another card, narrowed to what that one shows.

    Raises InputError for a profile from which nothing can be learned.
    """
    if topology not in wire.TOPOLOGIES:
        raise InputError(f"--topology {topology}: use one of {', '.join(wire.TOPOLOGIES)}")
    free = Assumptions.of(card, topology, ESTIMATED)
    return free if measured is None else calibration.calibrated(free, card, costs, topology, measured)


def estimated_profile(
    card: Card, costs: ModelCosts, topology: str, assumptions: Assumptions, command: str = ""
) -> Profile:
    """The estimated profile of a card. The times of a fused engine are those of the parts of its step.

    Raises InputError where the model does not fit the card.
    """
    budget = memory.budget_of(card, costs, topology)
    if not budget.room_bytes:
        raise InputError(
            f"preset {costs.preset} does not fit the {card.name}: weights and processes of the {topology} topology "
            f"take {(budget.total_bytes - budget.free_bytes) / 1e9:.1f} GB of {card.memory_gb:g}; choose a larger "
            "card, or --topology fused"
        )
    estimator = _Estimator(card, costs, topology, assumptions)
    reached = assumptions.values(wire.LLM, {})
    return Profile(
        device=f"{card.name} ({assumptions.basis})",
        preset=costs.preset,
        dtype=costs.dtype,
        manifest=ProfileManifest(
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            commit=commit(),
            notes=f"{card.source}; {assumptions.note or 'nothing was measured on this card'}",
        ),
        model=ModelSizes(
            hidden_size=costs.hidden_size,
            kv_bytes_per_token=costs.kv_bytes_per_token,
            kv_room_bytes=budget.room_bytes,
            state_values=costs.state_values,
        ),
        bandwidth_gb_s=_rounded(card.bandwidth_gb_s * reached[BANDWIDTH]),
        tflop_s=_rounded(card.bf16_tflop_s * reached[THROUGHPUT]),
        stages=estimator.stages(),
        basis=assumptions.basis,
        note=f"{assumptions.basis}, not measured{f': {assumptions.note}' if assumptions.note else ''}",
        topology=topology,
        ranges={
            name: (_rounded(low), _rounded(likely), _rounded(high))
            for name, (low, likely, high) in assumptions.ranges().items()
        },
    )


class _Estimator:
    def __init__(self, card: Card, costs: ModelCosts, topology: str, assumptions: Assumptions):
        self.costs, self.topology = costs, topology
        draws = draws_of(assumptions.names, np.random.default_rng(_SEED))
        self.likely = CardTimes(card, costs, topology, assumptions)
        self.drawn = CardTimes(card, costs, topology, assumptions, draws)

    def stages(self) -> dict[str, tuple[ProfilePoint, ...]]:
        longest, costs, of = self.costs.most_positions, self.costs, self.topology
        contexts = [context for context in CONTEXTS if context <= 2 * longest]
        prompts = [(t, c) for t, c in itertools.product(PROMPTS, PROMPT_CONTEXTS) if t + c <= longest]
        denoised = [(batch, wire.DEFAULT_DIFFUSION_STEPS) for batch in BATCHES]
        denoised += [(STEPS_BATCH, steps) for steps in STEPS]
        return {
            wire.LLM: tuple(
                self._point(lambda t, b=b, c=c: t.step(b, c), costs.step(of, b, c), batch=b, context=c)
                for b, c in itertools.product(BATCHES, contexts)
            ),
            PREFILL: tuple(
                self._point(lambda t, n=n, c=c: t.prefill(n, c), costs.prefill(of, n, c), tokens=n, context=c)
                for n, c in prompts
            ),
            wire.DIFFUSION: tuple(
                self._point(lambda t, b=b, s=s: t.denoise(b, s), costs.denoise(of, b, s), batch=b, steps=s)
                for b, s in denoised
            ),
            wire.VOCODER: tuple(self._point(lambda t, b=b: t.vocode(b), costs.vocode(of, b), batch=b) for b in BATCHES),
            wire.VOICE: tuple(
                self._point(lambda t, s=s: t.encode(s), costs.encode(of, s * wire.FRAMES_PER_SECOND), seconds=s)
                for s in VOICE_SECONDS
            ),
        }

    def _point(self, timed: Timed, work: Work, **at: Any) -> StagePoint:
        likely, drawn = timed(self.likely), timed(self.drawn).ms
        low, high = np.quantile(drawn, (LOW, HIGH))
        times = {"ms": likely.ms, "device_ms": likely.device_ms, "low_ms": low, "high_ms": high}
        times |= {"roofline_ms": self.likely.floor_ms(work)}
        given: dict[str, Any] = {name: _rounded(value) for name, value in times.items()}
        given |= {"launches": round(work.launches), "bytes": int(work.bytes), "gflop": float(work.operations / 1e9)}
        point = StagePoint(**given, **at, device_ms_from=ESTIMATE)
        return replace(point, host_ms=_rounded(point.ms - point.turn_ms))


def file_name(card: Card, profile: Profile) -> str:
    """The name of a profile's file: ``h100-sxm-1.5b-fused-estimated.json``."""
    words = (card.key or card.name, profile.preset, profile.topology, profile.known_as)
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower()) + ".json"


def _rounded(value: float) -> float:
    return float(f"{float(value):.5g}")
