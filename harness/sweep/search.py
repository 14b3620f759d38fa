"""Choose the next point of a search space, given the trials that a run holds."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from harness.deploy.config import Deployment
from harness.planfile.plan import PlanSpec
from harness.planfile.sections import ObjectiveSpec
from harness.records.schema import Trial
from harness.records.store import Run
from harness.runs.points import describe_point
from harness.runs.stages import kv_rooms
from harness.sweep.optimizer.decide import Aim, Decision
from harness.sweep.optimizer.guide import Guide, MeasuredPoint
from harness.sweep.optimizer.objective import BestRung, HighestRate, Value
from harness.sweep.optimizer.space import Space
from harness.sweep.trial import SECOND_SAMPLE_SEED, asked, deployed
from harness.topology import TOPOLOGY, Knobs, applicable, topology_of


@dataclass(frozen=True)
class Step:
    """The next point of a search and its name on the terminal, or no point and the reason to stop."""

    point: Knobs | None
    says: str


class Search:
    """The search of one plan. All its state can be rebuilt from the run's trials."""

    def __init__(self, spec: PlanSpec, base: Deployment):
        self.spec, self.base, self.settings = spec, base, spec.searched()
        self.space = Space(spec.columns())
        self.size = spec.size()
        self.most = self.settings.most(self.size)
        self._points = spec.points() if self.settings.kind == "grid" else []
        self._keys: dict[str, str] = {}
        self._values: dict[tuple[str, ...], Value] = {}
        self.guide = self._guide()
        self.said = ""  # description of the best point so far
        for point in self.every_value():
            deployed(base, point)  # refuses an impossible point before anything is measured

    def next(self, run: Run, ended: Sequence[Knobs], in_flight: Collection[Knobs] = ()) -> Step:
        """The next point. ``ended``: points that need no more trials, in order; ``in_flight``: being measured."""
        if self.settings.kind == "grid":
            return self._next_of_grid([*ended, *in_flight])
        self._look_at_memory(run)
        trials = run.trials()
        numbered = [(self._number(point), point) for point in ended]
        measured = [self._measured(run, trials, number, point) for number, point in numbered if number is not None]
        taken = [number for number in map(self._number, in_flight) if number is not None]
        decision = self._decide(measured, taken)
        self.said = self._best_so_far(measured, decision)
        if decision.number is None:
            return Step(None, f"the search ends: {decision.reason}")
        point, at = self.space.point(decision.number), len(measured) + len(taken) + 1
        return Step(point, f"ladder {at} of at most {self.most} ({self.size} points): {describe_point(point)}")

    def left(self, ended: int) -> int:
        """The largest number of points still to be measured."""
        return max(self.most_points() - ended, 0)

    def most_points(self) -> int:
        """The largest number of points that the search measures."""
        return len(self._points) or self.most

    def key(self, point: Knobs) -> str:
        """The same key for all points that deploy and request the same, however they are written."""
        name = json.dumps(point, sort_keys=True)
        if name not in self._keys:
            configs = deployed(self.base, point).configs()
            asks = {"chunk_frames": self.spec.mix.chunk_frames, "diffusion_steps": self.spec.mix.diffusion_steps}
            content = [json.dumps({**asks, **asked(point)}, sort_keys=True).encode()]
            content += [configs[model].SerializeToString(deterministic=True) for model in sorted(configs)]
            self._keys[name] = hashlib.sha256(b"\0".join(content)).hexdigest()
        return self._keys[name]

    def _next_of_grid(self, taken: Sequence[Knobs]) -> Step:
        known = {self.key(point) for point in taken}
        for number, point in enumerate(self._points, start=1):
            if point not in taken and self.key(point) not in known:
                return Step(point, f"ladder {number}/{len(self._points)}: {describe_point(point)}")
        return Step(None, "every point was measured")

    def _decide(self, measured: list[MeasuredPoint], taken: list[int]) -> Decision:
        """The guide's decision; a point equivalent to a measured one gets that one's value without a trial."""
        if (first := self._first_of_a_topology([*(each.number for each in measured), *taken])) is not None:
            return Decision(first, "", None, 0.0, math.inf, self.size)
        known = {self.key(self.space.point(each.number)): each for each in measured}
        while True:
            decision = self.guide.next(measured, taken)
            if decision.number is None:
                return decision
            twin = known.get(self.key(self.space.point(decision.number)))
            if twin is None:
                return decision
            measured.append(MeasuredPoint(decision.number, twin.value))

    def _first_of_a_topology(self, taken: Sequence[int]) -> int | None:
        """The middle point of a topology that was not tried yet: one topology says nothing about the other."""
        seen = {topology_of(self.space.point(number)) for number in taken}
        levels = self.space.levels(self.space.middle())
        for level, topology in enumerate(self.spec.topologies):
            if topology not in seen:
                return self.space.lowest(self.space.at(levels | ({TOPOLOGY: level} if TOPOLOGY in levels else {})))
        return None

    def _best_so_far(self, measured: Sequence[MeasuredPoint], decision: Decision) -> str:
        best = next((each for each in measured if each.number == decision.best), None)
        if best is None:
            return ""
        words = f"best so far: {best.value.says} with {describe_point(self.space.point(best.number))}"
        if decision.confidence != decision.confidence:  # NaN: the sampler estimates no confidence
            return words
        within = f"within {self.settings.margin:.1%} of the best: {decision.confidence:.0%}"
        return f"{words}; estimated probability that it is {within}"

    def _look_at_memory(self, run: Run) -> None:
        """Read the room for KV caches, known only once a topology is deployed; discard values computed without it."""
        objective = self.guide.objective
        if isinstance(objective, HighestRate) and (kv := kv_rooms(run.manifest, self.spec)) != objective.kv:
            self.guide = replace(self.guide, objective=replace(objective, kv=kv))
            self._values.clear()

    def _measured(self, run: Run, trials: Sequence[Trial], number: int, point: Knobs) -> MeasuredPoint:
        own = [each for each in trials if each.deployment == point and self._counts(each)]
        names = tuple(trial.trial_id for trial in own)
        if names not in self._values:
            self._values[names] = self._value(run, own)
        return MeasuredPoint(number, self._values[names], tuple(rung for each in own for rung in each.rungs))

    def _value(self, run: Run, own: Sequence[Trial]) -> Value:
        if not own:
            return Value(None, says="none of its ladders is VALID")
        requests, in_rungs = (
            pd.concat([read(trial.trial_id) for trial in own], ignore_index=True)
            for read in (run.requests, run.requests_in_rungs)
        )
        return self.guide.objective.measured(own, requests, in_rungs)

    def _counts(self, trial: Trial) -> bool:
        """Whether a trial counts for the search; a second ladder of the best point, known by its seed, does not."""
        first = trial.load.seed < self.spec.seed + SECOND_SAMPLE_SEED
        return trial.kind == "ladder" and trial.valid and first

    def _number(self, point: Knobs) -> int | None:
        return self.space.number(point)

    def _guide(self) -> Guide:
        aim = Aim(self.settings.margin, self.settings.sure, self.most)
        objective = _objective(self.settings.objective, self.spec)
        defaults = _defaults(self.base, self.spec)
        kind, sessions = self.settings.kind, self.spec.ladder.sessions
        return Guide(self.space, objective, kind, aim, self.spec.seed, sessions, defaults)

    def every_value(self) -> Iterator[Knobs]:
        """Points that together contain every value of every knob, in each topology that has it."""
        longest = max(map(len, self.space.columns), default=1)
        for topology, at in itertools.product(self.spec.topologies, range(longest)):
            parts = [column[min(at, len(column) - 1)] for column in self.space.columns]
            point = dict(itertools.chain.from_iterable(part.items() for part in parts))
            yield applicable(point | ({TOPOLOGY: topology} if TOPOLOGY in point else {}))


def _objective(asked_for: ObjectiveSpec | None, spec: PlanSpec) -> HighestRate | BestRung:
    if asked_for is None:
        return HighestRate(spec.traffic_mix(), spec.slo_list(), spec.seed)
    metric, sign = asked_for.maximise or asked_for.minimise or "", 1 if asked_for.maximise else -1
    return BestRung(metric, sign, asked_for.at_most, asked_for.at_least)


def _defaults(base: Deployment, spec: PlanSpec) -> dict[str, int]:
    """Values of the knobs that a point does not set, for every topology of the plan."""
    defaults = {"diffusion_steps": spec.mix.diffusion_steps, "chunk_frames": spec.mix.chunk_frames, "gpus": base.gpus}
    for topology in spec.topologies:
        defaults |= deployed(base, {TOPOLOGY: topology}).defaults()
    return defaults
