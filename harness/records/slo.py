"""SLOs compared with measurements: met, violated, or undecided because of too few requests."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from harness.errors import PlanError

if TYPE_CHECKING:
    import pandas as pd

METRIC_OF_KEY = {"ttfa_s": "ttfa_s", "rtf": "rtf", "stall_s": "stall_longest_s"}
_KEY = re.compile(r"(ttfa|rtf|stall)_p(\d{1,2}(?:\.\d+)?)(_s)?")


@dataclass(frozen=True)
class Slo:
    """An SLO: ``quantile`` of ``metric`` (a column of metrics.per_request) of a class is at most ``limit``."""

    traffic_class: str
    metric: str
    quantile: float
    limit: float

    @classmethod
    def parse(cls, traffic_class: str, key: str, limit: float) -> Slo:
        """Parse a key of a plan: ``ttfa_p95_s``, ``rtf_p95``, ``stall_p99_s``. Raises PlanError."""
        found = _KEY.fullmatch(key)
        metric = METRIC_OF_KEY.get(f"{found[1]}{found[3] or ''}") if found else None
        if found is None or metric is None or not 0 < float(found[2]) < 100:
            raise PlanError(f"{key!r} is not an SLO; write ttfa_p95_s, rtf_p95 or stall_p95_s (p1 to p99.9)")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < math.inf:
            raise PlanError(f"the limit of {key} must be a number of 0 or more, not {limit!r}")
        return cls(traffic_class, metric, float(found[2]) / 100, float(limit))

    def __str__(self) -> str:
        return f"{self.metric} p{self.quantile * 100:g} of class {self.traffic_class} <= {self.limit:g}"


@dataclass(frozen=True)
class Verdict:
    """``met`` is None with too few requests. ``needed_n``: requests that suffice if all stay within the limit.

    ``value``: the sample's quantile, NaN where it falls among unmeasured requests.
    """

    met: bool | None
    value: float
    n: int
    needed_n: int
    reason: str


def judge(slo: Slo, values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Verdict:
    """Decide with ``confidence`` whether the population behind ``values`` (one per request) meets the SLO.

    Exact order statistics: a request exceeds the limit with probability p, so the exceedances are Binomial(n, p), and
    the SLO is p <= 1 - quantile. Met where so few exceedances would be improbable (<= 1 - confidence) at p = 1 -
    quantile, missed where so many would be. Independent requests are assumed. NaN is a request that was not measured:
    it counts as an exceedance when testing for met, and not at all when testing for missed.
    """
    from scipy.special import bdtr, bdtrc  # with pandas half of the start of a reader process, which judges nothing

    values = np.asarray(values, dtype=float)
    unmeasured = int(np.isnan(values).sum())
    breaches = int((values > slo.limit).sum())
    allowed, improbable = 1 - slo.quantile, (1 - confidence) * (1 + 1e-9)
    met = len(values) > 0 and bdtr(breaches + unmeasured, len(values), allowed) <= improbable
    missed = breaches > 0 and bdtrc(breaches - 1, len(values) - unmeasured, allowed) <= improbable
    outcome = True if met else False if missed else None
    needed_n = clean_requests_needed(slo.quantile, confidence)
    reason = _reason(slo, confidence, outcome, len(values), breaches, unmeasured, needed_n)
    return Verdict(outcome, sample_quantile(values, slo.quantile), len(values), needed_n, reason)


def clean_requests_needed(quantile: float, confidence: float) -> int:
    """Requests within the limit that support a verdict of met: the smallest n with quantile^n <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(quantile) - 1e-9)


def sample_quantile(values: Sequence[float] | np.ndarray, quantile: float) -> float:
    """The smallest value that ``quantile`` of the sample does not exceed: always one of the values.

    NaN counts as larger than all others, so that a request which was never served cannot improve a quantile; the
    result is NaN where the quantile falls there, and for an empty sample.
    """
    values = np.sort(np.asarray(values, dtype=float))  # NaN sorts last
    # 0.95 * 20 may be 19.000000000000004: without the slack the rank would be one too high.
    rank = max(math.ceil(quantile * len(values) - 1e-9), 1)
    return float(values[rank - 1]) if len(values) else math.nan


def goodput_per_s(slos: Sequence[Slo], requests: pd.DataFrame, seconds: float) -> float:
    """Requests/s that met every SLO of their class: rows of metrics.per_request over ``seconds``."""
    return float(_good(slos, requests).sum() / seconds)


def goodput_by_class(slos: Sequence[Slo], requests: pd.DataFrame, seconds: float) -> dict[str, float]:
    """``goodput_per_s`` of each class that is among the requests; together they are that of all."""
    good = _good(slos, requests)
    return {str(name): float(own.sum() / seconds) for name, own in good.groupby(requests["traffic_class"])}


def _good(slos: Sequence[Slo], requests: pd.DataFrame) -> pd.Series:
    """Whether each request was completed and met every SLO of its class."""
    good = requests["outcome"] == "done"
    for slo in slos:
        concerned = requests["traffic_class"] == slo.traffic_class
        if slo.metric == "ttfa_s":  # a session found in progress had its first audio long before
            concerned &= requests["start_frame"] == 0
        good &= ~concerned | (requests[slo.metric] <= slo.limit)
    return good


def _reason(
    slo: Slo, confidence: float, met: bool | None, n: int, breaches: int, unmeasured: int, needed_n: int
) -> str:
    word = {True: "met", False: "missed", None: "inconclusive"}[met]
    counts = f"{breaches} of {n} requests above the limit"
    if unmeasured:
        counts += f" and {unmeasured} not measured"
    reason = f"{slo}: {word} at {confidence:.0%} confidence, {counts}"
    if met is None:
        more = f"at least {needed_n} requests within the limit" if n < needed_n else "more requests"
        reason += f"; {more} would decide"
    return reason
