"""Reads the script of a conversation: ``Speaker N: text`` lines (or ``[SPEAKER_A] text``) into turns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from harness import wire
from harness.errors import ScriptError

_NUMBERED = re.compile(r"\s*Speaker\s+([-+]?\d+)\s*[:：]\s*(.*)", re.IGNORECASE | re.DOTALL)
_LETTERED = re.compile(r"\s*\[SPEAKER_(\w*)\]\s*[:：]?\s*(.*)", re.IGNORECASE | re.DOTALL)
_LINE_END = re.compile(r"\r\n|\r|\n")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says before the next one speaks. ``speaker`` counts from 1."""

    speaker: int
    text: str


def validate_utf8(data: bytes) -> str:
    """The text of ``data``; raises ScriptError naming the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise ScriptError(
            f"the script is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} "
            f"({error.reason}); save it as UTF-8"
        ) from None


def parse_script(text: str) -> list[Turn]:
    """The turns of a script, in order.

    A line without a marker continues the turn before it; a text without any marker is spoken by speaker 1.
    Raises ScriptError for an empty script, a speaker outside 1 to 4, a speaker without text and for text that
    stands before the first marker; the message holds the line number.
    """
    turns: list[tuple[int, int, list[str]]] = []  # line number, speaker, pieces of text
    unmarked: list[tuple[int, str]] = []
    for number, line in enumerate(_LINE_END.split(text.removeprefix(_BYTE_ORDER_MARK)), start=1):
        marker = _marker(line, number)
        if marker:
            turns.append((number, marker[0], [marker[1]]))
        elif turns:
            turns[-1][2].append(line)
        elif _has_text(line):
            unmarked.append((number, line))
    if not turns:
        return [_turn(*_as_speaker_one(unmarked))]
    if unmarked:
        raise ScriptError(
            f"line {unmarked[0][0]}: text before the first speaker; begin the line with 'Speaker 1:' or delete it"
        )
    return [_turn(*turn) for turn in turns]


def format_script(turns: Iterable[Turn]) -> str:
    """The turns as ``Speaker N: text`` lines: ``parse_script`` gives them back."""
    return "\n".join(f"Speaker {turn.speaker}: {turn.text}" for turn in turns)


def count_words(turns: Iterable[Turn]) -> int:
    """Words spoken, markers not counted."""
    return sum(len(turn.text.split()) for turn in turns)


def count_speakers(turns: Iterable[Turn]) -> int:
    """The highest speaker number: how many voices a request names, even where one of them never speaks."""
    return max(turn.speaker for turn in turns)


def _marker(line: str, number: int) -> tuple[int, str] | None:
    if found := _NUMBERED.fullmatch(line):
        return _checked_speaker(found[1], number), found[2]
    if found := _LETTERED.fullmatch(line):
        letter = found[1].upper()
        if len(letter) != 1 or letter not in _LETTERS:
            raise ScriptError(f"line {number}: no speaker is [SPEAKER_{found[1]}]; use {_allowed_letters()}")
        return _checked_speaker(str(_LETTERS.index(letter) + 1), number), found[2]
    return None


def _checked_speaker(digits: str, number: int) -> int:
    # int() refuses thousands of digits with its own ValueError, so the length is looked at first.
    speaker = int(digits) if len(digits) < 10 else 0
    if not 1 <= speaker <= wire.MAX_SPEAKERS:
        raise ScriptError(
            f"line {number}: speaker {digits[:12]} is outside 1 to {wire.MAX_SPEAKERS}; "
            f"use 'Speaker 1:' to 'Speaker {wire.MAX_SPEAKERS}:' or {_allowed_letters()}"
        )
    return speaker


def _allowed_letters() -> str:
    return f"[SPEAKER_A] to [SPEAKER_{_LETTERS[wire.MAX_SPEAKERS - 1]}]"


def _as_speaker_one(lines: list[tuple[int, str]]) -> tuple[int, int, list[str]]:
    if not lines:
        raise ScriptError("the script is empty; write at least one line such as 'Speaker 1: Hello.'")
    return lines[0][0], 1, [line for _, line in lines]


def _turn(number: int, speaker: int, pieces: list[str]) -> Turn:
    text = " ".join(piece.strip() for piece in pieces if _has_text(piece))
    if not text:
        raise ScriptError(f"line {number}: speaker {speaker} has no text; write some or delete the marker")
    return Turn(speaker, text)


def _has_text(line: str) -> bool:
    return any(letter.isprintable() and not letter.isspace() for letter in line)
