"""The messages between a load generator and its stream-reader processes. Only this module writes and reads them.

Each travels as a msgpack pair ``[kind, fields]`` over the socket pair that the two processes share:

- to a reader: Connect first; then any number of Submit, Cancel and Finish
- from a reader: Ready or Refused first; then one Returned for each Submit, and a ProgressSample each second; at the
  end TimerLag and ConnectionTotals
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import msgpack

from harness.client.replicas import ConnectionStatistics
from harness.client.target import Target
from harness.drive.readers.live_stats import Progress
from harness.records.load_log import request_from_plain, request_to_plain, result_from_plain, result_to_plain
from harness.records.schema import Request, Result


@dataclass(frozen=True, slots=True)
class Connect:
    """Open connections to ``target`` as number ``first`` of the ``of`` processes that share its servers.

    This is a message because it may hold secrets; a command line would show them to every user of the host.
    """

    target: Target
    first: int
    of: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Send ``request`` at its ``due_ns``. ``number`` names it in later messages; ``loop`` is "open" or "closed"."""

    number: int
    request: Request
    loop: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the request ``number`` early; its Result is still returned."""

    number: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Send nothing more. Requests in progress get ``grace_s`` seconds; a second Finish may shorten them."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class Ready:
    """The reader process ``pid`` is connected and every server accepts requests; ``dilation``: of the servers' time."""

    pid: int
    dilation: float = 1.0


@dataclass(frozen=True, slots=True)
class Refused:
    """The reader cannot work and ends; ``reason`` is a message for the user."""

    reason: str


@dataclass(frozen=True, slots=True)
class Returned:
    """The Result of the request ``number``."""

    number: int
    result: Result


@dataclass(frozen=True, slots=True)
class ProgressSample:
    """A sample of the streams in progress."""

    progress: Progress


@dataclass(frozen=True, slots=True)
class TimerLag:
    """How late the reader's own timers ran (p99, seconds; NaN if it had none): the error of its timestamps."""

    p99_s: float


@dataclass(frozen=True, slots=True)
class ConnectionTotals:
    """Statistics of the reader's connections to the servers."""

    connections: ConnectionStatistics


Message = Connect | Submit | Cancel | Finish | Ready | Refused | Returned | ProgressSample | TimerLag | ConnectionTotals
_KINDS: dict[str, type[Message]] = {each.__name__: each for each in typing.get_args(Message)}
_TO_PLAIN: dict[type, Callable] = {
    Request: request_to_plain,
    Result: result_to_plain,
    Target: Target.to_plain,
    Progress: Progress.to_plain,
    ConnectionStatistics: ConnectionStatistics.to_plain,
}
_FROM_PLAIN: dict[type, Callable] = {
    Request: request_from_plain,
    Result: result_from_plain,
    Target: Target.from_plain,
    Progress: Progress.from_plain,
    ConnectionStatistics: ConnectionStatistics.from_plain,
}


def _as_it_is(value):
    return value


def _codecs(kind: type[Message]) -> tuple[tuple[str, Callable, Callable], ...]:
    types = typing.get_type_hints(kind)
    return tuple(
        (each.name, _TO_PLAIN.get(types[each.name], _as_it_is), _FROM_PLAIN.get(types[each.name], _as_it_is))
        for each in fields(kind)
    )


_CODECS = {name: _codecs(kind) for name, kind in _KINDS.items()}


def to_bytes(message: Message) -> bytes:
    """Encode a message for the other side's ``Inbox``."""
    kind = type(message).__name__
    return msgpack.packb([kind, [write(getattr(message, name)) for name, write, _ in _CODECS[kind]]])


class Inbox:
    """Decodes messages from the bytes that a socket delivers in pieces of any size."""

    def __init__(self):
        self._unpacker = msgpack.Unpacker(max_buffer_size=0)

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that ``data`` completes, in order. Consume all of them before the next call."""
        self._unpacker.feed(data)
        for kind, plain in self._unpacker:
            values = (read(value) for value, (_, _, read) in zip(plain, _CODECS[kind], strict=True))
            yield _KINDS[kind](*values)
