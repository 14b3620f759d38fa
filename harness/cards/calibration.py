"""Narrower ranges from the measured profile of another card: its kernels' efficiency, launches and host.

For each stage the times of the model of ``times.py`` are fitted to those of the profile, in logarithms, with the free
ranges as the prior (a range's half is taken as two standard deviations). What a stage's points cannot tell apart
stays near its prior. Between two cards the parameters are assumed to differ by the factors below, however well they
were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize

from harness import wire
from harness.cards.assumptions import ACTIVATIONS, COMPUTE, EAGER, HOST, HOST_MS, LAUNCH, MEMORY, Assumptions
from harness.cards.card import BANDWIDTH, THROUGHPUT, Card, card_of
from harness.cards.costs import PLAIN, ModelCosts
from harness.cards.ranges import Range
from harness.device_profile import MEASURED, PREFILL, SCALED, Profile, StagePoint
from harness.errors import InputError

BETWEEN_CARDS = {MEMORY: 1.15, COMPUTE: 1.15, ACTIVATIONS: 1.2, LAUNCH: 1.2, EAGER: 1.3, HOST: 1.3}
_OF_A_STAGE = (MEMORY, COMPUTE, ACTIVATIONS, LAUNCH)
_ERROR = 0.05  # relative standard deviation of a profile's point from the model
_FEWEST = 3  # points of a stage
_EAGER_US = 4.0  # of host time for each launch: with more, a step is no graph


@dataclass(frozen=True)
class _Columns:
    """The terms of a stage's device time at each point, in milliseconds at efficiency 1, and the measured time."""

    launches: np.ndarray
    moved_ms: np.ndarray
    activations_ms: np.ndarray
    computed_ms: np.ndarray
    device_ms: np.ndarray

    def predicted_ms(self, values: Mapping[str, float]) -> np.ndarray:
        moved = (self.moved_ms + values[ACTIVATIONS] * self.activations_ms) / values[MEMORY]
        return self.launches * values[LAUNCH] / 1e3 + np.maximum(moved, self.computed_ms / values[COMPUTE])


def calibrated(free: Assumptions, card: Card, costs: ModelCosts, topology: str, measured: Profile) -> Assumptions:
    """The ranges for ``card`` in a topology, narrowed by a profile that was measured on the staged stages.

    Raises InputError for a profile of another preset, of an estimate, or without separate times of its device.
    """
    _check(measured, costs)
    variant = _variant(measured, costs)
    source = f"measured on {measured.device}"
    stages = dict(free.stages)
    for stage in stages:
        columns = _columns(stage, measured, costs, variant)
        if len(columns.device_ms) >= _FEWEST and _runs_the_same(stage, topology):
            stages[stage] = _fitted(columns, free.stages[stage], source)
    launch = _common_launch([stages[stage][LAUNCH] for stage in stages if stages[stage] is not free.stages[stage]])
    if launch:
        stages = {stage: {**own, LAUNCH: launch} if own is free.stages[stage] else own for stage, own in stages.items()}
    common = {**free.common, **_host(measured, free.common, source)}
    return replace(
        free, shares=_shares(free, card, measured), stages=stages, common=common, basis=SCALED,
        note=f"efficiency of kernels, launches and host from the profile of {measured.device}",
    )  # fmt: skip


def _check(measured: Profile, costs: ModelCosts) -> None:
    if measured.known_as != MEASURED:
        raise InputError(f"--from: the profile of {measured.device} is {measured.known_as}, not measured: give another")
    if measured.preset != costs.preset:
        raise InputError(f"--from: it was measured at preset {measured.preset}, not {costs.preset}: change --preset")
    if not measured.bandwidth_gb_s or not measured.tflop_s:
        raise InputError("--from: it has no bandwidth_gb_s or tflop_s: profile that GPU again with `harness profile`")
    if not _separated(measured, wire.LLM):
        raise InputError(
            f"--from: the profile of {measured.device} does not separate the time of its GPU from its host's (a CPU "
            "has no GPU): give one that `harness profile --device cuda` wrote"
        )


def _separated(measured: Profile, stage: str) -> list[StagePoint]:
    points = [each for each in measured.stages.get(stage, ()) if isinstance(each, StagePoint)]
    return [each for each in points if each.is_separated and each.launches and each.bytes and each.gflop is not None]


def _variant(measured: Profile, costs: ModelCosts) -> str:
    """Which counts of activations go with the profile: those whose launches of an LLM step are nearest."""
    seen = float(np.median([point.launches or 0 for point in _separated(measured, wire.LLM)]))
    off = {name: abs(math.log(seen / costs.steps[name][wire.LLM].launches)) for name in (PLAIN, wire.STAGED)}
    return min(off, key=lambda name: off[name])


def _runs_the_same(stage: str, topology: str) -> bool:
    """Whether a topology runs the kernels of a stage that a staged profile has timed: not in the fused vocoder."""
    return topology == wire.STAGED or stage != wire.VOCODER


def _columns(stage: str, measured: Profile, costs: ModelCosts, variant: str) -> _Columns:
    counts, rows = costs.steps[variant][stage], _separated(measured, stage)
    bandwidth, throughput = measured.bandwidth_gb_s or math.nan, measured.tflop_s or math.nan
    table = np.array(
        [
            (p.launches, (p.bytes or 0) / bandwidth / 1e6, _activations(stage, p, counts) / bandwidth / 1e6,
             (p.gflop or 0.0) / throughput, p.turn_ms)
            for p in rows
        ],
        dtype=float,
    ).reshape(-1, 5)  # fmt: skip
    return _Columns(*table.T)


def _activations(stage: str, point: StagePoint, counts) -> float:
    if stage == PREFILL:
        return counts.activation_bytes(point.at("tokens"))
    if stage == wire.VOICE:
        return counts.activation_bytes(point.at("seconds") * wire.FRAMES_PER_SECOND)
    share = (point.steps or wire.DEFAULT_DIFFUSION_STEPS) / wire.DEFAULT_DIFFUSION_STEPS
    return share * counts.activation_bytes(point.at("batch"))


def _fitted(columns: _Columns, prior: Mapping[str, Range], source: str) -> dict[str, Range]:
    """The most likely parameters of a stage, and what they may be on another card."""
    middles = np.log([prior[name].likely for name in _OF_A_STAGE])
    deviations = np.log([prior[name].width for name in _OF_A_STAGE]) / 4

    def residuals(logs: np.ndarray) -> np.ndarray:
        values = dict(zip(_OF_A_STAGE, np.exp(logs), strict=True))
        off = np.log(columns.predicted_ms(values) / columns.device_ms) / _ERROR
        return np.concatenate([off, (logs - middles) / deviations])

    found = np.exp(optimize.least_squares(residuals, middles).x)
    factors = {name: min(BETWEEN_CARDS[name], math.sqrt(prior[name].width)) for name in _OF_A_STAGE}
    ranges = {
        name: Range.around(float(value), factors[name], source) for name, value in zip(_OF_A_STAGE, found, strict=True)
    }
    return ranges | {name: _at_most_one(ranges[name]) for name in (MEMORY, COMPUTE)}


def _at_most_one(its: Range) -> Range:
    """A range of an efficiency: no kernel is faster than copies and large products, but for errors of both."""
    likely = min(its.likely, 1.0)
    return replace(its, low=min(its.low, likely), likely=likely, high=min(its.high, max(likely, 1.0)))


def _common_launch(ranges: Sequence[Range]) -> Range | None:
    if not ranges:
        return None
    value = float(np.exp(np.mean(np.log([each.likely for each in ranges]))))
    return Range.around(value, BETWEEN_CARDS[LAUNCH], ranges[0].source)


def _host(measured: Profile, free: Mapping[str, Range], source: str) -> dict[str, Range]:
    """Host time of the steps that are graphs, and microseconds of a launch where kernels are launched one by one.

    An older profile, of stages without graphs, tells nothing of the host beside its launches.
    """
    fixed, each = HOST_MS[wire.STAGED]
    steps = [p for p in _separated(measured, wire.LLM) if p.host_ms]
    per_launch_us = [1e3 * (p.host_ms or 0.0) / (p.launches or 1) for p in steps]
    graphs = steps if steps and np.median(per_launch_us) < _EAGER_US else []
    eager = ([] if graphs else steps) + _separated(measured, PREFILL)
    bound = [p for p in eager if p.turn_ms < 0.5 * p.ms]
    found = {}
    if graphs:
        ratio = float(np.median([(p.host_ms or 0.0) / (fixed + each * p.at("batch")) for p in graphs]))
        found[HOST] = Range.around(ratio, BETWEEN_CARDS[HOST], source)
    if bound:
        cost_us = float(np.median([1e3 * p.ms / (p.launches or 1) for p in bound]))
        found[EAGER] = Range.around(cost_us, BETWEEN_CARDS[EAGER], source)
    return {name: its for name, its in found.items() if its.width < free[name].width}


def _shares(free: Assumptions, card: Card, measured: Profile) -> dict[str, Range]:
    """What the card reaches of its data sheet; measured, where the profile is of this very kind of card."""
    shares = dict(free.shares)
    if _is_of(measured, card):
        speeds = {BANDWIDTH: (measured.bandwidth_gb_s, card.bandwidth_gb_s),
                  THROUGHPUT: (measured.tflop_s, card.bf16_tflop_s)}  # fmt: skip
        for name, (reached, sheet) in speeds.items():
            shares[name] = Range.around((reached or sheet) / sheet, 1.02, f"measured on {measured.device}")
    return shares


def _is_of(measured: Profile, card: Card) -> bool:
    try:
        return card_of(measured.device, {card.key: card}).key == card.key
    except InputError:
        return False
