"""Recomputes the answer of a signed run from its records: hashes alone do not detect forged numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from harness.errors import HarnessError
from harness.records.fleet import FleetAnswer
from harness.records.jobs import JobsPlan
from harness.records.plan import Plan
from harness.records.store import Run
from harness.runs.analysis import fit_of, jobs_of, plan_of
from harness.runs.fleets import mixed_fleets_of
from harness.runs.opening import spec_of

RATE_TOLERANCE = 0.01  # relative; other versions of the libraries may round differently
_OF_A_TARGET = ("devices", "devices_n_plus_1", "devices_n_plus_2", "basis")


def differences(run: Run) -> list[str]:
    """Differences between the stored plan and one recomputed from its trials, requests and predictions; [] if none.

    Takes as long as a fit and a plan, some seconds; with tasks or mixed fleets also as long as those.
    """
    stored = run.plan()
    if stored is None:
        return ["it holds no plan.json: its answer cannot be recomputed"]
    try:
        anew = _planned_anew(run, stored)
    except HarnessError as error:
        return [f"its answer cannot be recomputed from its records: {error}"]
    return list(_differences(stored, anew))


def _planned_anew(run: Run, stored: Plan) -> Plan:
    spec, fit = spec_of(run), fit_of(run)
    anew = plan_of(run, spec, fit, [target.qps for target in stored.targets])
    jobs = jobs_of(run, spec, anew)
    fleets = mixed_fleets_of(run, spec, fit, anew) if stored.mixed_fleets else None
    verdict = "inconclusive" if jobs and jobs.doubt else anew.verdict
    return replace(anew, verdict=verdict, jobs=jobs, mixed_fleets=fleets)


def _differences(stored: Plan, anew: Plan) -> Iterator[str]:
    # Inconclusive because of the budget: no record shows that, and it claims less.
    if stored.verdict not in (anew.verdict, "inconclusive"):
        yield _differs("verdict", stored.verdict, anew.verdict)
    if stored.deployment != anew.deployment:
        yield _differs("deployment", stored.deployment, anew.deployment)
    for old, new in zip(stored.targets, anew.targets, strict=True):
        where = f"at {old.qps:g} requests/s: "
        for name in _OF_A_TARGET:
            said, found = getattr(old, name), getattr(new, name)
            if said != found:
                yield _differs(where + name, said, found)
        if not all(map(_close, old.interval, new.interval)):
            yield _differs(where + "interval", list(old.interval), list(new.interval))
    rates = stored.rate_per_device.value, anew.rate_per_device.value
    if not _close(*rates):
        yield _differs("rate of one device", *rates)
    if (said := _job_devices(stored.jobs)) != (found := _job_devices(anew.jobs)):
        yield _differs("devices for streams and tasks", said, found)
    yield from _of_fleets(stored.mixed_fleets, anew.mixed_fleets)


def _job_devices(jobs: JobsPlan | None) -> dict[str, int]:
    return {each.kind: each.devices for each in jobs.fleets} if jobs else {}


def _of_fleets(stored: FleetAnswer | None, anew: FleetAnswer | None) -> Iterator[str]:
    """Differences between the cheapest fleets. One that is not proven to be depends on the time that it was given."""
    fleets = {each.qps: each.best for each in anew.targets} if anew else {}
    for target in stored.targets if stored else ():
        said, found = target.best, fleets.get(target.qps, target.best)
        devices = said and said.devices, found and found.devices
        if devices[0] != devices[1] and all(each is None or each.proven for each in (said, found)):
            yield _differs(f"at {target.qps:g} requests/s: devices of the cheapest fleet", *devices)


def _differs(what: str, stored: object, anew: object) -> str:
    return f"{what}: the answer says {stored}, its records give {anew} (with this version of the harness)"


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=RATE_TOLERANCE)
