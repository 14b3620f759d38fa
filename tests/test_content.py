"""Records as JSON content: what is read is written again byte for byte, whichever way a number was given."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from pydantic.fields import FieldInfo

from harness import device_profile, identity, records
from harness.content import Figure, absent, content_of, read
from harness.records.seal import Seal


@dataclass(frozen=True)
class Inner:
    seconds: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A field of each form that records have."""

    figure: Figure = 1.0
    optional: float | None = None
    strict: Annotated[int, Field(strict=True)] = 1
    either: int | float = 0
    worded: float | str = 0.0
    flag: bool | None = None
    pairs: tuple[tuple[str, bool | None, float], ...] = ()
    bounds: tuple[float | None, int] = (None, 0)
    by_name: Mapping[str, Sequence[float]] = field(default_factory=dict)
    inner: dict[str, Inner] = field(default_factory=dict)
    rare: float = absent(1.0)


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ({"figure": 2}, '"figure": 2.0'),
        ({"optional": 2}, '"optional": 2.0'),
        ({"optional": None}, '"optional": null'),
        ({"strict": 2.0}, '"strict": 2'),
        ({"strict": np.int64(2)}, '"strict": 2'),
        ({"figure": np.float32(2)}, '"figure": 2.0'),
        ({"either": 2}, '"either": 2'),
        ({"either": 2.0}, '"either": 2.0'),
        ({"worded": 2}, '"worded": 2.0'),
        ({"worded": "auto"}, '"worded": "auto"'),
        ({"flag": True}, '"flag": true'),
        ({"pairs": (("a", None, 2), ("b", True, 2.5))}, '"pairs": [["a", null, 2.0], ["b", true, 2.5]]'),
        ({"bounds": (2, 2.0)}, '"bounds": [2.0, 2]'),
        ({"by_name": {"a": (1, 2.5)}}, '"by_name": {"a": [1.0, 2.5]}'),
        ({"inner": {"a": Inner(1, 2.0)}}, '"inner": {"a": {"seconds": 1.0, "count": 2}}'),
        ({"rare": 2}, '"rare": 2.0'),
    ],
)
def test_a_number_is_written_as_its_field_declares_it(values, written):
    text = json.dumps(content_of(Outer(**values)))
    assert written in text
    assert json.dumps(content_of(read(Outer, json.loads(text)))) == text


def test_a_rare_field_is_left_out_also_where_it_was_given_as_another_type():
    assert "rare" not in content_of(Outer(rare=1)) and content_of(Outer(rare=2))["rare"] == 2


def test_a_number_that_an_int_cannot_be_is_not_rounded():
    broken: Any = 2.5
    assert content_of(Inner(1.0, broken))["count"] == 2.5
    with pytest.raises(ValueError, match="count"):
        read(Inner, {"seconds": 1.0, "count": 2.5})


def stored_kinds() -> list[type]:
    """Every record type that is read from content and written as content."""
    names = [f"harness.records.{each.name}" for each in pkgutil.iter_modules(records.__path__)]
    modules = [device_profile, identity, *map(importlib.import_module, names)]
    found = {each for module in modules for each in vars(module).values() if isinstance(each, type)}
    kinds = [each for each in found if dataclasses.is_dataclass(each) and hasattr(each, "of") and writer_of(each)]
    return sorted(kinds, key=lambda kind: kind.__name__)


def writer_of(kind: type) -> Callable[[Any], dict[str, Any]] | None:
    return getattr(kind, "to_dict", None) or getattr(kind, "content", None)


KINDS = stored_kinds()
CHECKED = {"StagePoint": {"device_ms": None}}  # fields whose values depend on others


def made(declared: Any, rng: random.Random) -> Any:
    """A value of a declared type; its numbers are ints or floats, whatever is declared."""
    origin, parts = get_origin(declared), get_args(declared)
    if dataclasses.is_dataclass(declared):
        return example(declared, rng)
    if origin is Annotated:
        patterns = [each.pattern for info in parts[1:] if isinstance(info, FieldInfo) for each in _patterns(info)]
        return rng.choice(patterns[0].strip("^()$").split("|")) if patterns else made(parts[0], rng)
    if origin in (Union, UnionType):
        return made(rng.choice([each for each in parts if each is not ...]), rng)
    if origin is Literal:
        return rng.choice(parts)
    if declared in (int, float):
        whole = rng.choice([rng.randint(1, 9), float(rng.randint(1, 9))])
        return rng.choice([whole, rng.uniform(0.5, 9)]) if declared is float else whole
    if origin is tuple and parts[-1] is not ...:
        return tuple(made(each, rng) for each in parts)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: made(parts[1], rng) for name in ("short", "long")[: rng.randint(0, 2)]}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return tuple(made(parts[0], rng) for _ in range(2))
    plain = {str: lambda: rng.choice(["", "text"]), bool: lambda: rng.random() < 0.5, NoneType: lambda: None}
    return plain.get(declared, dict)()


def _patterns(info: FieldInfo) -> list[Any]:
    return [each for each in info.metadata if getattr(each, "pattern", None)]


def example(kind: type, rng: random.Random) -> Any:
    declared = get_type_hints(kind, include_extras=True)
    values = {each.name: made(declared[each.name], rng) for each in dataclasses.fields(kind) if each.init}
    return kind(**values | CHECKED.get(kind.__name__, {}))


def test_every_file_of_a_run_is_among_the_records():
    names = {kind.__name__ for kind in KINDS}
    assert {"Fit", "Plan", "Trial", "RunManifest", "Seal", "Profile", "TestManifest", "Prediction", "Summary"} <= names
    assert {"Comparison", "FleetAnswer", "PlanningEstimate", "StageIdentity"} <= names


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_a_record_that_is_read_is_written_byte_for_byte_as_it_was(kind, seed):
    """With ints where floats are declared and floats where ints are."""
    write = writer_of(kind)
    assert write is not None
    text = json.dumps(write(example(kind, random.Random(seed))))
    assert json.dumps(write(kind.of(json.loads(text)))) == text


def test_a_seal_has_one_hash_however_its_numbers_were_given():
    """It is made from a plan in memory, and checked against a file."""
    seal = example(Seal, random.Random(1))
    assert Seal.of(json.loads(json.dumps(seal.to_dict()))).sha256 == seal.sha256
