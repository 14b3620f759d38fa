"""The load of a trial as stored with it. Trial ids are derived from its content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from harness.content import absent, content_of, read


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRecord:
    """The file of a trace: its number of arrivals over ``seconds``; ``repeat``: it starts again at its end."""

    file: str
    sha256: str
    arrivals: int
    seconds: float
    repeat: bool

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialLoad:
    """A concurrency ladder, whose ``sessions`` were held in turn, or an open loop of ``arrivals``.

    ``rate_per_s``: requests per second, None where there is no single rate. ``stages``: (seconds, rate, rate at the
    end) of each stage of arrivals whose rate changes. ``precision``: a rung ended early once its rate was known this
    precisely. ``seconds``: the maximum length of a rung, or the length of an open loop. ``seed``: of lengths, scripts
    and arrivals. ``chunk_frames``, ``diffusion_steps``: set in every request; None leaves them to the mix.
    """

    loop: Literal["closed", "open"]
    arrivals: str = absent("")
    rate_per_s: int | float | None = absent(None)
    burstiness: float | None = absent(None)
    stages: tuple[tuple[float, float, float], ...] = absent(())
    trace: TraceRecord | None = absent(None)
    sessions: Annotated[tuple[int, ...], Field(validation_alias="concurrency")] = absent((), key="concurrency")
    precision: float | None = absent(None)
    seconds: int | float | None
    seed: int
    chunk_frames: int | None = absent(None)
    diffusion_steps: int | None = absent(None)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> TrialLoad:
        """Read its content. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)
