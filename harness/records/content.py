"""Records as JSON content: frozen dataclasses from dicts, checked, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter

Record = TypeVar("Record")
_ABSENT, _KEY = "absent", "key"

Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that is NaN where unknown, stored as null in JSON."""


def absent(default: Any, key: str | None = None) -> Any:
    """A field that is left out of the content while it has its default value; ``key``: as for ``stored_as``."""
    return dataclasses.field(default=default, metadata={_ABSENT: True} | ({_KEY: key} if key else {}))


def stored_as(key: str, default: Any = dataclasses.MISSING) -> Any:
    """A field stored under another name; also annotate it with ``Annotated[…, Field(validation_alias=key)]``."""
    return dataclasses.field(default=default, metadata={_KEY: key})


def read(kind: type[Record], content: Mapping[str, Any]) -> Record:
    """Build a record from its content. Raises ValueError, naming each field that is missing or of a wrong type."""
    return _adapter(kind).validate_python(content)


def content_of(record: Any) -> dict[str, Any]:
    """The content of a record, field by field; tuples become lists."""
    values = ((field, getattr(record, field.name)) for field in dataclasses.fields(record))
    return {
        field.metadata.get(_KEY, field.name): _plain(value) for field, value in values if not _is_left_out(field, value)
    }


def _is_left_out(field: dataclasses.Field[Any], value: Any) -> bool:
    return _ABSENT in field.metadata and value == field.default


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return value.to_dict() if hasattr(value, "to_dict") else content_of(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


@cache
def _adapter(kind: type[Record]) -> TypeAdapter[Record]:
    return TypeAdapter(kind)
