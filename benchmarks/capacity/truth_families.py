"""The families of ``truths.py``: devices whose step time is known, and how far measuring them goes wrong."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import truth_judge
import truth_ladders
from truth_ladders import Measured

from harness.capacity.fitting.fit import fit_run
from harness.records.fit import Fit
from harness.records.slo import Slo
from harness.traffic.mix import Draw, Lengths, Mix, TrafficClass

Curve = Callable[[np.ndarray], np.ndarray]
RTF = 0.9
UNIT = "a device of known physics"
TARGETS = 6  # of a family
_JITTER = 0.03


def mix_of(**classes: tuple[float, Mapping]) -> Mix:
    """A mix of classes: (weight, length)."""
    made = (TrafficClass(name, weight, Lengths.parse(length)) for name, (weight, length) in classes.items())
    return Mix("truths", tuple(made))


def linear(intercept_s: float, slope_s: float) -> Curve:
    return lambda n: intercept_s + slope_s * n


def knee(n: np.ndarray) -> np.ndarray:
    """Throughput falls above 20 sessions."""
    return 0.04 + 0.001 * n + 0.03 * np.maximum(n - 20, 0)


def stairs(n: np.ndarray) -> np.ndarray:
    """Batches are filled up to multiples of eight."""
    return 0.02 + 0.02 * np.ceil(n / 8)


def retrograde(n: np.ndarray) -> np.ndarray:
    """Throughput is highest at 14 sessions, and falls slowly above."""
    return 0.02 + 0.003 * n + 0.0001 * n**2


def root(n: np.ndarray) -> np.ndarray:
    return 0.01 + 0.0246 * np.sqrt(n)


def cache(n: np.ndarray) -> np.ndarray:
    """Three times the slope from 12 sessions on, where a cache is full."""
    return 0.024 + 0.003 * n + 0.006 * np.maximum(n - 12, 0)


def steep(n: np.ndarray) -> np.ndarray:
    """Nearly flat, and very steep near the sessions that the SLOs allow."""
    return 0.03 + 0.0025 * n + 0.04 * (n / 20) ** 8


SHORT, LONG = (0.7, {"uniform": [4, 16]}), (0.3, {"uniform": [30, 90]})
MIX = mix_of(short=SHORT, long=LONG)
HOURS = mix_of(short=SHORT, long=(0.3, {"uniform": [600, 1800]}))
NINETY = mix_of(short=(0.99, {"uniform": [4, 16]}), long=(0.01, {"fixed": 5400}))
HEAVY = mix_of(short=(0.9, {"lognormal": {"median": 8, "sigma": 1.0, "max": 120}}),
               long=(0.1, {"lognormal": {"median": 60, "sigma": 1.2, "max": 1800}}))  # fmt: skip
WITH_RARE = mix_of(short=SHORT, long=LONG, rare=(0.1, {"uniform": [8, 20]}))


@dataclass(frozen=True)
class Family:
    """A device and how it is measured. The standard one: a linear step, one ladder, 1% of noise of a rung.

    ``context_s``: seconds of a step more per frame spoken by all its sessions. ``host_sd``: relative standard deviation
    between ladders; ``rung_sd``: of a rung within its ladder. ``devices``: range of the target rates, as multiples of
    the rate of one device alone. ``ratios``: RTF of a class / that of the frame clock. ``unseen``: classes that no
    ladder has. ``names``: what must be said where the answer is not a sure one, as a pattern; a refusal, too, is right
    then. ``routing``: of the fleet. ``first_audio_s``: limit of the p95 of the time to first audio of class short,
    which comes after a step. ``barred``: whether its coverage counts for the smallest.
    """

    name: str
    step: Curve = field(default=linear(0.02, 0.005), repr=False)
    context_s: float = 0.0
    host_sd: float = 0.0
    rung_sd: float = 0.01
    ladders: int = 1
    mix: Mix = field(default=MIX, repr=False)
    sessions: tuple[int, ...] = (1, 2, 4, 8, 16, 24, 32)
    seconds: float = 12.0
    cap: float = 1.0
    devices: tuple[float, float] = (6, 40)
    ratios: Mapping[str, float] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    names: str = ""
    routing: str = truth_judge.LEAST_LOADED
    first_audio_s: float | None = None
    found: Callable[[Mix, int, np.random.Generator], list[Draw]] | None = None
    judged_sessions: int = 60_000
    barred: bool = True

    @property
    def slos(self) -> tuple[Slo, ...]:
        rtf = tuple(Slo(each.name, "rtf", 0.95, RTF) for each in self.mix.classes)
        return rtf if self.first_audio_s is None else (*rtf, Slo("short", "ttfa_s", 0.95, self.first_audio_s))

    def judge(self) -> truth_judge.Judge:
        limits = {each.name: RTF for each in self.mix.classes}
        names = [each.name for each in self.mix.classes]
        audio = None if self.first_audio_s is None else (names.index("short"), 1.0, self.first_audio_s)
        more = {"context_s": self.context_s, "jitter": _JITTER, "first_audio": audio}
        service = truth_judge.service_of(self.step, self.mix, limits, self.ratios, **more)
        return truth_judge.Judge(service, self.routing, self.cap, sessions=self.judged_sessions)

    def rng(self, *seed: int) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(self.name.encode()), *seed])

    def targets(self, single: float) -> list[float]:
        """Target rates (requests/s), given the rate of a single device."""
        places = (np.arange(TARGETS) + self.rng(0).random(TARGETS)) / TARGETS
        low, high = np.log(self.devices)
        return [float(f"{each:.4g}") for each in 1.1 * single * np.exp(low + (high - low) * places)]

    def factors(self, ladder: int, rng: np.random.Generator) -> np.ndarray:
        """What each rung's step takes longer, in a ladder of this number (from 0)."""
        return rng.lognormal(0, self.host_sd) * rng.lognormal(0, self.rung_sd, len(self.sessions))

    def seen(self, rng: np.random.Generator) -> np.ndarray:
        """How much longer each rung's step took while others were seen to disturb it, before it was measured again."""
        return np.ones(len(self.sessions))

    def measure(self, rng: np.random.Generator) -> Measured:
        return Measured.together([self.ladder(number, rng) for number in range(self.ladders)])

    def ladder(self, number: int, rng: np.random.Generator, deployment: int = 0) -> Measured:
        own = self.mix.only(lambda name: name not in self.unseen)
        more = {"context_s": self.context_s, "jitter": _JITTER, "found": self.found}
        ladder = truth_ladders.Ladder(self.step, own, self.sessions, self.seconds, **more)
        name, factors = f"ladder-{deployment}-{number}", self.factors(number, rng)
        return ladder.measure(name, {"delay_us": 500 * deployment}, factors, rng, self.seen(rng))

    def fit(self, measured: Measured, rng: np.random.Generator, **options) -> Fit:
        """The fit of what was measured, as a run is fitted."""
        options["in_rungs"] = measured.in_rungs
        return fit_run(measured.trials, measured.requests, self.mix, self.slos, rng, UNIT, **options)


@dataclass(frozen=True)
class Winner(Family):
    """Identical deployments: the best after one ladder of each gets two more, as in a search."""

    deployments: int = 6

    def measure(self, rng: np.random.Generator) -> Measured:
        first = [self.ladder(0, rng, number) for number in range(self.deployments)]
        best = self.fit(Measured.together(first), rng).best or 0
        return Measured.together([*first, *(self.ladder(number, rng, best) for number in (1, 2))])


@dataclass(frozen=True)
class OneRung(Family):
    """One rung of the first ladder is ``times`` slower; ``rung``: its place, or None for any."""

    times: float = 1.25
    rung: int | None = -1

    def factors(self, ladder: int, rng: np.random.Generator) -> np.ndarray:
        factors = super().factors(ladder, rng)
        place = int(rng.integers(1, len(factors))) if self.rung is None else self.rung
        factors[place] *= self.times if ladder == 0 else 1.0
        return factors


@dataclass(frozen=True)
class Disturbed(Family):
    """Bursts of other load slow each rung with a chance of ``share``, by 10 to 30%; ``witnessed``: it is seen."""

    share: float = 0.25
    witnessed: bool = False

    def factors(self, ladder: int, rng: np.random.Generator) -> np.ndarray:
        factors = super().factors(ladder, rng)
        return factors if self.witnessed else factors * self._bursts(rng)

    def seen(self, rng: np.random.Generator) -> np.ndarray:
        return self._bursts(rng) if self.witnessed else super().seen(rng)

    def _bursts(self, rng: np.random.Generator) -> np.ndarray:
        slow = 1 + rng.uniform(0.1, 0.3, len(self.sessions))
        return np.where(rng.random(len(self.sessions)) < self.share, slow, 1.0)


@dataclass(frozen=True)
class Drift(Family):
    """The host changes evenly while a ladder is measured: its last rung is off by a factor of this deviation."""

    drift_sd: float = 0.10

    def factors(self, ladder: int, rng: np.random.Generator) -> np.ndarray:
        factors = super().factors(ladder, rng)
        return factors * np.exp(rng.normal(0, self.drift_sd) * np.linspace(0, 1, len(factors)))


def _context() -> dict:
    """Two thirds of the slope from context, at the mean context of a session."""
    service = truth_judge.service_of(linear(0.02, 0.005 / 3), HOURS, {})
    return {"step": service.step, "context_s": 0.01 / 3 / service.mean_context, "mix": HOURS, "devices": (5, 25)}


def _host_factors() -> list[Family]:
    return [
        Family(f"host-{sd:.0%}-{ladders}".replace("%", ""), host_sd=sd, ladders=ladders)
        for sd in (0.0, 0.05, 0.10)
        for ladders in (1, 2, 3)
    ]


_LONG_RUNS = 400_000  # sessions of a run where a device may collapse
_OUTLIER = "as long as the other rungs show|made 0 frames"
FAMILIES = {
    each.name: each
    for each in (
        *_host_factors(),
        Family("host-20-3", host_sd=0.20, ladders=3, barred=False),
        Winner("winner", host_sd=0.10),
        Family("knee", knee, judged_sessions=_LONG_RUNS, devices=(12, 90), sessions=(1, 2, 4, 8, 12, 16, 20, 24, 28)),
        Family("stairs", stairs, judged_sessions=_LONG_RUNS, sessions=(1, 4, 8, 12, 16, 20, 24, 32, 40, 48)),
        OneRung("last-rung"),
        OneRung("last-rung-repeated", ladders=3),
        OneRung("last-rung-cap-85", times=1.15, cap=0.85),
        Family("context", **_context()),
        Family("context-stratified", found=truth_ladders.stratified, **_context()),
        OneRung("rung-100x", times=100.0, rung=None, names=_OUTLIER),
        Family("class-unseen", mix=WITH_RARE, unseen=("rare",), ratios={"rare": 1.6}, names="pooled"),
        Family("round-robin", routing=truth_judge.ROUND_ROBIN),
        Family("random-routing", routing=truth_judge.RANDOM),
        Disturbed("disturbed-1"),
        Disturbed("disturbed-3", ladders=3),
        Disturbed("disturbed-seen", share=0.5, witnessed=True),
        # the benchmark's own
        Family("retrograde", retrograde, judged_sessions=_LONG_RUNS),
        Family("heavy-tail", mix=HEAVY, ladders=2),
        Drift("drift", ladders=3),
        Family("root", root),
        Family("cache", cache),
        Family("small-pools", host_sd=0.05, ladders=3, devices=(0.7, 3)),
        Family("ninety-minutes", mix=NINETY, devices=(4, 15)),
        Family("steep-tail", steep, judged_sessions=_LONG_RUNS, devices=(8, 60)),
        Family("noisy-rungs", rung_sd=0.05),
        Family("first-audio", first_audio_s=0.1),
        Family("short-rungs", seconds=4.0, rung_sd=0.02, ladders=2),
        Family("ladder-too-short", sessions=(1, 2, 4, 8, 12), names="no slo binds|beyond"),
    )
}
