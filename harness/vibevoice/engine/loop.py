"""The fused engine: one loop that reads prompts, steps all sessions together and hands over their audio.

Sessions join and leave between two steps. Sender threads send the audio of a step while the next one is computed.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np

from harness import wire
from harness.vibevoice.engine.frame_step import Frames, FrameStep, PromptPart, Row
from harness.vibevoice.sessions.failures import StageEnded

SENDERS = 1  # threads: the server accepts one response at a time, and each further thread competes for the interpreter
MOST_FRAMES = 16  # per response, where frames had to wait for earlier ones
WAIT_S = 0.001
MOST_WAITING = 64  # unsent frames of a session, at which it pauses
_NOISE_ROWS = 16  # drawn at a time
READ_SHARE = 0.5  # most of a step's time, or of the listeners' buffers, that reading prompts may take before a step
LONGEST_READ_S = 0.5  # the longest time of which it may take that share, also without listeners
IN_HAND_S = 1.0  # seconds of audio below which a listener's buffer counts as short, unless configured
FIRST_TOKENS, FEWEST_TOKENS = 256, 16  # before the time per token is known; minimum however long a token takes


class PromptToRead:
    """The unread rest of a session's prompt: ``token_ids``, and voice frames [frames, 64] for its audio tokens."""

    def __init__(self, session: int, token_ids: Sequence[int], voice_frames: np.ndarray, audio_token_id: int):
        self.session, self.token_ids, self.voice_frames = session, np.asarray(token_ids, np.int32), voice_frames
        self.audio_token_id = audio_token_id

    def __len__(self) -> int:
        return len(self.token_ids)

    def take(self, count: int) -> PromptPart:
        """Remove and return at most ``count`` tokens."""
        ids, self.token_ids = self.token_ids[:count], self.token_ids[count:]
        places = int((ids == self.audio_token_id).sum())
        frames, self.voice_frames = self.voice_frames[:places], self.voice_frames[places:]
        return PromptPart(self.session, ids, frames)


@dataclass(eq=False)
class Speech:
    """One session of the engine, opened with ``FrameStep.open``.

    ``deliver`` is called with chunks of audio [samples] by one thread at a time, in order; ``done`` is set after the
    last. A chunk has ``chunk_frames`` frames, or more if frames had to wait for earlier ones to be sent. ``past``:
    steps of a resumed session, as (tokens, latents fed, semantics fed). ``rows`` draws the noise [64] of one frame
    after another.
    """

    session: int
    prompt: PromptToRead
    frames: int
    rows: Iterator[np.ndarray]
    deliver: Callable[[np.ndarray], None]
    guidance: float = wire.DEFAULT_GUIDANCE_SCALE
    steps: int = wire.DEFAULT_DIFFUSION_STEPS
    chunk_frames: int = 1
    keep: bool = False
    past: deque[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=deque)
    done: Future = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)  # generated so far
    fed: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # latent and semantic, if kept
    spoken: int = 0
    began_s: float = 0.0  # when it was submitted, then when its first frame was launched
    _noise: np.ndarray | None = None  # of the next frame: a step with another token does not use it
    _waiting: deque[np.ndarray] = field(default_factory=deque)  # frames to be sent
    _last_waits: bool = False
    _queued: bool = False  # in the senders' queue
    _outbox: threading.Lock = field(default_factory=threading.Lock)  # guards the three above
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def row(self) -> Row:
        if self._noise is None:
            self._noise = next(self.rows)
        return Row(self.session, self._noise, self.guidance, self.steps)

    def took(self, token: int, now_s: float) -> bool:
        """Note the token of a step; returns whether the session ends with it."""
        self.tokens.append(token)
        if token == wire.TOKEN_SPEECH_FRAME:
            if not self.spoken:
                self.began_s = now_s
            self.spoken, self._noise = self.spoken + 1, None
        return self.spoken >= self.frames or token == wire.TOKEN_END_OF_TEXT

    def due_s(self) -> float:
        """When a listener who started with the first frame will have heard all audio so far."""
        return self.began_s + self.spoken * wire.SECONDS_PER_FRAME

    def put(self, audio: np.ndarray | None, last: bool) -> bool:
        """Add a frame to be sent; returns whether a sender must be notified."""
        with self._outbox:
            if audio is not None:
                self._waiting.append(audio)
            self._last_waits |= last
            told, self._queued = self._queued, self._queued or self._complete
            return self._queued and not told

    def send_waiting(self) -> bool:
        """Send waiting frames as one chunk; returns whether more are ready, so that the session stays queued."""
        with self._outbox:
            frames = [self._waiting.popleft() for _ in range(self._chunk())]
            last = self._last_waits and not self._waiting
        self._send(frames, last)
        with self._outbox:
            self._queued = self._complete and not last
            return self._queued

    def _chunk(self) -> int:
        """Frames of the next chunk: a multiple of ``chunk_frames``, as many as wait and fit in one response."""
        most = max(1, MOST_FRAMES // self.chunk_frames) * self.chunk_frames
        ready = len(self._waiting) // self.chunk_frames * self.chunk_frames
        return min(most, len(self._waiting) if self._last_waits else ready)

    @property
    def _complete(self) -> bool:
        return self._last_waits or len(self._waiting) >= self.chunk_frames

    @property
    def is_ahead(self) -> bool:
        """Whether so much of its audio is unsent that it should pause."""
        return len(self._waiting) >= max(MOST_WAITING, 2 * self.chunk_frames)

    def _send(self, frames: list[np.ndarray], last: bool) -> None:
        """Deliver a chunk, and set ``done`` after the last one; does nothing once the session is over."""
        with self._sending:
            if self.over:
                return
            try:
                if frames:
                    self.deliver(frames[0] if len(frames) == 1 else np.concatenate(frames))
            except Exception as error:
                self.fail(error)
            else:
                if last:
                    with contextlib.suppress(InvalidStateError):
                        self.done.set_result(None)

    def wait_sent(self) -> None:
        """Wait until no sender is delivering its audio; after its end, nothing more is sent."""
        with self._sending:
            return

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            with contextlib.suppress(InvalidStateError):  # it ended meanwhile, in another thread
                self.done.set_exception(error)

    @property
    def over(self) -> bool:
        return self.done.done()


def _ended() -> StageEnded:
    return StageEnded(f"{wire.ENGINE} ended while it served this session, and is restarting; retry")


def noise_rows(seed: int, skipped: int = 0) -> Iterator[np.ndarray]:
    """The noise [64] of each frame of a seed, after ``skipped`` frames, however many are drawn at a time."""
    generator = np.random.default_rng(seed)
    generator.standard_normal((skipped, wire.LATENT_SIZE), np.float32)
    while True:
        yield from generator.standard_normal((_NOISE_ROWS, wire.LATENT_SIZE), np.float32)


@dataclass
class Counts:
    """Counters of the loop: steps and nanoseconds by batch size, prompt tokens and the time of reading them."""

    steps: dict[int, list[int]] = field(default_factory=dict)
    prompt_tokens: int = 0
    prompt_ns: int = 0

    def step(self, batch: int, ns: int) -> None:
        count = self.steps.setdefault(batch, [0, 0])
        count[0] += 1
        count[1] += ns


# The sessions of a step, each with whether it ends with it; its results; its launch time in ns.
Launched = tuple[list[tuple[Speech, bool]], Frames, int]


class Engine:
    """Runs the sessions of one ``FrameStep`` in its own thread, at most ``max_batch`` of them per step."""

    def __init__(
        self,
        step: FrameStep,
        max_batch: int,
        broken: Callable[[Exception], None] = lambda error: None,
        prepare: Callable[[], None] = lambda: None,
        in_hand_s: float = IN_HAND_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        """``prepare`` is called first in the loop's thread, ``broken`` after the loop has ended with an internal error.

        Listeners with less than ``in_hand_s`` seconds of buffered audio count as short.
        """
        self.step, self.max_batch, self.clock, self.counts = step, max_batch, clock, Counts()
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._reading: deque[Speech] = deque()
        self._speaking: dict[int, Speech] = {}
        self._open: set[Speech] = set()  # submitted, and not yet removed
        self._senders = Senders(SENDERS)
        self._prepare, self._broken = prepare, broken
        self._over, self._ended, self._calling = False, False, threading.Lock()
        self._in_hand_s, self._step_ns = in_hand_s, 0  # of the last step
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def sessions(self) -> int:
        """Number of sessions that read or speak."""
        return len(self._open)

    def call(self, function: Callable, *arguments) -> Future:
        """Call a function of the step between two steps; the future gets its result or exception."""
        answer: Future = Future()
        with self._calling:
            if self._ended:
                answer.set_exception(_ended())
            else:
                self._commands.put((answer, function, arguments))
        return answer

    def submit(self, speech: Speech) -> None:
        """Queue a session: it reads its prompt and then speaks."""
        added = self.call(self._add, speech)
        added.add_done_callback(lambda ended: ended.exception() and speech.fail(ended.exception()))

    def end(self, speech: Speech, keep: bool = False) -> Future:
        """Remove a session; the future gets its convolution state [values] if ``keep`` is set.

        A sender may still be delivering a chunk of it: see ``Speech.wait_sent``.
        """
        return self.call(self._remove, speech, keep)

    def close(self) -> None:
        """End the loop and the senders; open sessions get an error."""
        self._over = True
        self.call(lambda: None)
        self._thread.join()

    def _run(self) -> None:
        error = None
        try:
            self._prepare()
            self._loop()
        except Exception as found:
            error = found
        with self._calling:
            self._ended = True
        for speech in self._open:
            speech.fail(_ended())
        with contextlib.suppress(queue.Empty):
            while True:
                answer, *_ = self._commands.get(block=False)
                if answer.set_running_or_notify_cancel():
                    answer.set_exception(_ended())
        self._senders.close()
        if error:
            self._broken(error)

    def _loop(self) -> None:
        behind: Launched | None = None
        while not self._over:
            self._obey(idle=not (behind or self._reading or self._speaking))
            self._read()
            launched = self._launch()
            if behind:
                self._emit(*behind)
            elif not launched and self._speaking and not self._reading:
                time.sleep(WAIT_S)  # all sessions are paused until audio is sent
            behind = launched
            if behind and behind[1].ready:
                self._emit(*behind)
                behind = None

    def _obey(self, idle: bool) -> None:
        """Execute the calls queued since the last step; with ``idle`` set, wait for one."""
        while True:
            try:
                answer, function, arguments = self._commands.get(block=idle)
            except queue.Empty:
                return
            idle = False
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(function(*arguments))
            except Exception as error:
                answer.set_exception(error)
                self._must_go_on(error)

    def _add(self, speech: Speech) -> None:
        speech.began_s = self.clock()
        self._open.add(speech)
        self._reading.append(speech)

    def _remove(self, speech: Speech, keep: bool) -> np.ndarray:
        self._open.discard(speech)
        self._drop(speech, _ended())
        return self.step.close(speech.session, keep)

    def _read(self) -> None:
        """Read parts of the prompts in turn; sessions that have read their prompt and their past start to speak."""
        if turn := self._turn():
            self._together([speech for speech, _ in turn], self._read_parts, [part for _, part in turn])
        replaying = next((speech for speech in self._reading if speech.past and not speech.prompt), None)
        if replaying:
            self._together([replaying], self.step.replay, replaying.session, *replaying.past.popleft())
            self._to_the_end([replaying])
        for speech in [each for each in self._reading if not (each.prompt or each.past)]:
            self._reading.remove(speech)
            if not speech.over:
                self._speaking[speech.session] = speech

    def _turn(self) -> list[tuple[Speech, PromptPart]]:
        """The next parts of prompts, one per session, as many as may be read before the next step."""
        turn, room = [], self._tokens_to_read()
        for speech in [each for each in self._reading if each.prompt and not each.over]:
            if room <= 0:
                break
            turn.append((speech, speech.prompt.take(room)))
            room -= len(turn[-1][1].token_ids)
        self._to_the_end([speech for speech, _ in turn])
        return turn

    def _tokens_to_read(self) -> int:
        """Tokens that fit in half of the time for which listeners have buffered audio, or half a step if one is short.

        Uses the time per token of the last reading.
        """
        most = self.step.prompt_tokens
        if not self.step.token_ns:
            return min(FIRST_TOKENS, most)
        in_hand_s = min((each.due_s() for each in self._speaking.values()), default=math.inf) - self.clock()
        time_ns = 1e9 * min(in_hand_s, LONGEST_READ_S) if in_hand_s > self._in_hand_s else self._step_ns
        return max(min(FEWEST_TOKENS, most), min(most, int(READ_SHARE * time_ns / self.step.token_ns)))

    def _to_the_end(self, sessions: Sequence[Speech]) -> None:
        """Move these sessions to the end of the reading order."""
        for speech in sessions:
            if speech in self._reading:
                self._reading.remove(speech)
                self._reading.append(speech)

    def _read_parts(self, parts: Sequence[PromptPart]) -> None:
        self.step.read(parts)
        self.counts.prompt_ns = self.step.prompt_ns
        self.counts.prompt_tokens += sum(len(part.token_ids) for part in parts)

    def _launch(self) -> Launched | None:
        """Launch one step of the speaking sessions; those whose listeners run out of audio first take precedence."""
        batch = [each for each in self._next() if self._together([each], self.step.check, each.session)]
        if not batch:
            return None
        began = time.monotonic_ns()
        frames = self._together(batch, self.step.launch, [speech.row() for speech in batch])
        if not frames:
            return None
        now_s = self.clock()
        ended = [speech.took(token, now_s) for speech, token in zip(batch, frames.tokens, strict=True)]
        for speech, last in zip(batch, ended, strict=True):
            if last:
                self._speaking.pop(speech.session, None)
        return list(zip(batch, ended, strict=True)), frames, began

    def _next(self) -> Iterable[Speech]:
        speaking = [speech for speech in self._speaking.values() if not (speech.over or speech.is_ahead)]
        speaking = self._of_few_groups(speaking)
        if len(speaking) <= self.max_batch:
            return speaking
        return heapq.nsmallest(self.max_batch, speaking, key=Speech.due_s)

    def _of_few_groups(self, speaking: list[Speech]) -> list[Speech]:
        """Sessions with the default number of denoising steps, and as many other numbers as one step supports."""
        due_s: dict[int, float] = {}
        for speech in speaking:
            if speech.steps != wire.DEFAULT_DIFFUSION_STEPS:
                due_s[speech.steps] = min(due_s.get(speech.steps, math.inf), speech.due_s())
        left = sorted(due_s, key=due_s.__getitem__)[self.step.odd_groups :]
        return [speech for speech in speaking if speech.steps not in left]

    def _emit(self, batch: Sequence[tuple[Speech, bool]], frames: Frames, began_ns: int) -> None:
        audio, latent, semantic = frames.values()
        self._step_ns = frames.took_ns or time.monotonic_ns() - began_ns
        self.counts.step(len(batch), self._step_ns)
        for i, ((speech, last), token) in enumerate(zip(batch, frames.tokens, strict=True)):
            spoke = token == wire.TOKEN_SPEECH_FRAME
            if spoke and speech.keep:
                speech.fed.append((latent[i].copy(), semantic[i].copy()))  # a view would keep all rows alive
            if speech.put(audio[i].copy() if spoke else None, last):
                self._senders.tell(speech)

    def _together(self, sessions: Sequence[Speech], function: Callable, *arguments):
        """The result of a call for several sessions, True for none.

        None where it failed; then all of these sessions fail, since the cause and the state left behind are unknown.
        """
        try:
            answer = function(*arguments)
        except Exception as error:
            for speech in sessions:
                self._drop(speech, error)
            self._must_go_on(error)
            return None
        return True if answer is None else answer

    def _must_go_on(self, error: Exception) -> None:
        """Raise an error after which the device is unusable."""
        if self.step.is_broken_by(error):
            raise error

    def _drop(self, speech: Speech, error: Exception) -> None:
        self._speaking.pop(speech.session, None)
        if speech in self._reading:
            self._reading.remove(speech)
        speech.fail(error)


class Senders:
    """Threads that send the sessions' waiting audio while the next step is computed."""

    def __init__(self, count: int):
        self._queue: queue.SimpleQueue[Speech | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name="sender", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def tell(self, speech: Speech) -> None:
        """Notify the senders that a session has a chunk to send."""
        self._queue.put(speech)

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (speech := self._queue.get()) is not None:
            if speech.send_waiting():
                self._queue.put(speech)
