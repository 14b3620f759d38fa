"""Two stored runs compared: whether they can be, what differs beside the figures, and the figures' differences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from harness import wire
from harness.capacity.fitting.fit import limits_of
from harness.capacity.fitting.rate_search import Traffic
from harness.capacity.models.between_ladders import Between
from harness.capacity.planning.comparison import Side, differences
from harness.errors import InconclusiveError, InputError
from harness.planfile.plan import PlanSpec
from harness.records.comparison import ComparedDeployment, ComparedRun, Comparison, Differing
from harness.records.fit import Fit, FittedDeployment
from harness.records.slo import Slo
from harness.records.store import Run
from harness.runs.earlier import place_of, prior_of
from harness.runs.opening import spec_of, unit_of
from harness.topology import TOPOLOGY, topology_of
from harness.traffic.mix import Mix

_PLAN_FACTS = ("routing", "utilisation_cap", "confidence")


class _Opened:
    """A run with what a comparison needs of it. Raises InputError where that is not stored."""

    def __init__(self, run: Run):
        self.run, self.spec, self.manifest = run, spec_of(run), run.manifest
        self.fit, self.plan = self._fit(), run.plan()
        self.chosen = self._chosen()
        self.mix = self.spec.traffic_mix()

    def _fit(self) -> Fit:
        fit = self.run.fit()
        if fit is None:
            raise InputError(f"{self.run.path} holds no fit yet: run `harness fit --run {self.run.path}` first")
        return fit

    def _chosen(self) -> FittedDeployment:
        """The planned deployment; where no rate meets the SLOs, the one that the plan names."""
        named = self.plan.deployment if self.plan else None
        found = self.fit.best_deployment or next((e for e in self.fit.deployments if e.deployment == named), None)
        if found is None:
            why = next((each.inconclusive for each in self.fit.deployments if each.inconclusive), "no ladder is VALID")
            raise InputError(f"{self.run.path} cannot be compared: no deployment of it was fitted ({why})")
        return found

    def side(self, slos: Sequence[Slo]) -> Side:
        """For these SLOs, which are its own. Raises InputError where the planned deployment was not fitted."""
        traffic = Traffic.draw(self.mix, np.random.default_rng(self.fit.traffic_seed))
        try:
            limits = limits_of(self.chosen, slos, self.fit.session_limit, self.fit.extrapolation, traffic)
            return Side.of(self.chosen, limits, prior_of(self.manifest), self.plan)
        except InconclusiveError as error:
            raise InputError(f"{self.run.path} cannot be compared: {error}") from None

    def record(self, side: Side) -> ComparedRun:
        emulated = self.manifest.times_basis or ("emulated" if self.manifest.emulated else "")
        return ComparedRun(
            folder=str(self.run.path),
            run_id=self.manifest.run_id,
            created_at=self.manifest.created_at,
            plan=self.manifest.title,
            verdict=self.plan.verdict if self.plan else "",
            unit=unit_of(self.manifest),
            topology=topology_of(self.chosen.deployment),
            deployment=self.chosen.deployment,
            ladders=side.ladders,
            between_ladders=side.between.deviation,
            between_runs=side.between_runs(),
            basis=emulated,
        )


def compare_runs(first: Run, second: Run) -> Comparison:
    """The second run against the first. Raises InputError for runs that cannot be compared."""
    a, b = _Opened(first), _Opened(second)
    _must_be_comparable(a, b)
    side_a, side_b = (each.side(a.spec.slo_list()) for each in (a, b))
    pooled = _pooled(a, b, side_a, side_b)
    rng = np.random.default_rng([a.spec.seed, b.spec.seed])
    shown = [side if pooled is None else replace(side, between=pooled) for side in (side_a, side_b)]
    both = {_key(each): each for each in a.fit.deployments}, {_key(each): each for each in b.fit.deployments}
    shared = [key for key in both[0] if key in both[1]]
    return Comparison(
        a=a.record(shown[0]),
        b=b.record(shown[1]),
        confidence=a.fit.confidence,
        pooled=pooled is not None,
        differing=tuple(_differing(a, b)),
        differences=differences(side_a, side_b, rng, a.fit.confidence, pooled, _other_terms(a, b)),
        deployments=tuple(_deployment(both[0][key], both[1][key]) for key in shared),
        only_in_a=len(both[0]) - len(shared),
        only_in_b=len(both[1]) - len(shared),
    )


def _other_terms(a: _Opened, b: _Opened) -> str:
    """The facts of both plans that a count depends on, where they differ; "" where none does."""
    return ", ".join(name for name in _PLAN_FACTS if getattr(a.spec, name) != getattr(b.spec, name))


def _key(each: FittedDeployment) -> str:
    return json.dumps(each.deployment, sort_keys=True)


def _deployment(a: FittedDeployment, b: FittedDeployment) -> ComparedDeployment:
    return ComparedDeployment(
        deployment=a.deployment,
        rate_a=a.max_rate_per_s,
        interval_a=a.max_rate_interval,
        rate_b=b.max_rate_per_s,
        interval_b=b.max_rate_interval,
    )


def _must_be_comparable(a: _Opened, b: _Opened) -> None:
    """Raise InputError for runs of other models, other traffic or other SLOs: their figures answer other questions."""
    where = f"{a.run.path} and {b.run.path} cannot be compared"
    if a.manifest.preset != b.manifest.preset:
        raise InputError(
            f"{where}: their models differ (preset {a.manifest.preset} and {b.manifest.preset}); give two runs of one "
            "preset"
        )
    if said := _other_mix(a.mix, b.mix):
        raise InputError(f"{where}: their traffic differs ({said}); give two runs of one mix")
    slos = [{str(slo) for slo in each.spec.slo_list()} for each in (a, b)]
    if slos[0] != slos[1]:
        own = [", ".join(sorted(one - other)) or "none" for one, other in (slos, slos[::-1])]
        raise InputError(f"{where}: their SLOs differ (only A: {own[0]}; only B: {own[1]}); give two runs of one plan")


def _other_mix(a: Mix, b: Mix) -> str:
    """What differs first in two mixes, by class; "" where nothing does."""
    names = [sorted(each.shares()) for each in (a, b)]
    if names[0] != names[1]:
        return f"classes {', '.join(names[0])} and {', '.join(names[1])}"
    for name in names[0]:
        facts, lengths = zip(*(_of_class(mix, name) for mix in (a, b)), strict=True)
        for fact, value in facts[0].items():
            if value != facts[1][fact] or (fact == "length" and not np.array_equal(*lengths)):
                return f"class {name}, {fact}: {value} and {facts[1][fact]}"
    return ""


def _of_class(mix: Mix, name: str) -> tuple[dict[str, str], np.ndarray]:
    """What makes requests of a class heavy or frequent, as text; and its lengths in frames."""
    own = next(each for each in mix.classes if each.name == name)
    frames = own.length.frames
    length = f"{frames.mean() * wire.SECONDS_PER_FRAME:.3g} s (sd {frames.std() * wire.SECONDS_PER_FRAME:.3g} s)"
    facts = {
        "share": f"{mix.shares()[name]:.3%}",
        "length": length,
        "frames per chunk": str(own.chunk_frames or mix.chunk_frames),
        "diffusion steps": str(own.diffusion_steps or mix.diffusion_steps),
    }
    return facts, frames


def _pooled(a: _Opened, b: _Opened, side_a: Side, side_b: Side) -> Between | None:
    """How far ladders differ by both runs together, on hosts of one kind; None where each speaks for itself."""
    prior = prior_of(a.manifest)
    same_place = a.manifest.device == b.manifest.device and place_of(a.manifest) == place_of(b.manifest)
    alike = same_place and prior == prior_of(b.manifest)
    enough = min(side_a.between.degrees, side_b.between.degrees) >= prior.degrees
    return side_a.between.pooled(side_b.between, prior) if alike and enough else None


def _host(a: _Opened, b: _Opened) -> Iterator[Differing]:
    """Facts of the hosts that affect figures; the kernel and Python are listed elsewhere."""
    for name in ("cpu", "cores", "memory_gib", "gpu"):
        yield from _fact(f"host: {name}", *(getattr(each.manifest.host, name) for each in (a, b)))


def _differing(a: _Opened, b: _Opened) -> Iterator[Differing]:
    """Facts that differ, those that explain figures first: device and host, deployment, the plans' terms, software."""
    yield from _fact("device", a.manifest.device, b.manifest.device)
    yield from _host(a, b)
    yield from _fact("times", *(each.manifest.times_basis or _emulated(each) for each in (a, b)))
    yield from _fact("dilation", *(f"{each.manifest.clock.dilation:g}" for each in (a, b)))
    yield from _fact("topology", *(topology_of(each.chosen.deployment) for each in (a, b)))
    yield from _knobs(a.chosen, b.chosen)
    for name in _PLAN_FACTS:
        yield from _fact(f"plan: {name}", getattr(a.spec, name), getattr(b.spec, name))
    yield from _fact("plan: targets_qps", *(_rates(each.spec) for each in (a, b)))
    for name in ("system", "python"):
        yield from _fact(name, *(getattr(each.manifest.host, name) for each in (a, b)))
    packages = sorted(a.manifest.versions.keys() | b.manifest.versions.keys())
    for name in packages:
        yield from _fact(name, *(each.manifest.versions.get(name, "") for each in (a, b)))
    yield from _fact("commit", a.manifest.commit, b.manifest.commit)


def _emulated(each: _Opened) -> str:
    return "emulated" if each.manifest.emulated else "measured"


def _rates(spec: PlanSpec) -> str:
    return ", ".join(f"{rate:g}" for rate in spec.targets_qps)


def _knobs(a: FittedDeployment, b: FittedDeployment) -> Iterator[Differing]:
    for knob in dict.fromkeys([*a.deployment, *b.deployment]):
        if knob != TOPOLOGY:
            yield from _fact(knob, a.deployment.get(knob, ""), b.deployment.get(knob, ""))


def _fact(name: str, a, b) -> Iterator[Differing]:
    if a != b:
        yield Differing(fact=name, a="" if a is None else str(a), b="" if b is None else str(b))
