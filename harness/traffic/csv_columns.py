"""Reads one column of a CSV file from any program: its dialect and header, its numbers and times, line by line.

Ambiguous text is never guessed: it is an error that names the line and how to write it.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.errors import InputError

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_NONE = "\x1f"  # delimiter of a file with one column: a character that no text contains
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEPARATOR = re.compile(r"sep=(.)(?:\r\n|\r|\n)")  # first line of files by some spreadsheets
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+(?:[eE][+-]?[0-9]{1,3})?")
_PERHAPS_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_MOMENT = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})(?:[T ]([0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?:[.,]([0-9]+))?)?"
    r" ?(Z|z|UTC|[+-][0-9]{2}(?::?[0-9]{2})?)?"
)
_EPOCH_UNITS = {"seconds": 1, "milliseconds": 1_000, "microseconds": 1_000_000, "nanoseconds": 1_000_000_000}
_EPOCH_S = 883_612_800, 4_102_444_800  # 1998 to 2100
_LONGEST_S = 10_000_000  # since a start; larger values are an epoch: 115 days
_OTHER_UNITS = re.compile(
    r"(?:\b|_)((?:milli|micro|nano)s\w*|(?:milli|micro|nano)_?sec\w*|msecs?|ms|us|µs|ns|mins?|minutes?|hours?|hrs?|h"
    r"|frames?|samples?|words?|tokens?)(?:\b|_)"
)
_SHOWN = 300
_FIELD_LIMIT = threading.Lock()  # csv has one limit for the whole process


@dataclass(frozen=True)
class Column:
    """The cells of one column as text without surrounding spaces, each with its line in the file, from 1."""

    path: Path
    name: str  # as in the header, "" without one
    cells: tuple[tuple[int, str], ...]

    def numbers(self, what: str) -> list[int | float]:
        """Its numbers. A comma counts as decimal only where unambiguous. Raises InputError with the line."""
        commas = [(line, text) for line, text in self.cells if _DECIMAL_COMMA.fullmatch(text)]
        if commas:
            self._check_commas(commas)
        return [self._number(line, text, what) for line, text in self.cells]

    def times(self) -> tuple[np.ndarray, str]:
        """Seconds since the earliest of its times, float64 [n] in the order of the file, and their format.

        Dates with times (ISO 8601, fractions after a point or a comma), seconds since any start, or an epoch in
        seconds, milliseconds, microseconds or nanoseconds, recognised by its size. Raises InputError with the line.
        """
        dated = [_MOMENT.fullmatch(text) is not None for _, text in self.cells]
        if not any(dated):
            return self._elapsed()
        if not all(dated):
            line, text = self.cells[dated.index(not dated[0])]
            raise self._error(
                line,
                f"{_short(text)} is in another time format than the lines before it: give all as dates and times "
                "(2024-01-31 18:15:46.680), or all as numbers of seconds",
            )
        return self._since_first_moment(), "dates"

    def _check_commas(self, commas: list[tuple[int, str]]) -> None:
        for line, text in self.cells:
            if "." in text:
                raise self._error(line, f"{_short(text)} has a point where line {commas[0][0]} has a comma: use points")
        if all(_PERHAPS_THOUSANDS.fullmatch(text) for _, text in commas):
            line, text = commas[0]
            ways = f"{text.replace(',', '')} or {text.replace(',', '.')}"
            raise self._error(line, f"{_short(text)} may be {ways}: write it without a comma")

    def _number(self, line: int, text: str, what: str) -> int | float:
        plain = text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text
        if not _NUMBER.fullmatch(plain):
            found = f"{_short(text)} is" if text else "an empty field is"
            raise self._error(line, f"{found} no {what}{self._in_column()}")
        value = int(plain) if len(plain) < 25 and plain.lstrip("+-").isdigit() else float(plain)
        if abs(value) == float("inf"):
            raise self._error(line, f"{_short(text)} is too large")
        return value

    def _elapsed(self) -> tuple[np.ndarray, str]:
        values = self.numbers("time (write seconds, or dates such as 2024-01-31 18:15:46.680)")
        most = max(abs(value) for value in values)
        unit = next((unit for unit in _EPOCH_UNITS if _all_epochs(values, unit)), None)
        if unit is None and most > _LONGEST_S:
            raise InputError(
                f"{self.path}: times up to {most:g} are neither seconds since a start (at most {_LONGEST_S:,}) nor an "
                "epoch of 1998 to 2100 in one unit: which unit are they in? Convert them to seconds"
            )
        first = min(values)
        seconds = np.array([float(value - first) for value in values]) / _EPOCH_UNITS[unit or "seconds"]
        return seconds, f"epoch {unit}" if unit else "seconds"

    def _since_first_moment(self) -> np.ndarray:
        moments = [self._moment(line, text) for line, text in self.cells]
        named = [moment.tzinfo is not None for moment, _ in moments]
        if any(named) and not all(named):
            line, text = self.cells[named.index(not named[0])]
            raise self._error(line, f"{_short(text)}: some times name an offset from UTC and some do not")
        first = min(moment for moment, _ in moments)
        # Times without an offset are subtracted as written: summer time in this host's zone makes no gap.
        seconds = np.array([(moment - first).total_seconds() + fraction for moment, fraction in moments])
        return seconds - seconds.min()

    def _moment(self, line: int, text: str) -> tuple[datetime, float]:
        """The time in whole seconds, and the fraction of a second, of any number of digits."""
        found = _MOMENT.fullmatch(text)
        if found is None:
            raise self._error(line, f"{_short(text)} is not a date and time")
        day, clock, fraction, offset = found.groups()
        try:
            moment = datetime.fromisoformat(f"{day}T{clock or '00:00'}")
            if offset:
                zone = UTC if offset.upper() in ("Z", "UTC") else datetime.fromisoformat(f"{day}T00:00{offset}").tzinfo
                moment = moment.replace(tzinfo=zone)
        except ValueError as error:
            raise self._error(line, f"{_short(text)} is not a date and time ({error})") from None
        return moment, float(f"0.{fraction or 0}")

    def _in_column(self) -> str:
        return f" in column {self.name}" if self.name else ""

    def _error(self, line: int, problem: str) -> InputError:
        return InputError(f"{self.path}: line {line}: {problem}")


def read_column(path: Path, name: str, content: bytes | None = None) -> Column:
    """The column ``name`` (ignoring case and spaces), or the only one, of a CSV file.

    ``content``: the file's, if it has been read already. Raises InputError, with the line, for a file that cannot
    be read or has several columns and none of this name, and for a row with another number of fields than the first.
    """
    text = _decoded(path, read_bytes(path) if content is None else content)
    declared = _SEPARATOR.match(text)
    if declared:
        text = "\n" + text[declared.end() :]  # keeps line numbers
    delimiter = declared[1] if declared else _delimiter(text, name)
    rows = _rows(path, text, delimiter)
    if not rows:
        raise InputError(f"{path}: the file is empty; give a CSV file with a column {name}")
    index, has_header = _column_of(path, rows[0], name)
    _check_sizes(path, rows, delimiter)
    _check_swallowed(path, rows, text, delimiter, index)
    cells = tuple((row.line, row.fields[index].strip()) for row in rows[has_header:])
    if not cells:
        raise InputError(f"{path}: holds a header and no rows; give a CSV file with a column {name}")
    return Column(path, rows[0].fields[index].strip() if has_header else "", cells)


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises InputError."""
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise InputError(f"{path}: cannot be read: it is a folder; give a file") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({why}); give the path of a file") from None


class _Row(NamedTuple):
    line: int  # first line, from 1
    last: int
    fields: list[str]


def _decoded(path: Path, content: bytes) -> str:
    encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: is not UTF-8 ({error.reason}); save it as CSV in UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(f"{path}: line {line}: holds a zero byte; save it as CSV in UTF-8")
    return text


def _rows(path: Path, text: str, delimiter: str) -> list[_Row]:
    rows, last = [], 0
    with _fields_of_any_size():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                line, last = last + 1, reader.line_num
                if fields and (len(fields) > 1 or not fields[0] or fields[0].strip()):
                    rows.append(_Row(line, last, fields))
        except csv.Error as error:
            raise InputError(
                f"{path}: line {last + 1}: a quote that begins here is not closed as it should be ({error}): close it, "
                "or write a quote inside a field twice"
            ) from None
    while rows and len(rows[-1].fields) > 1 and not any(field.strip() for field in rows[-1].fields):
        rows.pop()  # spreadsheets write rows of delimiters at the end
    return rows


@contextmanager
def _fields_of_any_size() -> Iterator[None]:
    with _FIELD_LIMIT:
        before = csv.field_size_limit(sys.maxsize)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _delimiter(text: str, name: str) -> str:
    """The delimiter with which the first row has a column of this name, otherwise that with the most fields."""
    fields = {delimiter: _first_row(text, delimiter) for delimiter in _DELIMITERS}
    knowing = [delimiter for delimiter, row in fields.items() if _index(row, name) is not None]
    best = max(knowing or fields, key=lambda delimiter: len(fields[delimiter]))
    return best if len(fields[best]) > 1 else _NONE


def _first_row(text: str, delimiter: str) -> list[str]:
    with _fields_of_any_size():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            return next((row for row in reader if row and any(field.strip() for field in row)), [])
        except csv.Error:
            return []


def _index(row: Sequence[str], name: str) -> int | None:
    names = [_normal(each) for each in row]
    return names.index(_normal(name)) if _normal(name) in names else None


def _normal(name: str) -> str:
    return "".join(name.split()).casefold()


def _column_of(path: Path, first: _Row, name: str) -> tuple[int, bool]:
    """The index of the column, and whether the first row is a header."""
    names = [_normal(each) for each in first.fields]
    if (found := names.count(_normal(name))) > 1:
        raise InputError(f"{path}: line {first.line}: {found} columns are named {name}: rename all but one")
    if found:
        return names.index(_normal(name)), True
    if len(names) > 1:
        shown = ", ".join(each.strip() for each in first.fields)
        begin = "the first row is" if any(map(_is_name, first.fields)) else "there is no header; the first row is"
        raise InputError(
            f"{path}: line {first.line}: none of {len(names)} columns is named {name}; {begin} {_short(shown)}. Name "
            f"the column to read {name}, and write numbers with decimal points"
        )
    if _is_name(first.fields[0]) and (unit := _OTHER_UNITS.search(first.fields[0].strip().lower())):
        raise InputError(
            f"{path}: line {first.line}: the column {_short(first.fields[0].strip())} seems to hold {unit[1]}: convert "
            f"it to seconds and name it {name}"
        )
    return 0, _is_name(first.fields[0])


def _is_name(field: str) -> bool:
    """Whether a field of the first row is a column's name: it starts with a letter, and is not ``nan``."""
    field = field.strip()
    try:
        float(field)
    except ValueError:
        return field[:1].isalpha() or field[:1] == "_"
    return False


def _check_sizes(path: Path, rows: Sequence[_Row], delimiter: str) -> None:
    size = len(rows[0].fields)
    for row in rows:
        if len(row.fields) != size:
            shown = _short((_DELIMITERS.get(delimiter) and delimiter or "").join(row.fields))
            raise InputError(
                f"{path}: line {row.line}: {len(row.fields)} fields, where the first row has {size}, separated by "
                f"{_DELIMITERS.get(delimiter, repr(delimiter))}: {shown}. Write numbers with a decimal point, and put "
                "quotes around a field that holds the separator"
            )


def _check_swallowed(path: Path, rows: Sequence[_Row], text: str, delimiter: str, index: int) -> None:
    """Refuse a quoted field that spans whole rows: a quote opened by mistake would lose them silently."""
    long = [row for row in rows if row.last > row.line]
    lines = list(io.StringIO(text, newline="")) if long else []
    for row in long:
        for line in lines[row.line : row.last]:
            inside = _first_row(line, delimiter) or line.split(delimiter)
            if len(inside) == len(row.fields) and _is_value(inside[index].strip()):
                raise InputError(
                    f"{path}: line {row.line}: a quote that begins here goes on to line {row.last}, over what looks "
                    "like rows of the table: close it, or take the line ends out of the field"
                )


def _is_value(text: str) -> bool:
    return any(form.fullmatch(text) for form in (_NUMBER, _DECIMAL_COMMA, _MOMENT))


def _all_epochs(values: Sequence[float], unit: str) -> bool:
    low, high = (bound * _EPOCH_UNITS[unit] for bound in _EPOCH_S)
    return all(low <= value <= high for value in values)


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
