"""GPUs per target rate before a GPU was measured: unknowns drawn from their ranges, through a pool in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from harness import wire
from harness.capacity.models.memory import prompt_tokens
from harness.capacity.planning.closed_form import ClassDemand, ClosedDevice, ClosedPools, MemoryNeed, MixDemand
from harness.capacity.planning.cost_and_growth import with_costs, with_energy
from harness.cards.assumptions import FIRST_STEPS, HOP, MEASUREMENTS, PROCESSES, SPLIT, Assumptions
from harness.cards.card import Card
from harness.cards.costs import ModelCosts
from harness.cards.memory import SESSIONS, budget_of
from harness.cards.ranges import HIGH, LOW, Draw, Range, draws_of
from harness.cards.times import GRAPH_CONTEXT, GRAPH_TOKENS, CardTimes
from harness.errors import InputError
from harness.records.estimate import EstimatedCard, Narrowing, PlanningEstimate, UnknownEffect
from harness.records.plan import KvMemory, PlannedRate, PlannedTarget
from harness.records.slo import Slo
from harness.traffic.mix import Mix

UTILISATION_CAP, CONFIDENCE, DRAWS = 0.85, 0.95, 120
ENTRY_S = 0.01  # text, tokens and a new session at the entry
_SEED = 1
_METRICS = "ttfa_s", "rtf"


@dataclass(frozen=True)
class CardModel:
    """A card with its ranges: what ``estimate`` plans for."""

    card: Card
    assumptions: Assumptions


def estimate(
    models: Sequence[CardModel],
    costs: ModelCosts,
    topology: str,
    mix: Mix,
    slos: Sequence[Slo],
    targets_qps: Sequence[float],
    utilisation_cap: float = UTILISATION_CAP,
    *,
    prices: Mapping[str, float] | None = None,
    currency: str = "",
) -> PlanningEstimate:
    """estimate.json for some cards; ``prices``: of an hour, by the keys of those that have one.

    Raises InputError for an SLO that cannot be estimated, or without any SLO.
    """
    check_slos(mix, slos)
    rates, prices = tuple(sorted(targets_qps)), prices or {}
    planner = _Planner(costs, topology, MixDemand.of(mix), tuple(slos), rates, utilisation_cap, prices)
    return PlanningEstimate(
        preset=costs.preset,
        topology=topology,
        mix=mix.record(),
        slos=tuple(slos),
        confidence=CONFIDENCE,
        utilisation_cap=utilisation_cap,
        cards=tuple(planner.card(model) for model in models),
        currency=currency if prices else "",
    )


def pools_of_card(
    model: CardModel,
    costs: ModelCosts,
    topology: str,
    mix: Mix,
    slos: Sequence[Slo],
    utilisation_cap: float = UTILISATION_CAP,
    *,
    drawn: bool = False,
) -> list[ClosedPools]:
    """Pools of a card with every unknown as is likely or, if ``drawn``, one for each draw of the unknowns.

    Draws of the same number have the same places in the ranges, for any mix.
    """
    planner = _Planner(costs, topology, MixDemand.of(mix), tuple(slos), (), utilisation_cap)
    if not drawn:
        return [planner._pools(model, {})]
    return planner._all_pools(model, draws_of(model.assumptions.names, np.random.default_rng(_SEED), DRAWS))


def check_slos(mix: Mix, slos: Sequence[Slo]) -> None:
    """Raise InputError for an SLO that cannot be estimated, or without any SLO."""
    for slo in slos:
        if slo.metric not in _METRICS:
            raise InputError(f"SLO {slo}: stalls cannot be estimated; give limits of ttfa_p95_s and rtf_p95 instead")
    if not slos:
        raise InputError(f"mix {mix.name} has no SLOs: give --slo 1.0,0.9 (seconds to first audio, real-time factor)")


@dataclass(frozen=True)
class _Planner:
    costs: ModelCosts
    topology: str
    demand: MixDemand
    slos: tuple[Slo, ...]
    targets_qps: tuple[float, ...]
    utilisation_cap: float
    prices: Mapping[str, float] = field(default_factory=dict)

    def card(self, model: CardModel) -> EstimatedCard:
        likely = self._pools(model, {})
        problem = self._problem(likely)
        if problem:
            return self._refused(model, problem, likely)
        drawn = self._all_pools(model, draws_of(model.assumptions.names, np.random.default_rng(_SEED), DRAWS))
        counts = {qps: [pools.fewest(qps) for pools in drawn] for qps in self.targets_qps}
        effects = sorted(self._effects(model), key=_spread, reverse=True)
        return EstimatedCard(
            card=model.card.key,
            name=model.card.name,
            basis=model.assumptions.basis,
            note=model.assumptions.note or model.card.source,
            rate_per_device=self._rate(model, likely, drawn),
            targets=tuple(self._target(model, likely, qps, counts[qps]) for qps in self.targets_qps),
            memory=self._memory(likely, model),
            longest_s=budget_of(model.card, self.costs, self.topology).longest_s,
            unknowns=tuple(effects),
            measurements=tuple(self._measurements(model)),
            watts=model.card.power_w,
            price_per_hour=self.prices.get(model.card.key),
        )

    def _problem(self, likely: ClosedPools) -> str:
        if likely.device.room_bytes < likely.need.longest:
            return (
                f"the longest session of the mix needs {likely.need.longest / 1e9:.2f} GB of KV cache; the card has "
                f"{likely.device.room_bytes / 1e9:.2f} GB beside weights and processes"
            )
        rate, binding = likely.steady_rate()
        return "" if rate > 0 else f"{binding} is violated even with one session"

    def _refused(self, model: CardModel, problem: str, likely: ClosedPools) -> EstimatedCard:
        basis, note = model.assumptions.basis, model.assumptions.note or model.card.source
        return EstimatedCard(
            card=model.card.key,
            name=model.card.name,
            basis=basis,
            note=note,
            rate_per_device=PlannedRate(value=None, basis=basis),
            targets=tuple(PlannedTarget(qps=qps, basis=basis, note=problem) for qps in self.targets_qps),
            memory=self._memory(likely, model),
            longest_s=budget_of(model.card, self.costs, self.topology).longest_s,
            problem=problem,
        )

    def _rate(self, model: CardModel, likely: ClosedPools, drawn: Sequence[ClosedPools]) -> PlannedRate:
        value, binding = likely.rate()
        low, high = np.quantile([pools.rate()[0] for pools in drawn], _tails())
        interval = float(min(low, value)), float(max(high, value))
        return PlannedRate(value=value, interval=interval, binding=binding, basis=model.assumptions.basis)

    def _target(self, model: CardModel, likely: ClosedPools, qps: float, counts: Sequence[int | None]) -> PlannedTarget:
        devices, basis = likely.fewest(qps), model.assumptions.basis
        if devices is None:
            return PlannedTarget(qps=qps, basis=basis, binding=likely.violated(qps, 1), note="No number suffices.")
        low, high = _interval(counts, devices)
        steady, _ = likely.steady_rate()
        target = PlannedTarget(
            qps=qps,
            devices=devices,
            interval=(low, high),
            binding=likely.violated(qps, devices - 1) if devices > 1 else likely.rate()[1],
            utilisation=qps / (devices * steady),
            devices_n_plus_1=devices + 1,
            devices_n_plus_2=devices + 2,
            sessions_per_device_p95=likely.sessions_p95(qps, devices),
            basis=basis,
            note="No load was measured on this card.",
        )
        return self._with_costs(model.card, target)

    def _with_costs(self, card: Card, target: PlannedTarget) -> PlannedTarget:
        """Add the energy at the power limit of the card and, where it has a price, the cost."""
        target = with_energy(target, card.power_w, self.demand.mean_frames)
        price = self.prices.get(card.key)
        return target if price is None else with_costs(target, price, self.demand.mean_frames)

    def _memory(self, likely: ClosedPools, model: CardModel) -> KvMemory:
        room = likely.device.room_bytes
        return KvMemory(
            room_bytes=room,
            bytes_per_token=self.costs.kv_bytes_per_token,
            sessions=room / likely.need.mean,
            longest_sessions=room / likely.need.longest,
            basis=model.assumptions.basis,
        )

    def _effects(self, model: CardModel) -> Iterator[UnknownEffect]:
        qps = self.targets_qps[-1]
        for name, its in _ranges(model.assumptions).items():
            ends = [self._pools(model, {name: place}).fewest(qps) for place in (LOW, HIGH)]
            yield UnknownEffect(
                unknown=name, low=float(its.at(LOW)), likely=its.likely, high=float(its.at(HIGH)),
                devices_at_low=ends[0], devices_at_high=ends[1], source=its.source,
            )  # fmt: skip

    def _measurements(self, model: CardModel) -> list[Narrowing]:
        """Each measurement with the interval that it would leave, the narrowest interval first, then the quickest."""
        qps, names = self.targets_qps[-1], model.assumptions.names
        draws = draws_of(names, np.random.default_rng(_SEED), DRAWS)
        found = []
        for command, minutes, settles in MEASUREMENTS.values():
            settled = tuple(name for name in settles if name in names)
            left = {name: places for name, places in draws.items() if name not in settled}
            counts = [pools.fewest(qps) for pools in self._all_pools(model, left)] if left else []
            devices = self._pools(model, {}).fewest(qps)
            interval = _interval(counts or [devices], devices or 1)
            said = command.format(preset=self.costs.preset, topology=self.topology)
            found.append(Narrowing(command=said, minutes=minutes, unknowns=settled, interval=interval))
        return sorted(found, key=lambda each: (_width(each.interval), each.minutes))

    def _all_pools(self, model: CardModel, draws: Draw) -> list[ClosedPools]:
        """The pools of every draw."""
        return self._built(model, draws, DRAWS)

    def _pools(self, model: CardModel, draw: Draw) -> ClosedPools:
        """The pools of one draw: a number for each unknown, its likely value where it has none."""
        return self._built(model, {name: np.array([place]) for name, place in draw.items()}, 1)[0]

    def _built(self, model: CardModel, draws: Draw, count: int) -> list[ClosedPools]:
        times = CardTimes(model.card, self.costs, self.topology, model.assumptions, draws)
        common = {name: np.broadcast_to(value, count) for name, value in model.assumptions.common_values(draws).items()}
        opening_ms = {each.name: self._opening_ms(times, float(each.frames.mean())) for each in self.demand.classes}
        mean_opening_ms = sum(each.share * opening_ms[each.name][0] for each in self.demand.classes)
        step_s = self._step_s(times, common, mean_opening_ms)
        need = MemoryNeed.of(self.demand, self.costs.kv_bytes_per_token)
        heard = {each.name: self._opening_ms(times, self._long(each)) for each in self.demand.classes}
        rows = ({name: float(values[row]) for name, values in common.items()} for row in range(count))
        return [
            self._one(
                model, step_s[:, row], need, values, {n: (_at(ms, row, count), p) for n, (ms, p) in heard.items()}
            )
            for row, values in enumerate(rows)
        ]

    def _one(
        self,
        model: CardModel,
        step_s: np.ndarray,
        need: MemoryNeed,
        values: dict[str, float],
        heard: dict[str, tuple[float, int]],
    ) -> ClosedPools:
        """The pools of one draw. ``heard``: by class, milliseconds of reading its prompt, and the prompt's parts."""
        device = ClosedDevice(
            step_s=step_s,
            audio_base_s={name: ENTRY_S + ms / 1e3 for name, (ms, _) in heard.items()},
            first_steps={name: values[FIRST_STEPS] + self._between(parts) for name, (_, parts) in heard.items()},
            room_bytes=float(budget_of(model.card, self.costs, self.topology, values[PROCESSES]).room_bytes),
            session_limit=SESSIONS,
        )
        return ClosedPools(device, self.demand, need, self.slos, self.utilisation_cap)

    def _step_s(self, times: CardTimes, common: dict[str, np.ndarray], opening_ms: np.ndarray) -> np.ndarray:
        """Seconds of a frame step with 1 to SESSIONS sessions on a device [sessions, draws].

        Each step completes n / mean frames sessions, and opens as many. Above the largest graph a step is several.
        """
        n = np.arange(1, SESSIONS + 1)[:, None]
        rounds = np.ceil(n / max(self.costs.graph_batches))
        batch = n / rounds
        padded = self.costs.padded(batch)
        frame_ms = times.frame_ms(padded, self.demand.mean_context * batch / padded)
        if self.topology == wire.STAGED:
            frame_ms = frame_ms * (1 + (common[SPLIT] - 1) * (1 - 1 / n)) + len(wire.STAGES) * common[HOP]
        whole = rounds * frame_ms + n * opening_ms / self.demand.mean_frames
        return np.broadcast_to(whole, (SESSIONS, len(common[FIRST_STEPS]))) / 1e3

    def _opening_ms(self, times: CardTimes, frames: float) -> tuple[np.ndarray, int]:
        """Milliseconds of reading the prompt of a session of ``frames``, and its number of parts.

        A part takes a line over its context while it is a graph, and another line from there on.
        """
        tokens = int(prompt_tokens(frames, self.demand.voice_frames))
        parts = math.ceil(tokens / GRAPH_TOKENS)
        short = min(parts, GRAPH_CONTEXT // GRAPH_TOKENS)
        total = _on_a_line(times, 0, short)
        return (total + _on_a_line(times, short, parts) if parts > short else total), parts

    def _between(self, parts: int) -> float:
        """Frame steps between the parts of a prompt: the staged LLM alternates, the fused engine reads ahead."""
        return float(parts - 1) if self.topology == wire.STAGED else 0.0

    def _long(self, each: ClassDemand) -> float:
        """Frames of a class's session at the strictest quantile of its SLOs on first audio."""
        quantiles = [s.quantile for s in self.slos if s.traffic_class == each.name and s.metric == "ttfa_s"]
        return float(np.quantile(each.frames, max(quantiles, default=0.5), method="higher"))


def _on_a_line(times: CardTimes, first: int, last: int) -> np.ndarray:
    """Milliseconds of the prompt parts from number ``first`` to before ``last``."""
    ends = [times.prefill(GRAPH_TOKENS, number * GRAPH_TOKENS).ms for number in (first, max(last - 1, first))]
    return np.asarray((last - first) * (ends[0] + ends[1]) / 2)


def _at(values: np.ndarray, row: int, count: int) -> float:
    return float(np.broadcast_to(values, count)[row])


def _tails() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def _interval(counts: Sequence[int | None], devices: int) -> tuple[int, int | None]:
    """The interval of drawn counts; its upper end is None where too many draws have no count."""
    low, high = np.quantile([math.inf if each is None else each for each in counts], _tails(), method="inverted_cdf")
    return int(min(low, devices)), int(max(high, devices)) if math.isfinite(high) else None


def _ranges(assumptions: Assumptions) -> dict[str, Range]:
    """Each unknown's range by name; where stages differ, that of the LLM's steps."""
    return {**assumptions.shares, **assumptions.stages[wire.LLM], **assumptions.common}


def _spread(effect: UnknownEffect) -> float:
    ends = [math.inf if each is None else each for each in (effect.devices_at_low, effect.devices_at_high)]
    return abs(ends[1] - ends[0]) if all(map(math.isfinite, ends)) else math.inf


def _width(interval: tuple[int | None, int | None]) -> float:
    return math.inf if interval[1] is None or interval[0] is None else interval[1] - interval[0]
