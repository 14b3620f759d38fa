"""Recomputes the answer of a signed run from its records: hashes alone do not detect forged numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from harness.errors import HarnessError
from harness.records.plan import Plan
from harness.records.store import Run
from harness.runs.analysis import fit_of, plan_of
from harness.runs.opening import spec_of

RATE_TOLERANCE = 0.01  # relative; other versions of the libraries may round differently
_OF_A_TARGET = ("devices", "devices_n_plus_1", "devices_n_plus_2", "basis")


def differences(run: Run) -> list[str]:
    """Differences between the stored plan and one recomputed from its trials, requests and predictions; [] if none.

    Takes as long as a fit and a plan, some seconds.
    """
    stored = run.plan()
    if stored is None:
        return ["it holds no plan.json: its answer cannot be recomputed"]
    try:
        anew = plan_of(run, spec_of(run), fit_of(run), [target.qps for target in stored.targets])
    except HarnessError as error:
        return [f"its answer cannot be recomputed from its records: {error}"]
    return list(_differences(stored, anew))


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


def _differs(what: str, stored: object, anew: object) -> str:
    return f"{what}: the answer says {stored}, its records give {anew} (with this version of the harness)"


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=RATE_TOLERANCE)
