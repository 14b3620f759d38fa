"""Keys of Triton's model configurations, set by path: any field that no knob of its own sets."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from decimal import Decimal

from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2

from harness import wire
from harness.errors import InputError
from harness.topology import KEY, KnobValue

Configs = dict[str, model_config_pb2.ModelConfig]  # by model


def set_key(configs: Configs, knob: str, value: KnobValue) -> None:
    """Set ``<model>:<path>`` in these configurations. A path names fields, indices and map keys, with dots between.

    A list of numbers or words replaces a repeated field. A parameter is ``<model>:parameters.<name>``. Raises
    InputError where the model has no such key, or the key does not accept the value.
    """
    model, _, path = knob.partition(KEY)
    model = model_of(configs, model)
    if model not in configs:
        raise InputError(f"{knob}: unknown model {model!r}; use one of {', '.join(configs)}")
    *parents, last = path.split(".")
    holder = configs[model]
    for part in parents:
        _check_choice(holder, part, knob)
        holder = _member(holder, part, knob)
    _check_choice(holder, last, knob)
    try:
        _set_member(holder, last, value, knob)
    except (TypeError, ValueError) as error:
        raise InputError(f"{knob} does not accept {value!r}: {error}") from None
    except (AttributeError, KeyError, IndexError):
        raise InputError(f"{knob}: {_no_such_key(holder, last)}") from None


def _check_choice(holder, part: str, knob: str) -> None:
    """Refuse a field that would silently replace another of its protobuf oneof, such as one scheduler by another."""
    field = holder.DESCRIPTOR.fields_by_name.get(part) if isinstance(holder, Message) else None
    choice = field.containing_oneof if field is not None else None
    if choice is not None and holder.WhichOneof(choice.name) != part:
        used = holder.WhichOneof(choice.name) or "none"
        raise InputError(f"{knob}: this model does not use {part}; of its {choice.name} it uses {used}")


def _member(holder, part: str, knob: str):
    if isinstance(holder, Message) and part in holder.DESCRIPTOR.fields_by_name:
        return getattr(holder, part)
    if isinstance(holder, Sequence) and part.isdigit() and int(part) < len(holder):
        return holder[int(part)]
    if isinstance(holder, Mapping) and part in holder:
        return holder[part]
    raise InputError(f"{knob}: {_no_such_key(holder, part)}")


def _set_member(holder, name: str, value: KnobValue, knob: str) -> None:
    if isinstance(holder, Mapping):
        if name not in holder:  # a protobuf map would create it
            raise KeyError(name)
        holder[name].string_value = as_parameter(knob, name, value)
    elif isinstance(holder, Sequence):
        holder[int(name)] = value
    elif isinstance(getattr(holder, name), MutableSequence):
        getattr(holder, name)[:] = value
    else:
        setattr(holder, name, value)


def _no_such_key(holder, name: str) -> str:
    fields = isinstance(holder, Message)
    known = [field.name for field in holder.DESCRIPTOR.fields] if fields else list(holder)
    return f"no key {name!r} here; there are {', '.join(map(str, known)) or 'none'}"


def model_of(configs: Configs, name: str) -> str:
    """The model of this name; the fused engine is deployed under the name of the entry."""
    return wire.ENTRY if name == wire.ENGINE and wire.FRAME not in configs else name


def as_parameter(where: str, name: str, value: KnobValue) -> str:
    """A parameter's value as its model reads it; 1.5e9 counts as a whole number. Raises InputError for other text."""
    if name not in wire.NUMBERS or (name in wire.AUTO_PARAMETERS and value == wire.AUTO):
        return str(value)
    kind, lowest = wire.NUMBERS[name]
    try:
        given = Decimal(str(value))
        number = int(given) if kind is int and given.adjusted() <= 17 else given
        if not given.is_finite() or given.adjusted() > 17 or number != given or number < Decimal(str(lowest)):
            raise ValueError
    except (ValueError, ArithmeticError):
        kinds = "whole number" if kind is int else "number"
        raise InputError(f"{where} is {value}: it must be a {kinds} of at least {lowest}") from None
    return str(number)
