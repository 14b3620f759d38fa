"""What one entry instance exports: its sessions, its queue, and what became of its requests."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import Protocol

from harness import wire
from harness.server_metrics import (
    CANCELLED,
    DONE,
    FAILED,
    FIRST_AUDIO,
    FRAMES,
    OUTCOMES,
    QUEUE_LENGTH,
    QUEUE_LIMIT,
    REFUSED,
    REJECTED,
    REQUESTS,
    SESSIONS,
    SESSIONS_LIMIT,
)
from harness.vibevoice.process.exporter import Reading
from harness.vibevoice.sessions.admission import AdmissionQueue
from harness.vibevoice.sessions.failures import ClientLeft

_MOST_UNREAD = 4096  # times of first audio, of which an update reads all: more than a server starts in that time


class SentStream(Protocol):
    """One response stream: ``frames`` sent so far, counted by the thread that sends them."""

    frames: int


class Tally:
    """Counts the requests of an entry instance. Its event loop calls ``begin`` and ``end``; any thread may read.

    Frames are counted by their own streams, whose threads would lose counts if they shared one.
    """

    def __init__(self, queue: AdmissionQueue, owner: tuple[str, str]):
        """``owner``: model and process, as labels."""
        self.queue, self.owner = queue, owner
        self.first_audio_s: deque[float] = deque(maxlen=_MOST_UNREAD)  # observed since the last reading
        self._open: set[SentStream] = set()
        self._outcomes: Counter[str] = Counter()
        self._frames_of_ended = 0

    def begin(self, stream: SentStream) -> None:
        self._open.add(stream)

    def forget(self, stream: SentStream) -> None:
        """Do not count a request that asks for no speech."""
        self._open.discard(stream)

    def end(self, stream: SentStream, error: Exception | None) -> None:
        if stream in self._open:
            self._open.discard(stream)  # first: a reading in between is too low, which the next one corrects
            self._frames_of_ended += stream.frames
            self._outcomes[outcome_of(error)] += 1

    def readings(self) -> Iterator[Reading]:
        queue, owner = self.queue, self.owner
        yield Reading(SESSIONS, queue.places - queue.free, owner)
        yield Reading(SESSIONS_LIMIT, queue.places, owner)
        yield Reading(QUEUE_LENGTH, len(queue), owner)
        yield Reading(QUEUE_LIMIT, queue.limit, owner)
        yield Reading(FRAMES, self._frames_of_ended + sum(stream.frames for stream in list(self._open)))
        for outcome in OUTCOMES:
            yield Reading(REQUESTS, self._outcomes[outcome], (outcome,))
        yield Reading(FIRST_AUDIO, None)
        while self.first_audio_s:
            yield Reading(FIRST_AUDIO, self.first_audio_s.popleft())


def outcome_of(error: Exception | None) -> str:
    """How a request ended that ended with this error."""
    if error is None:
        return DONE
    if isinstance(error, ClientLeft):
        return CANCELLED
    prefixes = {wire.BUSY: REJECTED, wire.REFUSED: REFUSED}
    return next((outcome for prefix, outcome in prefixes.items() if str(error).startswith(prefix)), FAILED)
