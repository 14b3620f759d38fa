"""The clock of a server: that of its host, or slower by the time dilation of an emulated GPU.

Emulated GPUs may be too fast for the host that carries their frames. Their time is then dilated: stage times, queue
delays and arrivals take N times as long on the host, and every record is in undilated time. This module alone converts.
It does so where time crosses: in the configurations that a server gets, in the emulated GPU, where a request becomes
due and a stream becomes a Result, and in samples of Triton and of the host.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from harness.errors import InputError

MOST_DILATION = 1000.0
AUTO = "auto"  # the smallest factor with which the host is not too busy


@dataclass(frozen=True)
class Clock:
    """A clock of which one second takes ``dilation`` seconds of the host's CLOCK_MONOTONIC. Raises InputError."""

    dilation: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.dilation <= MOST_DILATION:
            raise InputError(f"dilation {self.dilation:g} must lie in 1 to {MOST_DILATION:g}; 1 is none")

    @classmethod
    def of(cls, text: str) -> Clock:
        """The clock that a server's ``wire.DILATION`` parameter names; "" is the host's. Raises ValueError."""
        return cls(float(text)) if text else HOST

    def now_ns(self) -> int:
        return self.of_host(time.monotonic_ns())

    def of_host(self, ns: int) -> int:
        """A time or a duration of the host, in ns, on this clock."""
        return ns if self.dilation == 1 else round(ns / self.dilation)

    def on_host(self, ns: int) -> int:
        """A time or a duration of this clock, in ns, on the host's."""
        return ns if self.dilation == 1 else round(ns * self.dilation)

    def host_span(self, span: float) -> float:
        """How long a span of this clock takes on the host, in the same unit."""
        return span * self.dilation


HOST = Clock()


def dilation_of(text: str) -> float | str:
    """The factor that ``--dilate`` gives, or AUTO. Raises InputError."""
    if text == AUTO:
        return AUTO
    try:
        return Clock(float(text)).dilation
    except (ValueError, InputError):
        raise InputError(
            f"--dilate {text!r}: give a factor from 1 to {MOST_DILATION:g}, or {AUTO} for the "
            "smallest that takes less than 60% of this host"
        ) from None
