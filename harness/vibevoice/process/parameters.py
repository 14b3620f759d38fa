"""The parameters of a model's config.pbtxt; ``args`` are those that Triton gives to the process that serves it."""

from __future__ import annotations

import json
import math

from harness import wire
from harness.errors import InputError

_KINDS = {int: "a whole number", float: "a number"}


def parameters(args: dict) -> dict[str, str]:
    """The string parameters of the model's config.pbtxt."""
    config = json.loads(args["model_config"])
    return {name: value["string_value"] for name, value in config.get("parameters", {}).items()}


def number(given: dict[str, str], name: str, lowest: float | None = None, kind: type = int) -> float:
    """A numeric parameter. Raises InputError for other text, or a number below ``lowest``.

    Without ``lowest``: the bound in ``wire.NUMBERS``.
    """
    if lowest is None:
        kind, lowest = wire.NUMBERS[name]
    try:
        value = kind(given[name])
    except ValueError:
        value = math.nan
    if not lowest <= value < math.inf:
        raise InputError(f"the parameter {name} is {given[name]!r}: it must be {_KINDS[kind]} of at least {lowest}")
    return value
