"""The traffic mix: class, length, speakers and script of each request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from scipy.special import ndtr, ndtri

from harness import wire
from harness.errors import InputError, ScriptError
from harness.records.load_test import ClassRecord
from harness.records.schema import Request
from harness.records.slo import Slo
from harness.traffic.csv_columns import read_bytes, read_column
from harness.traffic.script import (
    TICKS_PER_S,
    Script,
    Turn,
    count_speakers,
    cut_to_ticks,
    format_script,
    read_script,
    speech_s,
    speech_ticks,
    validate_utf8,
    without_gaps,
)

WORDS_PER_FRAME = 24 / 60  # 180 words a minute of audio
_TICKS_PER_WORD = TICKS_PER_S * wire.SECONDS_PER_FRAME / WORDS_PER_FRAME
FROM_SCRIPT = "from_script"  # length of a class whose scripts are spoken whole
MAX_SECONDS = wire.MAX_FRAMES * wire.SECONDS_PER_FRAME
_QUANTILES = 1 << 14


@dataclass(frozen=True, eq=False)
class Lengths:
    """A distribution of speech lengths, as a sorted table of equally likely frame counts.

    ``frames``: int64 [n], each within 1 to 40,500. A continuous distribution is the table of its 16,384
    midpoint quantiles, so that its mean is exactly that of the samples. ``from_script``: each real script is spoken
    whole; the table is theirs, and empty until they are known (see ``Mix.of_scripts``).
    """

    frames: np.ndarray
    from_script: bool = False

    @classmethod
    def parse(cls, spec: Mapping | str, folder: Path | str = ".") -> Lengths:
        """Parse lengths, all in seconds of audio, from one of:

        ``{"fixed": 10}``, ``{"uniform": [4, 16]}``, ``{"lognormal": {"median": 90, "sigma": 0.5, "max": 300}}`` (the
        median before the cut at ``max``, which defaults to 90 minutes) or ``{"empirical": "file.csv"}`` (its column
        ``seconds``, or its only one; relative to ``folder``); or ``"from_script"``. Raises InputError.
        """
        if spec == FROM_SCRIPT:
            return cls(np.empty(0, np.int64), from_script=True)
        if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in _SHAPES:
            known = f"{', '.join(_SHAPES)}, in seconds of audio, or {FROM_SCRIPT}"
            raise InputError(f"a length must be one of {known}, not {spec!r}")
        (kind, value), *_ = spec.items()
        seconds = _SHAPES[kind](value) if kind != "empirical" else _empirical(Path(folder) / str(value))
        frames = np.rint(np.sort(seconds) * wire.FRAMES_PER_SECOND)
        return cls(np.clip(frames, 1, wire.MAX_FRAMES).astype(np.int64))

    def mean_frames(self) -> float:
        return float(self._known().mean())

    @overload
    def sample(self, rng: np.random.Generator, n: None = None) -> int: ...

    @overload
    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray: ...

    def sample(self, rng: np.random.Generator, n: int | None = None) -> int | np.ndarray:
        """One length in frames, or an int64 array of ``n``."""
        drawn = self._known()[rng.integers(len(self.frames), size=n)]
        return int(drawn) if n is None else drawn

    def _known(self) -> np.ndarray:
        if not len(self.frames):
            raise InputError(f"length: {FROM_SCRIPT} needs real scripts: give their folder as `scripts` or --scripts")
        return self.frames

    def sample_in_progress(self, rng: np.random.Generator) -> int:
        """The length of a session found in progress, drawn in proportion to length."""
        return int(self.frames[np.searchsorted(self._work, rng.random() * self._work[-1], side="right")])

    @cached_property
    def _work(self) -> np.ndarray:
        return np.cumsum(self._known())


@dataclass(frozen=True)
class TrafficClass:
    """A share of the traffic with its own lengths; ``speakers`` is the range of their number.

    ``slos`` are limits such as ``{"ttfa_p95_s": 1.0, "rtf_p95": 0.9}`` (see ``slo.Slo.parse``). None for
    ``chunk_frames``, ``voices`` and ``diffusion_steps`` means those of the mix.
    """

    name: str
    weight: float
    length: Lengths
    speakers: tuple[int, int] = (1, 1)
    slos: Mapping[str, float] = field(default_factory=dict, hash=False)
    chunk_frames: int | None = None
    voices: tuple[int, ...] | None = None
    diffusion_steps: int | None = None

    def __post_init__(self) -> None:
        try:
            self.slo_list()
        except InputError as error:
            raise InputError(f"class {self.name}: {error}") from None
        low, high = self.speakers
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise InputError(f"class {self.name}: weight {self.weight} must be above 0")
        if not 1 <= low <= high <= wire.MAX_SPEAKERS:
            raise InputError(f"class {self.name}: speakers [{low}, {high}] must lie in 1 to {wire.MAX_SPEAKERS}")

    def slo_list(self) -> tuple[Slo, ...]:
        return tuple(Slo.parse(self.name, key, limit) for key, limit in self.slos.items())


@dataclass(frozen=True)
class Draw:
    """A request as drawn from a mix; ``phase`` of its ``frames`` have been spoken already.

    ``whole``: its script is an uncut real one.
    """

    traffic_class: str
    frames: int
    speakers: int
    phase: int = 0
    whole: bool = False


@dataclass(frozen=True)
class Mix:
    """Classes of traffic, drawn by weight. ``voices``: voice ids from which each speaker's is drawn."""

    name: str
    classes: tuple[TrafficClass, ...]
    chunk_frames: int = 1
    voices: tuple[int, ...] = (1, 2, 3, 4)
    diffusion_steps: int = wire.DEFAULT_DIFFUSION_STEPS

    def __post_init__(self) -> None:
        names = [each.name for each in self.classes]
        if not names or len(set(names)) != len(names):
            raise InputError(f"mix {self.name}: needs one class or more, each with its own name; has {names}")

    @classmethod
    def combined(cls, parts: Mapping[str, tuple[float, Mix]]) -> Mix:
        """Combine several mixes, each with a name and a weight.

        Classes are renamed PART/CLASS, so that two parts may have classes of one name. Within a part, shares stay as in
        its own mix.
        """
        classes = [
            replace(
                each,
                name=f"{name}/{each.name}",
                weight=weight * mix.shares()[each.name],
                chunk_frames=each.chunk_frames or mix.chunk_frames,
                voices=each.voices or mix.voices,
                diffusion_steps=each.diffusion_steps or mix.diffusion_steps,
            )
            for name, (weight, mix) in parts.items()
            for each in mix.classes
        ]
        voices = sorted({voice for _, mix in parts.values() for voice in mix.voices})
        first = next(iter(parts.values()))[1]
        return cls("+".join(parts), tuple(classes), first.chunk_frames, tuple(voices), first.diffusion_steps)

    @property
    def slos(self) -> tuple[Slo, ...]:
        """The SLOs of all its classes."""
        return tuple(slo for each in self.classes for slo in each.slo_list())

    def with_slos(self, slos: Mapping[str, Mapping[str, float]]) -> Mix:
        """The mix with these SLOs for its classes, by name, instead of its own."""
        return replace(self, classes=tuple(replace(each, slos=slos.get(each.name, {})) for each in self.classes))

    def only(self, keep: Callable[[str], bool]) -> Mix:
        """The mix of the classes whose names are in ``keep``; their relative weights are unchanged."""
        return replace(self, classes=tuple(each for each in self.classes if keep(each.name)))

    @property
    def speaks_whole_scripts(self) -> bool:
        return any(each.length.from_script for each in self.classes)

    def of_scripts(self, source: ScriptSource) -> Mix:
        """The mix with the lengths of these scripts in classes that speak them whole. Raises InputError without any."""
        if not self.speaks_whole_scripts:
            return self
        lengths = Lengths(np.sort(source.lengths), from_script=True)
        lengths.mean_frames()  # refuses an empty one
        return replace(
            self,
            classes=tuple(replace(each, length=lengths) if each.length.from_script else each for each in self.classes),
        )

    def record(self) -> dict[str, ClassRecord]:
        """Its definition, by class."""
        return {
            each.name: ClassRecord(
                share=round(float(share), 6),
                mean_audio_s=round(each.length.mean_frames() * wire.SECONDS_PER_FRAME, 3),
                speakers=each.speakers,
                slos=dict(each.slos),
                chunk_frames=each.chunk_frames,
                diffusion_steps=each.diffusion_steps,
            )
            for each, share in zip(self.classes, self._shares, strict=True)
        }

    def shares(self) -> dict[str, float]:
        """Each class's share of the requests."""
        return {each.name: float(share) for each, share in zip(self.classes, self._shares, strict=True)}

    def mean_frames(self) -> float:
        """Mean frames of a request, over all classes."""
        return float(self._shares @ [each.length.mean_frames() for each in self.classes])

    def mean_audio_s(self) -> float:
        """Mean seconds of audio per request; times the rate, this is the offered load."""
        return self.mean_frames() * wire.SECONDS_PER_FRAME

    def sample(self, rng: np.random.Generator) -> Draw:
        """A new request."""
        chosen = self.classes[rng.choice(len(self.classes), p=self._shares)]
        whole = chosen.length.from_script
        return Draw(chosen.name, chosen.length.sample(rng), _between(rng, chosen.speakers), whole=whole)

    def sample_in_progress(self, rng: np.random.Generator) -> Draw:
        """A session found at a random moment of the steady state.

        Renewal theory (the inspection paradox): its class and length are drawn in proportion to their work, and
        its phase is uniform over that length.
        """
        work = self._shares * [each.length.mean_frames() for each in self.classes]
        chosen = self.classes[rng.choice(len(self.classes), p=work / work.sum())]
        frames = chosen.length.sample_in_progress(rng)
        phase, whole = int(rng.integers(frames)), chosen.length.from_script
        return Draw(chosen.name, frames, _between(rng, chosen.speakers), phase, whole)

    @cached_property
    def _shares(self) -> np.ndarray:
        weights = np.array([each.weight for each in self.classes], dtype=float)
        return weights / weights.sum()


def requests(mix: Mix, rng: np.random.Generator, scripts: ScriptSource, *, steady: bool = False) -> Iterator[Request]:
    """Endless requests of ``mix``, all with ``due_ns`` 0; an id is a number drawn from ``rng`` and a counter.

    ``steady``: sessions found in progress instead of new ones, so that traffic of 90-minute requests is in its
    steady state from the first second. Take as many as the window starts with, then continue with new ones.
    """
    classes = {each.name: each for each in mix.classes}
    series = f"{int(rng.integers(1 << 48)):012x}"
    number = 0
    while True:
        draw = mix.sample_in_progress(rng) if steady else mix.sample(rng)
        own = classes[draw.traffic_class]
        if draw.whole:
            script, speakers = scripts.whole(rng, draw.frames)
        else:
            script, speakers = scripts.script(rng, draw.frames, draw.speakers)
        yield Request(
            request_id=f"{series}-{number}",
            traffic_class=draw.traffic_class,
            script=script,
            speaker_ids=tuple(int(voice) for voice in rng.choice(own.voices or mix.voices, size=speakers)),
            frames=draw.frames - draw.phase,
            start_frame=draw.phase,
            chunk_frames=own.chunk_frames or mix.chunk_frames,
            diffusion_steps=own.diffusion_steps or mix.diffusion_steps,
            seed=int(rng.integers(1 << 31)),
        )
        number += 1


@dataclass(frozen=True)
class ScriptSource:
    """Scripts of a wanted length: generated, or cut from real files (``ScriptSource.from_folder``).

    ``remarks``: probable mistakes in the files, each with its file and line.
    """

    files: tuple[tuple[Turn, ...], ...] = field(default=(), repr=False)
    remarks: tuple[str, ...] = ()
    folder: str = ""

    @classmethod
    def from_folder(cls, folder: Path | str) -> ScriptSource:
        """The ``.txt`` scripts of a folder, in order of name. Raises InputError naming the file."""
        paths = sorted(path for path in Path(folder).glob("*.txt") if not path.name.startswith("."))
        if not paths:
            raise ScriptError(f"{folder}: no .txt file here; give a folder of 'Speaker N: text' scripts")
        scripts = [_read_script(path) for path in paths]
        read = zip(paths, scripts, strict=True)
        remarks = tuple(f"{path}: {remark}" for path, script in read for remark in script.remarks)
        return cls(tuple(script.turns for script in scripts), remarks, str(folder))

    def script(self, rng: np.random.Generator, frames: int, speakers: int) -> tuple[str, int]:
        """A script of about 180 words per minute of audio (or as ``speech_ticks`` counts), and its number of speakers.

        A real file keeps its own speakers, whatever ``speakers`` says; it is cut, or repeated, to the length needed.
        """
        words = max(math.ceil(frames * WORDS_PER_FRAME), 1)
        if self.files:
            turns = without_gaps(_fit(self.files[rng.integers(len(self.files))], round(words * _TICKS_PER_WORD)))
        else:
            turns = _generate_turns(rng, max(words, speakers), speakers)
        return format_script(turns), count_speakers(turns)

    def whole(self, rng: np.random.Generator, frames: int) -> tuple[str, int]:
        """One of the files that take ``frames`` (see ``lengths``) to speak, unchanged, and its number of speakers."""
        alike = [turns for turns, length in zip(self.files, self.lengths.tolist(), strict=True) if length == frames]
        turns = alike[rng.integers(len(alike))]
        return format_script(turns), count_speakers(turns)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Frames that each file takes to speak: int64 [files]. Raises ScriptError for more than 90 minutes."""
        seconds = [speech_s(turns) for turns in self.files]
        if max(seconds, default=0) > MAX_SECONDS:
            raise ScriptError(
                f"{self.folder}: a script takes about {max(seconds) / 60:.0f} minutes to speak, but a request has at "
                f"most {MAX_SECONDS / 60:g}: cut it into parts"
            )
        return np.maximum(np.rint(np.array(seconds) * wire.FRAMES_PER_SECOND), 1).astype(np.int64)


def _fixed(value: float) -> np.ndarray:
    return np.array([_seconds("fixed", value)])


def _uniform(value: tuple[float, float]) -> np.ndarray:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"uniform takes [lowest, highest] seconds, not {value!r}")
    low, high = (_seconds("uniform", bound) for bound in value)
    if low > high:
        raise InputError(f"uniform: the lowest, {low:g} s, is above the highest, {high:g} s")
    return low + (high - low) * _midpoints()


def _lognormal(value: Mapping) -> np.ndarray:
    if not isinstance(value, Mapping) or not {"median", "sigma"} <= set(value) <= {"median", "sigma", "max"}:
        raise InputError(f"lognormal takes median, sigma and (optionally) max, not {value!r}")
    median = _seconds("lognormal median", value["median"])
    longest = _seconds("lognormal max", value.get("max", MAX_SECONDS))
    sigma = value["sigma"]
    if not _is_number(sigma) or not 0 < sigma <= 5:
        raise InputError(f"lognormal: sigma {sigma!r} must be above 0 and at most 5")
    if longest < median:
        raise InputError(f"lognormal: max, {longest:g} s, is below the median, {median:g} s")
    below_longest = ndtr(math.log(longest / median) / sigma)
    return median * np.exp(sigma * ndtri(_midpoints() * below_longest))


def _empirical(path: Path) -> np.ndarray:
    column = read_column(path, "seconds")
    seconds = column.numbers("length in seconds")
    for (line, text), value in zip(column.cells, seconds, strict=True):
        if not 0 < value <= MAX_SECONDS:
            raise InputError(
                f"{path}: line {line}: {text} must be seconds above 0 and at most {MAX_SECONDS:g} (90 minutes): "
                "convert minutes and milliseconds to seconds, and cut what is longer into parts"
            )
    return np.array(seconds, dtype=float)


_SHAPES = {"fixed": _fixed, "uniform": _uniform, "lognormal": _lognormal, "empirical": _empirical}


def _midpoints() -> np.ndarray:
    return (np.arange(_QUANTILES) + 0.5) / _QUANTILES


def _seconds(what: str, value: float) -> float:
    if not _is_number(value) or not 0 < value <= MAX_SECONDS:
        raise InputError(f"{what}: {value!r} must be seconds above 0 and at most {MAX_SECONDS:g}")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _between(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


def _read_script(path: Path) -> Script:
    try:
        return read_script(validate_utf8(read_bytes(path)))
    except ScriptError as error:
        raise ScriptError(f"{path}: {error}") from None


def _fit(turns: tuple[Turn, ...], ticks: int) -> list[Turn]:
    """The turns cut, or repeated, to take ``ticks`` to speak."""
    repeats, rest = divmod(ticks, sum(speech_ticks(turn.text) for turn in turns))
    fitted = list(turns) * repeats
    for turn in turns:
        if rest <= 0:
            break
        fitted.append(Turn(turn.speaker, cut_to_ticks(turn.text, rest)))
        rest -= speech_ticks(turn.text)
    return fitted


def _generate_turns(rng: np.random.Generator, words: int, speakers: int) -> list[Turn]:
    spoken = _VOCABULARY[rng.integers(len(_VOCABULARY), size=words)].tolist()
    ends = _turn_ends(rng, words, speakers)
    order = _speaker_order(rng, len(ends), speakers)
    turns = zip(order, [0, *ends[:-1]], ends, strict=True)
    return [Turn(speaker, _sentences(rng, spoken[start:end])) for speaker, start, end in turns]


def _turn_ends(rng: np.random.Generator, words: int, speakers: int) -> list[int]:
    """Word counts at which turns end: median 32 words, as in recorded conversation; at least one turn per speaker."""
    sizes = np.maximum(rng.lognormal(math.log(32), 0.8, size=words // 8 + 1).astype(int), 4)
    ends = np.cumsum(sizes)
    ends = [*ends[ends < words].tolist(), words]
    if len(ends) < speakers:
        ends = [words * turn // speakers for turn in range(1, speakers + 1)]
    return ends


def _speaker_order(rng: np.random.Generator, turns: int, speakers: int) -> list[int]:
    """The speaker of each turn: first everyone once, in order; then anyone but the last speaker."""
    if speakers == 1:
        return [1] * turns
    steps = rng.integers(1, speakers, size=turns)
    steps[:speakers] = 1
    return ((np.cumsum(steps) - 1) % speakers + 1).tolist()


def _sentences(rng: np.random.Generator, words: list[str]) -> str:
    pieces = []
    lengths = rng.integers(5, 20, size=len(words) // 5 + 1).tolist()
    while words:
        length = lengths.pop()
        sentence, words = words[:length], words[length:]
        pieces.append(" ".join(sentence).capitalize() + ("?" if length % 7 == 0 else "."))
    return " ".join(pieces)


# Function words are repeated, as they are frequent in speech.
_VOCABULARY = np.array(
    (
        "the the the the of of and and and to to to a a in in is is you you that that it it we we I'm so so "
        "but or with with for on was are they this this have have what about just like really because there "
        "from when how well yeah right think know people time year way thing world question story idea show "
        "research system data climate market company science language energy history music machine "
        "university government technology important different interesting wonderful difficult remarkable "
        "possible recent simple global early actually basically certainly probably suddenly together "
        "usually finally exactly nearly almost again listen remember explain imagine understand consider "
        "believe happen change measure follow discover begin audience conversation example evidence "
        "decision experience generation information temperature population morning evening country river "
        "mountain ocean winter engine window garden kitchen hospital neighbour"
    ).split()
)


def _mix(name: str, **classes: tuple[float, dict, tuple[int, int]]) -> Mix:
    parts = ((key, weight, Lengths.parse(spec), who) for key, (weight, spec, who) in classes.items())
    return Mix(name, tuple(TrafficClass(*part) for part in parts))


_SHORT = {"lognormal": {"median": 10, "sigma": 0.6, "max": 60}}
_PODCAST = {"lognormal": {"median": 2400, "sigma": 0.5, "max": 5400}}

MIXES = {
    mix.name: mix
    for mix in (
        _mix("shorts", short=(1.0, _SHORT, (1, 2))),
        _mix("podcast", long=(1.0, _PODCAST, (2, 4))),
        _mix("mixed", short=(0.95, _SHORT, (1, 2)), long=(0.05, _PODCAST, (2, 4))),
        _mix("ninety", long=(1.0, {"fixed": 5400}, (2, 4))),
        _mix(
            "quick",
            short=(0.7, {"uniform": [3, 12]}, (1, 2)),
            long=(0.3, {"lognormal": {"median": 40, "sigma": 0.5, "max": 160}}, (2, 4)),
        ),
    )
}
"""Named mixes; ``mixed`` is 95% short requests by count and over 90% long ones by work."""
