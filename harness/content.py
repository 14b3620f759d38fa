"""Records as JSON content: frozen dataclasses from dicts, checked, and back; and the schema of stored files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Real
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, TypeAdapter, ValidationError

Record = TypeVar("Record")
SCHEMA = 1  # of every stored file
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""By an older schema: the content of a file of it in the next schema. A file with a seal is never migrated."""
_ABSENT, _KEY = "absent", "key"

Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that is NaN where unknown, stored as null in JSON."""


def absent(default: Any, key: str | None = None) -> Any:
    """A field that is left out of the content while it has its default value; ``key``: as for ``stored_as``."""
    return dataclasses.field(default=default, metadata={_ABSENT: True} | ({_KEY: key} if key else {}))


def stored_as(key: str, default: Any = dataclasses.MISSING) -> Any:
    """A field stored under another name; also annotate it with ``Annotated[…, Field(validation_alias=key)]``."""
    return dataclasses.field(default=default, metadata={_KEY: key})


class OtherSchema(ValueError):
    """A stored file is of another version of the harness."""


def parsed(text: str) -> dict[str, Any]:
    """The content of a stored JSON text, migrated. Raises OtherSchema, ValueError, TypeError or KeyError."""
    return current(json.loads(text))


def current(content: dict[str, Any]) -> dict[str, Any]:
    """Stored content in the schema of this harness. Raises OtherSchema for one that it cannot migrate."""
    stored = content["schema"]
    while content["schema"] != SCHEMA:
        migrate = MIGRATIONS.get(content["schema"])
        if migrate is None:
            raise OtherSchema(f"schema {stored}, this harness reads {SCHEMA}; use the harness that wrote it")
        content = {**migrate(content), "schema": content["schema"] + 1}
    return content


def read(kind: type[Record], content: Mapping[str, Any]) -> Record:
    """Build a record from its content. Raises ValueError, naming each field that is missing or of a wrong type."""
    try:
        return _adapter(kind).validate_python(content)
    except ValidationError as error:
        raise ValueError(_described(error)) from None


def _described(error: ValidationError) -> str:
    """What is wrong, field by field, in one line: ``it has no 'device'; stages.prefill.0.ms: …``."""
    found = [(".".join(map(str, each["loc"])), each) for each in error.errors(include_url=False)]
    missing = [repr(place) for place, each in found if each["type"] == "missing"]
    others = [(place, each["msg"].removeprefix("Value error, ")) for place, each in found if each["type"] != "missing"]
    wrong = [f"{place}: {said}" if place else said for place, said in others]
    return "; ".join([f"it has no {', '.join(missing)}", *wrong] if missing else wrong)


def content_of(record: Any) -> dict[str, Any]:
    """The content of a record, field by field; tuples become lists.

    Each number is of the type that its field declares, as ``read`` makes it: content that is read is written again
    byte for byte, whether a field of type float was given 1 or 1.0.
    """
    writers = _writers(type(record))
    values = ((field, getattr(record, field.name)) for field in dataclasses.fields(record))
    return {
        field.metadata.get(_KEY, field.name): writers[field.name](value)
        for field, value in values
        if not _is_left_out(field, value)
    }


def _is_left_out(field: dataclasses.Field[Any], value: Any) -> bool:
    return _ABSENT in field.metadata and value == field.default


Writer = Callable[[Any], Any]


@cache
def _writers(kind: type[Any]) -> dict[str, Writer]:
    """By field of a record: what makes content of its value."""
    declared = get_type_hints(kind)
    return {field.name: _writer(declared[field.name]) for field in dataclasses.fields(kind)}


def _writer(declared: Any) -> Writer:
    """What makes content of a value of a declared type, or of None. Numbers of several types stay as they are."""
    origin, parts = get_origin(declared), get_args(declared)
    if origin in (Union, UnionType):
        kinds = [each for each in parts if each is not NoneType]
        numbers = [each for each in kinds if each in (bool, int, float)]
        return _writer(kinds[0]) if len(kinds) == 1 else _number_writer(numbers[0] if len(numbers) == 1 else None)
    if not isinstance(origin, type) or not issubclass(origin, Mapping | Sequence):
        return _number_writer(declared)
    if issubclass(origin, Mapping):
        of_value = _writer(parts[1])
        return _unless_none(lambda value: {name: of_value(each) for name, each in value.items()})
    if origin is tuple and parts[-1] is not ...:
        writers = [_writer(each) for each in parts]
        return _unless_none(lambda value: [write(each) for write, each in zip(writers, value, strict=True)])
    of_each = _writer(parts[0])
    return _unless_none(lambda value: [of_each(each) for each in value])


def _unless_none(write: Writer) -> Writer:
    return lambda value: None if value is None else write(value)


def _number_writer(kind: Any) -> Writer:
    """What makes numbers of this kind, float or int, of those that are equal to one; other values stay."""
    if kind is float:
        return lambda value: float(value) if isinstance(value, Real) else _plain(value)
    if kind is int:
        return lambda value: int(value) if isinstance(value, Real) and float(value).is_integer() else _plain(value)
    return _plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return value.to_dict() if hasattr(value, "to_dict") else content_of(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


@cache
def _adapter(kind: type[Record]) -> TypeAdapter[Record]:
    return TypeAdapter(kind)
