"""Traffic for the simulator: when sessions come, of which class and length, in blocks of arrivals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from harness.capacity.models import memory
from harness.capacity.models.spreads import Spread
from harness.capacity.simulator.layout import ARRIVAL
from harness.capacity.simulator.pool import TOKENS_PER_FRAME
from harness.errors import InputError
from harness.traffic.mix import Mix

BLOCK = 1 << 16
DAY_S = 86_400.0


class Arriving(Protocol):
    """An arrival process, such as ``harness.traffic.arrivals.Arrivals``."""

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Seconds of every arrival since the start, in order."""


@dataclass(frozen=True)
class Varying:
    """Poisson arrivals with a varying rate: ``rate_per_s`` of an array of times in seconds, at most ``highest_per_s``.

    By thinning (Lewis and Shedler, 1979): an arrival at the highest rate is kept with probability rate / highest.
    """

    rate_per_s: Callable[[np.ndarray], np.ndarray]
    highest_per_s: float

    def __post_init__(self) -> None:
        if not 0 < self.highest_per_s < math.inf:
            raise InputError(f"the highest rate is above 0 requests a second, not {self.highest_per_s}")

    @classmethod
    def constant(cls, rate_per_s: float) -> Varying:
        return cls(lambda at_s: np.full(len(at_s), rate_per_s), rate_per_s)

    @classmethod
    def diurnal(cls, mean_per_s: float, swing: float, peak_s: float = 0.75 * DAY_S, period_s: float = DAY_S) -> Varying:
        """mean x (1 + swing cos(2 pi (t - peak) / period)); ``swing`` is 0 to 1."""
        if not 0 <= swing <= 1 or not period_s > 0:
            raise InputError(f"a swing is 0 to 1 and a period above 0 s, not {swing:g} and {period_s:g}")
        turn = 2 * math.pi / period_s
        return cls(lambda at_s: mean_per_s * (1 + swing * np.cos(turn * (at_s - peak_s))), mean_per_s * (1 + swing))

    def blocks(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Arrival times, endlessly, in order; up to 65,536 in a block."""
        start_s = 0.0
        while True:
            times_s = start_s + np.cumsum(rng.exponential(1 / self.highest_per_s, BLOCK))
            rates = self.rate_per_s(times_s)
            if not np.all((rates >= 0) & (rates <= self.highest_per_s * (1 + 1e-9))):
                raise InputError(f"a rate is 0 or more, and at most the highest: {self.highest_per_s:g} a second")
            yield times_s[rng.random(BLOCK) * self.highest_per_s < rates]
            start_s = float(times_s[-1])


@dataclass(frozen=True)
class Demand:
    """Sessions of a mix that arrive as ``arriving`` says, and their use of a device.

    A session's prompt is ``memory.prompt_tokens`` of its frames and ``voice_frames``, its KV cache takes
    ``kv_bytes_per_token`` plus ``state_bytes``, and its TTFA grows by ``prefill_s_per_token`` for each token
    of the prompt. ``ttfa`` and ``rtf``: variation of single sessions around the model's time to first audio and RTF, as
    in a device's fit.
    """

    mix: Mix
    arriving: Varying | Arriving
    kv_bytes_per_token: int = memory.KV_BYTES_PER_TOKEN["1.5b"]
    state_bytes: int = memory.CONVOLUTION_STATE_BYTES
    voice_frames: int = 150
    prefill_s_per_token: float = 0.0
    ttfa: Spread | None = None
    rtf: Spread | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.mix.classes)

    def blocks(self, rng: np.random.Generator, stop_s: float = math.inf) -> Iterator[np.ndarray]:
        """Arrivals [up to 65,536] in order of time, up to ``stop_s``; see ``layout.ARRIVAL``."""
        for times_s in self._times(rng):
            inside = times_s[: np.searchsorted(times_s, stop_s, side="right")]
            index = np.searchsorted(np.cumsum(self._shares()), rng.random(len(inside)), side="right")
            index = np.minimum(index, len(self.classes) - 1)
            yield self._sessions(inside, index, self._lengths(index, rng), rng)
            if len(inside) < len(times_s):
                return

    def found(self, sessions: int, numbers: Sequence[int], rng: np.random.Generator) -> np.ndarray:
        """Sessions of the classes ``numbers`` found in progress at time 0: drawn by work, at a uniform phase.

        What they have spoken is context already. Their class is -1: they are not counted.
        """
        chosen = np.isin(np.arange(len(self.classes)), numbers)
        work = chosen * self._shares() * [each.length.mean_frames() for each in self.mix.classes]
        index = rng.choice(len(work), sessions, p=work / work.sum())
        frames = np.zeros(sessions)
        for number, each in enumerate(self.mix.classes):
            lengths = each.length.frames
            drawn = np.searchsorted(np.cumsum(lengths), rng.random(np.sum(index == number)) * lengths.sum())
            frames[index == number] = lengths[np.minimum(drawn, len(lengths) - 1)]
        block = self._sessions(np.zeros(sessions), index, frames, rng)
        spoken = np.floor(frames * rng.random(sessions))
        block["frames"] -= spoken
        block["context"] += TOKENS_PER_FRAME * spoken
        block["class_index"] = -1
        return block

    def _times(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        if isinstance(self.arriving, Varying):
            yield from self.arriving.blocks(rng)
            return
        times = self.arriving.times(rng)
        while len(block := np.fromiter(itertools.islice(times, BLOCK), dtype=float)):
            yield block

    def _ratios(self, spread: Spread | None, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        ratios = np.ones(len(index))
        if spread is None:
            return ratios
        for number, name in enumerate(self.classes):
            own = index == number
            ratios[own] = spread.of(name).at(rng.random(int(own.sum())))
        return ratios

    def _shares(self) -> np.ndarray:
        weights = np.array([each.weight for each in self.mix.classes], dtype=float)
        return weights / weights.sum()

    def _lengths(self, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        frames = np.empty(len(index))
        for number, each in enumerate(self.mix.classes):
            own = index == number
            frames[own] = each.length.sample(rng, int(own.sum()))
        return frames

    def _sessions(
        self, times_s: np.ndarray, index: np.ndarray, frames: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        block = np.empty(len(times_s), ARRIVAL)
        prompt = memory.prompt_tokens(frames, self.voice_frames)
        block["arrival_s"], block["frames"], block["class_index"] = times_s, frames, index
        block["context"], block["first_s"] = prompt, self.prefill_s_per_token * prompt
        if len(block):
            taken = memory.session_bytes(prompt, frames, self.kv_bytes_per_token, state_bytes=self.state_bytes)
            block["bytes"] = taken
        block["pick"] = rng.random(len(times_s))
        block["segment"] = block["turn"] = 0.0
        block["ttfa_ratio"], block["rtf_ratio"] = (self._ratios(each, index, rng) for each in (self.ttfa, self.rtf))
        return block
