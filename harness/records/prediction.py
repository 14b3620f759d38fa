"""The prediction of an open-loop run from a fit, as stored in predictions.jsonl and with the trial."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.content import absent, content_of, read
from harness.records.fit import FittedModel

_SHA256 = "sha256"


def hash_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a prediction's content as JSON, without the hash in it."""
    bare = {name: value for name, value in content.items() if name != _SHA256}
    return hashlib.sha256(json.dumps(bare, sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassPrediction:
    """Quantiles of a traffic class; NaN where no such metric was measured, None where it was not predicted."""

    ttfa_p50_s: float | None = absent(None)
    ttfa_p95_s: float | None = absent(None)
    rtf_p50: float | None = absent(None)
    rtf_p95: float | None = absent(None)
    stall_p50_s: float | None = absent(None)
    stall_p95_s: float | None = absent(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A predicted open-loop run in its steady state. ``seconds``: its length. ``sessions_p95``: as arrivals find them.

    ``model``: a copy of the fit at that time, so that the run can be compared with exactly that. ``made_at`` (ISO 8601,
    UTC) and ``sha256`` are "" until it is sealed. ``content_sha256``: the hash of the content that it was read from.
    """

    rate_per_s: int | float
    seconds: int | float
    sessions: float
    frames_per_s: float
    step_s: float
    sessions_p95: float | None = absent(None)
    classes: Mapping[str, ClassPrediction] = field(default_factory=dict)
    model: FittedModel | None = absent(None)
    made_at: str = absent("")
    sha256: str = absent("")
    content_sha256: str = field(default="", compare=False)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Prediction:
        """Read its content, which is flat: ``<class>.<name>`` is a figure of a class. Raises ValueError."""
        own: dict[str, Any] = {}
        classes: dict[str, dict[str, float]] = {}
        for name, value in content.items():
            traffic_class, _, figure = name.rpartition(".")
            if traffic_class:
                classes.setdefault(traffic_class, {})[figure] = math.nan if value is None else value
            else:
                own[name] = value
        return read(cls, own | {"classes": classes, "content_sha256": hash_of(content)})

    def to_dict(self) -> dict[str, Any]:
        """The content: flat, as stored and hashed."""
        content: dict[str, Any] = {}
        for name, value in content_of(self).items():
            content |= _flat(value) if name == "classes" else {name: _with_null(value)}
        del content["content_sha256"]
        return content

    def figure(self, name: str) -> float | None:
        """The figure of this name, as in a summary: ``<class>.<name>``, or the name alone; None where it is unknown."""
        traffic_class, _, figure = name.rpartition(".")
        of = self.classes.get(traffic_class) if traffic_class else self
        value = getattr(of, figure, None)
        return value if isinstance(value, int | float) and math.isfinite(value) else None


def _flat(classes: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {f"{name}.{each}": _with_null(value) for name, own in classes.items() for each, value in own.items()}


def _with_null(value: Any) -> Any:
    """The value with None for each NaN in it."""
    if isinstance(value, dict):
        return {name: _with_null(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_null(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
