"""A first plan, from five answers: model, hardware, traffic, SLOs, target rates."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.errors import HarnessError, InputError
from harness.planfile.reading import load_plan
from harness.wire import FRAMES_PER_SECOND, MAX_FRAMES

PRESETS = ("tiny", "1.5b", "7b")
MIXES = ("short", "mixed", "long")
MAX_GPUS = 64
LONGEST_S = MAX_FRAMES / FRAMES_PER_SECOND
_SHORT, _LONG = (
    "{weight: %s, length: {fixed: %s}, speakers: [1, 2]}",
    "{weight: %s, length: {fixed: 5400}, speakers: [2, 4]}",
)


@dataclass(frozen=True)
class Answers:
    """What the plan is written from. ``gpus`` 0 is the CPU; ``mix`` is one of MIXES, or seconds of audio per request.

    ``ttfa_s`` and ``rtf`` are limits of 95th percentiles; ``price``: per hour of a GPU or host, None = unknown.
    """

    preset: str = "tiny"
    gpus: int = 0
    mix: str | float = "short"
    ttfa_s: float = 1.0
    rtf: float = 0.9
    targets_qps: tuple[float, ...] = (0.5, 1.0, 5.0)
    price: float | None = None


def preset_of(text: str) -> str:
    """The preset in an answer. Like all functions here, raises InputError for an answer that no plan can hold."""
    if text.strip().lower() not in PRESETS:
        raise InputError(f"preset {text!r}: answer one of {', '.join(PRESETS)}")
    return text.strip().lower()


def gpus_of(text: str) -> int:
    word = text.strip().lower()
    if word in ("cpu", "0"):
        return 0
    number = "1" if word == "gpu" else word.removesuffix("gpus").removesuffix("gpu").strip()
    if not number.isdigit() or not 1 <= int(number) <= MAX_GPUS:
        raise InputError(f"{text!r} is not usable: answer cpu, or the number of GPUs, 1 to {MAX_GPUS}")
    return int(number)


def mix_of(text: str) -> str | float:
    word = text.strip().lower()
    if word in MIXES:
        return word
    seconds = _number(word.removesuffix("s"))
    if not 0 < seconds <= LONGEST_S:
        known = ", ".join(MIXES)
        raise InputError(f"mix {text!r}: answer {known}, or seconds of audio per request, up to {LONGEST_S:g}")
    return seconds


def slos_of(text: str) -> tuple[float, float]:
    """Limits of the 95th percentiles of time to first audio, in seconds, and of the real-time factor."""
    limits = [_number(part) for part in text.split(",")]
    if len(limits) != 2 or not all(0 < limit < math.inf for limit in limits):
        raise InputError(
            f"SLOs {text!r}: answer two limits above 0, seconds to first audio and real-time factor: 1.0, 0.9"
        )
    return limits[0], limits[1]


def rates_of(text: str) -> tuple[tuple[float, ...], float | None]:
    """Target rates (requests/s), and a price after ``at``: ``0.5, 1, 5 at 2.50``."""
    rates_text, at, price_text = text.partition(" at ")
    rates = tuple(_number(part) for part in rates_text.split(","))
    if not all(0 < rate <= 1e6 for rate in rates):
        raise InputError(f"rates {rates_text!r}: answer requests per second with commas between, such as 0.5, 1, 5")
    return rates, price_of(price_text) if at else None


def price_of(text: str) -> float:
    price = _number(text)
    if not 0 < price < math.inf:
        raise InputError(f"price {text!r}: answer the price of an hour of one GPU or host, such as 2.50")
    return price


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def plan_text(answers: Answers, name: str) -> str:
    """The plan as YAML, with a comment on each part."""
    classes = _classes(answers.mix)
    slos = f"{{ttfa_p95_s: {answers.ttfa_s:g}, rtf_p95: {answers.rtf:g}}}"
    return "\n".join(
        [
            "# A first plan, written by `harness init`: change what you like. Unknown keys are errors with a hint.",
            f"name: {json.dumps(name)}",
            f'preset: "{answers.preset}"',
            *_place(answers.gpus),
            "",
            "mix:                              # lengths in seconds of audio; speakers: from, to",
            "  classes:",
            *(f"    {each}: {about}" for each, about in classes.items()),
            "",
            "slos:                             # SLOs by class: 95th percentiles",
            *(f"  {each}: {slos}" for each in classes),
            "",
            f"targets_qps: [{', '.join(_plain(rate) for rate in answers.targets_qps)}]",
            *_price(answers),
            "",
            "space:                            # knob -> values; every combination is measured",
            *_space(answers.gpus),
            "",
            *_load(answers.gpus),
            "utilisation_cap: 0.85",
            "max_error: 0.3                    # of a prediction, relative to the run that confirms it",
            "",
        ]
    )


def _place(gpus: int) -> list[str]:
    if not gpus:
        return ["device: cpu"]
    return [
        "device: gpu",
        f"gpus: {gpus}                           # of one server, which is one device of the answer",
    ]


def _space(gpus: int) -> list[str]:
    if not gpus:
        return ["  delay_us: [0, 5000]             # batching delay of the three stages"]
    return [
        "  topology: [fused]               # all stages in one process; staged: a Triton model for each",
        "  engine.max_batch: [64, 128]     # sessions in one step",
    ]


def _classes(mix: str | float) -> dict[str, str]:
    if mix == "short":
        return {"short": _SHORT % (1, 10)}
    if mix == "long":
        return {"long": _LONG % 1}
    if mix == "mixed":
        return {"short": _SHORT % (0.95, 10), "long": _LONG % 0.05}
    return {"own": _SHORT % (1, _plain(float(mix)))}


def _price(answers: Answers) -> list[str]:
    kind = "NVIDIA" if answers.gpus else "cpu"
    if answers.price is None:
        return [f"# prices: {{{kind}: 2.50}}          # of an hour of a GPU or host, by a word of its name"]
    return [
        f"prices: {{{kind}: {_plain(answers.price)}}}             # of an hour of a GPU or host, by a word of its name"
    ]


def _plain(value: float) -> str:
    """A number without an exponent: YAML reads 1e+06 as a word."""
    return np.format_float_positional(value, trim="-")


def _load(gpus: int) -> list[str]:
    sessions, seconds, minutes = ("1, 8, 32, 64, 128", 10, 15) if gpus else ("1, 4, 8, 16, 32", 8, 9)
    return [
        f"ladder: {{sessions: [{sessions}], seconds: {seconds}, precision: 0.05}}   # closed loop",
        "confirm: {load_share: [0.5, 0.7, 0.85], seconds: 40}   # open loop, of the predicted highest rate",
        f"budget_minutes: {minutes}",
    ]


def name_of(path: Path) -> str:
    """A plan's name, from its file's name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:64]
    return name or "plan"


def write_plan(path: Path, answers: Answers, *, force: bool = False) -> Path:
    """Write the plan after checking it. Raises InputError, also for an existing file without ``force``."""
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path}: a plan's file must end in .yaml")
    if path.exists() and not force:
        raise InputError(f"{path} already exists: give another name, or --force to replace it")
    draft = path.with_name(f".{path.stem}.{os.getpid()}.yaml")
    try:
        draft.write_text(plan_text(answers, name_of(path)), encoding="utf-8")
        load_plan(draft)
        draft.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another place") from None
    finally:
        draft.unlink(missing_ok=True)
    return path


def answer(given: str | None, ask: Callable[[str, str], str] | None, question: str, default: str, read: Callable):
    """The parsed answer: the one given, or one asked for until ``read`` accepts it, or the default."""
    if given is not None:
        return read(given)
    if ask is None:
        return read(default)
    while True:
        said = ask(question, default)  # raises where nobody can answer, which ends the loop
        try:
            return read(said)
        except HarnessError as error:
            question = f"{error}\n{question.rpartition(chr(10))[2]}"
