"""From what a caller sent to what is spoken: script, voices and length, with every mistake at its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness import wire
from harness.errors import InputError, ScriptError
from harness.service.models import TaskOptions
from harness.service.settings import StudioSettings
from harness.service.task import TaskSpec
from harness.traffic.script import format_script, parse_script, read_script, speakers_of, speech_s

_LINE = re.compile(r"line (\d+): (.*)", re.DOTALL)


class RequestRejected(InputError):
    """A request that cannot be spoken; ``line`` of the script, or ``field`` of the request."""

    def __init__(self, message: str, line: int | None = None, field: str | None = None):
        super().__init__(message)
        self.line, self.field = line, field


@dataclass(frozen=True)
class Intake:
    """A request that can be spoken, and remarks on its script."""

    spec: TaskSpec
    remarks: tuple[str, ...]


def read_request(
    text: str, voices: Sequence[int | str] | None, options: TaskOptions, known: Mapping[int, str],
    settings: StudioSettings,
) -> Intake:  # fmt: skip
    """Check a request; ``known``: the caller's voices, id to name. Takes some 20 ms for an hour's script: in a thread.

    Raises RequestRejected.
    """
    script, numbers = _read(text, settings.script_bytes)
    estimate = max(1, round(speech_s(script.turns) * wire.FRAMES_PER_SECOND))
    if estimate > wire.MAX_FRAMES:
        minutes = estimate * wire.SECONDS_PER_FRAME / 60
        raise RequestRejected(f"the script takes about {minutes:.0f} minutes: at most 90 can be spoken, so cut it", 1)
    spec = TaskSpec(
        script=format_script(script.turns),
        voices=_voices(voices, numbers, known),
        frames=wire.MAX_FRAMES if settings.until_end else estimate,
        estimate=estimate,
        until_end=settings.until_end,
        seed=options.seed,
        diffusion_steps=options.diffusion_steps,
        guidance=options.guidance,
    )
    return Intake(spec, script.remarks)


def _read(text: str, most_bytes: int):
    """The script and the numbers of its speakers as written."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise RequestRejected("the script holds half a character (a lone surrogate): send UTF-8", line) from None
    if size > most_bytes:
        raise RequestRejected(f"the script has {size} bytes, but at most {most_bytes} are taken: cut it into parts", 1)
    try:
        return read_script(text), speakers_of(parse_script(text))
    except ScriptError as error:
        found = _LINE.fullmatch(str(error))
        raise RequestRejected(found[2] if found else str(error), int(found[1]) if found else 1) from None


def _voices(given: Sequence[int | str] | None, numbers: Sequence[int], known: Mapping[int, str]) -> tuple[int, ...]:
    """A voice for each speaker. Without any, speaker N gets voice N, around again where there are fewer."""
    ids = sorted(known)
    if not given:
        return tuple(ids[(number - 1) % len(ids)] if ids else wire.NO_VOICE for number in numbers)
    if len(given) < len(numbers):
        raise RequestRejected(
            f"{len(given)} voices are given for {len(numbers)} speakers: give one for each", field="voices"
        )
    return tuple(_voice(each, known) for each in given[: len(numbers)])


def _voice(given: int | str, known: Mapping[int, str]) -> int:
    names = {name: number for number, name in known.items()}
    if isinstance(given, str):
        given = names.get(given, int(given) if given.isascii() and given.isdigit() and len(given) < 8 else -1)
    if given != wire.NO_VOICE and given not in known:
        listed = ", ".join(f"{number} ({name})" for number, name in sorted(known.items()))
        raise RequestRejected(f"there is no such voice: use one of {listed}, or 0 for none", field="voices")
    return given
