"""Reads the script of a conversation into turns: ``Speaker N: text`` lines, and the markers of other programs.

A marker is ``Speaker 1:``, ``Speaker1:``, ``SPEAKER_01:``, ``Speaker A:``, ``[SPEAKER_A]`` or ``[Speaker 1]``, in any
case, also in bold or italics, in a list, after or before a time such as ``[00:01:23]``, or alone on its line. If one
speaker is number 0, all numbers count from 0. Any other text is spoken; a remark names text that resembles a marker.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from harness import wire
from harness.errors import ScriptError

TICKS_PER_S = 90  # of speech: every length below is a whole number of ticks, so that sums are exact
_WORD = 30  # 180 words a minute
_SYLLABLE = 20  # of scripts with one character per syllable: Chinese, kana, Hangul; 4.5 per second
_LETTER = 9  # of a run of caseless letters longer than any word, such as Thai: 10 per second
_LONGEST_WORD = 12  # caseless letters; longer runs are several words without spaces

_HEAD = 160  # a marker must be within so many characters
_TIME = r"[0-9]{1,2}(?::[0-9]{2}){1,2}(?:[.,][0-9]{1,6})?"
_SPAN = rf"{_TIME}(?:\s{{0,4}}(?:-->|-|–)\s{{0,4}}{_TIME})?"
_STAMP = rf"(?:\[\s?{_SPAN}\s?\]|\(\s?{_SPAN}\s?\)|{_SPAN})"
_BEFORE = (
    rf"\s{{0,40}}(?:(?:[-*+•>#]{{1,6}}|[0-9]{{1,4}}[.)])\s{{1,8}}){{0,3}}(?:{_STAMP}\s{{0,4}}[-–|]?\s{{0,4}})?"
    r"(?P<mark>\*{0,3}|_{0,3})(?P<open>[\[(<]?)\s?"
)
_MARKER = re.compile(
    rf"{_BEFORE}speaker(?:(?:[_-]|\s{{0,8}}#?)(?P<number>[-+]?\d+)|(?:\s{{1,8}}|_|-)(?P<letter>[a-z])(?![^\W_]))\s?"
    rf"(?P<close>[\])>]?)(?P<after>\*+|_+|)(?:\s{{0,8}}{_STAMP})?\s{{0,8}}(?P<colon>[:：]?)",
    re.IGNORECASE,
)
_HUGE = re.compile(r"\s{0,40}speaker\s{0,8}(?P<number>[0-9]{10})", re.IGNORECASE)
_BRACKETED = re.compile(r"\s{0,40}\[\s?(?P<name>speaker[_ -]?\w*)\s?\]", re.IGNORECASE)
_LABEL = re.compile(
    rf"{_BEFORE}(?P<label>[^\W\d_][^\s:：\[\]()<>*]*(?: [^\s:：\[\]()<>*]+){{0,2}})\s?[\])>]?(?:\*+|_+|)"
    rf"(?:\s{{0,8}}{_STAMP})?\s?[:：]"
)
_LONGEST_LABEL = 30
_PAIRS = {"": "", "[": "]", "(": ")", "<": ">"}
_LINE_END = re.compile(r"\r\n|\r|\n")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BYTE_ORDER_MARK = "\ufeff"
_NAMED = 3  # lines named in a remark


@dataclass(frozen=True, slots=True)
class Turn:
    """The words of one speaker before the next one speaks. ``speaker`` counts from 1."""

    speaker: int
    text: str


@dataclass(frozen=True, slots=True)
class Script:
    """A script that a user wrote. ``remarks``: probable mistakes, one sentence each."""

    turns: tuple[Turn, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Marked:
    """A line that begins a turn: the speaker as written, and the text after the marker."""

    line: int
    written: str
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

    A line without a marker continues the previous turn; a text without any marker is spoken by speaker 1.
    Raises ScriptError for an empty script, a speaker outside 1 to 4, a speaker without text and for text
    before the first marker; the message contains the line number.
    """
    turns: list[tuple[_Marked, list[str]]] = []
    unmarked: list[tuple[int, str]] = []
    for number, line in enumerate(_lines(text), start=1):
        if marked := _marker(line, number):
            turns.append((marked, [marked.text]))
        elif turns:
            turns[-1][1].append(line)
        elif _has_text(line):
            unmarked.append((number, line))
    if not turns:
        return [_turn(*_as_speaker_one(unmarked))]
    if unmarked:
        hint = " (this is not a marker)" if _label(unmarked[0][1]) else ""
        raise ScriptError(
            f"line {unmarked[0][0]}: text before the first speaker{hint}; begin the line with 'Speaker 1:' or delete it"
        )
    first = 0 if any(_number(marked.written) == 0 for marked, _ in turns) else 1
    return [_turn(marked.line, _checked_speaker(marked, first), pieces) for marked, pieces in turns]


def read_script(text: str) -> Script:
    """Read a user's script: its turns with speakers numbered without gaps, and remarks. Raises ScriptError."""
    return Script(tuple(without_gaps(parse_script(text))), tuple(_remarks(text)))


def format_script(turns: Iterable[Turn]) -> str:
    """The turns as ``Speaker N: text`` lines, which ``parse_script`` reads back."""
    return "\n".join(f"Speaker {turn.speaker}: {turn.text}" for turn in turns)


def without_gaps(turns: Iterable[Turn]) -> list[Turn]:
    """The same turns with speakers renumbered 1, 2, … in the order of their numbers."""
    turns = list(turns)
    numbers = {speaker: number for number, speaker in enumerate(speakers_of(turns), start=1)}
    return [Turn(numbers[turn.speaker], turn.text) for turn in turns]


def speakers_of(turns: Iterable[Turn]) -> list[int]:
    """The numbers of the speakers, in order."""
    return sorted({turn.speaker for turn in turns})


def count_speakers(turns: Iterable[Turn]) -> int:
    """Number of speakers, whatever their numbers."""
    return len(speakers_of(turns))


def speech_s(turns: Iterable[Turn]) -> float:
    """Estimated duration of the turns in seconds of audio; see ``speech_ticks``."""
    return sum(speech_ticks(turn.text) for turn in turns) / TICKS_PER_S


@lru_cache(maxsize=1 << 14)
def speech_ticks(text: str) -> int:
    """Estimated duration of a text in ticks: a third of a second per word (180 words per minute).

    Where words have no spaces between them, by characters: 4.5 per second if as wide as an ideograph, 10 per second for
    other caseless letters in runs that are longer than a word.
    """
    if text.isascii():
        return _WORD * len(text.split())
    return sum(ticks for _, ticks in _pieces(text))


def cut_to_ticks(text: str, ticks: int) -> str:
    """The start of a text that takes ``ticks`` to speak, or all of it; it ends with a word or a character."""
    for end, piece in _pieces(text):
        ticks -= piece
        if ticks <= 0:
            return " ".join(text[:end].split())
    return text


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """(end index, ticks) of each word, or of each character where words have no spaces between them."""
    for found in re.finditer(r"\S+", text):
        word = found.group()
        kinds = "" if word.isascii() else "".join(map(_kind, word))
        if "w" in kinds or _has_long_run(kinds):
            for part in re.finditer(r"w|c|[ao]+", kinds):
                yield found.start() + part.end(), {"w": _SYLLABLE, "c": _LETTER}.get(part.group(), _WORD)
        else:
            yield found.end(), _WORD


def _kind(character: str) -> str:
    """w: a wide letter, such as an ideograph; c: a caseless one; a: another letter or digit; m: a mark; p: other."""
    category = unicodedata.category(character)
    if category in ("Lo", "Lm"):
        return "w" if unicodedata.east_asian_width(character) in "WFH" else "c"
    return {"L": "a", "N": "a", "M": "m"}.get(category[0], "p")


def _has_long_run(kinds: str) -> bool:
    return any(run.count("c") > _LONGEST_WORD for run in re.split("[^cm]", kinds)) if kinds else False


def _lines(text: str) -> list[str]:
    return _LINE_END.split(text.removeprefix(_BYTE_ORDER_MARK))


def _marker(line: str, number: int) -> _Marked | None:
    head = line[:_HEAD]
    if found := _HUGE.match(head):
        return _Marked(number, found["number"], "")
    if found := _MARKER.match(head):
        text = _text_after(found, line)
        if text is not None:
            return _Marked(number, found["number"] or found["letter"].upper(), text)
    if found := _BRACKETED.match(head):
        raise ScriptError(
            f"line {number}: there is no speaker [{found['name']}]; use {_allowed_letters()} or 'Speaker 1:'"
        )
    return None


def _text_after(found: re.Match, line: str) -> str | None:
    """The spoken text after a marker; None if it is not a marker after all."""
    mark, after, text = found["mark"], found["after"], line[found.end() :].strip()
    if found["close"] != _PAIRS[found["open"]]:
        return None
    if after != mark:  # closing bold or italics after the colon or at the line's end, or none
        if after or not mark:
            return None
        if text.startswith(mark):
            text = text[len(mark) :].strip()
        elif text.endswith(mark):
            text = text[: -len(mark)].strip()
        else:
            return None
    return text if found["colon"] or found["open"] or not text else None


def _number(written: str) -> int:
    """The number of a speaker; -1 if the text is not one.

    int() raises its own ValueError for thousands of digits, and for letters that only case folding makes Latin (the
    Kelvin sign): both are checked first.
    """
    if written in _LETTERS:
        return _LETTERS.index(written) + 1
    return int(written) if written.isdecimal() and len(written) < 10 else -1


def _checked_speaker(marked: _Marked, first: int) -> int:
    """The speaker, from 1; numbers in the script count from ``first``, letters from A."""
    is_letter = marked.written in _LETTERS
    speaker = _number(marked.written) + (0 if is_letter else 1 - first)
    if not 1 <= speaker <= wire.MAX_SPEAKERS:
        written = speaker if is_letter else marked.written[:12]
        last = first + wire.MAX_SPEAKERS - 1
        raise ScriptError(
            f"line {marked.line}: speaker {written} is outside {first} to {last}; "
            f"use 'Speaker {first}:' to 'Speaker {last}:' or {_allowed_letters()}"
        )
    return speaker


def _remarks(text: str) -> Iterator[str]:
    lines = list(enumerate(_lines(text), start=1))
    others = [(number, line) for number, line in lines if not _marker(line, number)]
    alike = list(_look_alikes(others))
    if len(others) == len(lines):
        yield "no line begins with a marker such as 'Speaker 1:': all of it is spoken by one speaker"
    for number, label in alike[:_NAMED]:
        yield f"line {number}: {label!r} looks like a speaker, but is not a marker such as 'Speaker 1:': it is spoken"
    if len(alike) > _NAMED:
        yield f"{len(alike) - _NAMED} more lines look like that"


def _look_alikes(lines: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """(line, start) of lines that start as if they named a speaker."""
    labels = [(number, _label(line)) for number, line in lines]
    often = Counter(label for _, label in labels)
    for number, label in labels:
        if label and (often[label] > 1 or _names_somebody(label)):
            yield number, label


def _label(line: str) -> str:
    """The text before the colon of a line, or an incomplete marker; "" for neither."""
    head = line[:_HEAD]
    if (found := _LABEL.match(head)) and len(found["label"]) <= _LONGEST_LABEL:
        return found["label"]
    return found.group().strip() if (found := _MARKER.match(head)) else ""


def _names_somebody(label: str) -> bool:
    words = label.split()
    return "speaker" in label.casefold() or label[-1].isdigit() or all(word[0].isupper() for word in words)


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
