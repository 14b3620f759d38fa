"""Translates a stage's error messages into messages for clients."""

from __future__ import annotations

import re

from harness import wire
from harness.errors import HarnessError, RequestError
from harness.vibevoice.sessions.admission import Busy

# messages of Triton or a stage about a session whose process has ended or was replaced
_ENDED = (
    re.compile(r"Stub process '(?P<model>\w+?)_\d+_\d+' is not healthy"),
    re.compile(r"(?P<model>\w+) has no such session"),
    re.compile(r"to model '(?P<model>\w+)' must specify the START flag"),
)
_STOPPING = re.compile(r"Server (is stopping|not ready|exiting)", re.IGNORECASE)  # Triton's messages while it stops
_PLACE = re.compile(r"at instance (\d+) of (\d+)")


class ClientLeft(Exception):
    """The client cancelled its stream."""


class StageError(HarnessError):
    """A stage refused or failed; the message is the stage's own."""


class StageEnded(StageError):
    """The process of a stage ended with the session in it."""


def at_instance(error: RequestError, place: int, places: int) -> RequestError:
    """An error of one of several instances, with the instance's name where it has no room now."""
    if places == 1 or not str(error).startswith(wire.BUSY):
        return error
    return RequestError(f"{error} at instance {place} of {places}")


def described(message: str) -> HarnessError:
    """The error to raise for a message of a stage or of Triton: Busy, StageEnded or StageError."""
    busy = message.find(wire.BUSY)
    if busy >= 0:
        place = _PLACE.search(message)
        return Busy(message[busy:], *map(int, place.groups() if place else (1, 1)))
    for pattern in _ENDED:
        if found := pattern.search(message):
            return StageEnded(f"{found['model']} ended while it served this session, and is restarting; retry")
    if _STOPPING.search(message):
        return StageError("the server is stopping and ends its sessions; retry after its restart")
    return StageError(message.removeprefix(f"in ensemble '{wire.FRAME}', "))
