"""The cheapest fleets of several types of device as text: what each has, what it costs, and why no other is cheaper."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from harness.records.fleet import FleetAnswer, FleetTarget, MixedFleet, MixedPool
from harness.report import words


@dataclass(frozen=True)
class FleetRow:
    """A target: its cheapest fleet, or ``note`` why there is none; ``against``: each fleet of one type beside it."""

    qps: float
    pools: tuple[str, ...]
    cost_per_hour: float | None
    cost_per_audio_hour: float | None
    against: tuple[str, ...]
    bases: tuple[str, ...]
    note: str = ""


def fleet_rows(answer: FleetAnswer | None) -> list[FleetRow]:
    """A row for each target; none for an answer of fewer than two types."""
    if answer is None or len(answer.types) < 2:
        return []
    return [_row(target, answer) for target in answer.targets]


def _row(target: FleetTarget, answer: FleetAnswer) -> FleetRow:
    best, against = target.best, tuple(_against(target, answer))
    if best is None:
        return FleetRow(target.qps, (), None, None, against, (), target.note)
    return FleetRow(
        qps=target.qps,
        pools=tuple(_pool(pool, len(answer.mix)) for pool in best.pools),
        cost_per_hour=best.cost_per_hour,
        cost_per_audio_hour=best.cost_per_audio_hour,
        against=against,
        bases=tuple(dict.fromkeys(each for pool in best.pools for each in _bases(pool))),
        note=_doubt(best),
    )


def _bases(pool: MixedPool) -> list[str]:
    """How a pool's devices are known, without "emulated": the page says that of all its figures. Of them it is
    simulated where nothing else is said."""
    return [each for each in pool.basis.split(", ") if each != "emulated"] or ["simulated"]


def _pool(pool: MixedPool, classes: int) -> str:
    """A pool as text, such as "3 H100 for long requests" or "2 L40S for 40% of all requests"."""
    what = "all requests" if len(pool.classes) == classes else f"{' and '.join(pool.classes)} requests"
    part = "" if pool.share > 0.9995 else f"{words.percent(pool.share)} of "
    return f"{words.figure(pool.devices, 6)} {pool.device_type} for {part}{what}"


def _against(target: FleetTarget, answer: FleetAnswer) -> Iterator[str]:
    """What a fleet of each type alone costs, and how much more that is; or why it cannot be one."""
    everything = ", ".join(answer.mix)
    for kind in answer.types:
        alone = target.undivided.get(kind.name)
        if alone is None:
            why = kind.ruled_out.get(everything, "not within the limits")
            yield f"{kind.name} alone serves no such traffic: {words.metric(why)}"
            continue
        devices = words.figure(alone.devices.get(kind.name), 6)
        cost = f"{devices} {kind.name} alone: {words.figure(alone.cost_per_hour, 4)} {answer.currency} an hour"
        yield f"{cost}{_more(alone, target.best)}"


def _more(alone: MixedFleet, best: MixedFleet | None) -> str:
    if best is None:
        return ""
    if math.isclose(alone.cost_per_hour, best.cost_per_hour, rel_tol=1e-9):
        return " (no mix is cheaper)" if best.proven else " (no cheaper mix was found)"
    return f" ({words.signed_percent(alone.cost_per_hour / best.cost_per_hour - 1)})"


def _doubt(best: MixedFleet) -> str:
    if best.proven:
        return ""
    return f"not proven: {words.percent(best.gap, 1)} cheaper may be possible" if best.gap else "not proven"
